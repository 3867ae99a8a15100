"""The command `colorfilter openlineage`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from colorfilter.errors import InputError
from commands.options import (
    HomeOption,
    artifacts_of,
    console,
)
from pipelines import settings


def openlineage(
    home: HomeOption = Path(settings.DEFAULT_HOME),
    file: Annotated[
        Path | None, typer.Option(help="Write the events here instead, one a line.")
    ] = None,
) -> None:
    """Send the lineage of the home, from the ledger, as OpenLineage events.

    Where to is up to OpenLineage's own configuration: OPENLINEAGE_URL, OPENLINEAGE__TRANSPORT__*
    or openlineage.yml. What is sent again is the same events.
    """
    from resources.home import Home

    if find_spec("openlineage") is None:
        raise InputError(
            "openlineage wants the package openlineage-python; pip install '.[openlineage]'"
        )
    from commands.openlineage.catalogue import send, write
    from commands.openlineage.events import events

    found, without_run = events(artifacts_of(Home(home)))
    if file:
        write(found, file)
    else:
        send(found)
    console.print(f"{len(found)} events {'written' if file else 'sent'}", highlight=False)
    if without_run:
        console.print(
            f"{without_run} artifacts left out: no run is on record for them",
            highlight=False,
        )
