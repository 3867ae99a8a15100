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
        Path | None,
        typer.Option(help="Write the events to this file instead, one JSON object per line."),
    ] = None,
) -> None:
    """Send the lineage recorded in the ledger to a catalogue, as OpenLineage events.

    OpenLineage's own configuration sets the destination: OPENLINEAGE_URL,
    OPENLINEAGE__TRANSPORT__* or openlineage.yml. Sending again repeats the same events with the
    same ids.
    """
    from resources.home import Home

    if find_spec("openlineage") is None:
        raise InputError(
            "openlineage: the package openlineage-python is not installed; "
            "pip install '.[openlineage]'"
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
            f"{without_run} artifacts omitted: the ledger records no run for them",
            highlight=False,
        )
