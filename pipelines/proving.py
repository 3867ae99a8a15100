"""Commands that say where things came from, and whether that holds."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from colorfilter.errors import InputError
from pipelines import settings
from pipelines.terminal import (
    HomeOption,
    RecipeOption,
    artifacts_of,
    console,
    errors,
    load_recipe,
)


def audit(
    what: Annotated[
        str | None,
        typer.Argument(
            help="An asset such as reference/color_tau16/filtered_dataset, one partition of it in "
            "brackets, or an artefact's folder; by default all that is current."
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="A sha256 of the ledger that was noted down; it must be there."),
    ] = None,
    reselect: Annotated[
        bool, typer.Option("--reselect", help="Select again by the scores and compare.")
    ] = False,
    rescore: Annotated[
        int | None,
        typer.Option(help="Score so many random sequences of every shard again; loads models."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page for people.")] = None,
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Check that what lies in the home is what the ledger says was made, back to the raw files.

    Reads every byte of what the artefact was made from. A line for each thing that does not hold:
    asset, where, what was expected and what was found. Exit code 0: all holds; 1: not all does.
    """
    from pipelines.auditing import audit as run_audit
    from pipelines.auditing import print_audit, write_page
    from pipelines.display import show_steps
    from resources.home import Home

    plan = load_recipe(recipe)
    place = Home(home)
    place.check(plan.name)
    with show_steps(errors if as_json else console) as show:
        found = run_audit(plan, place, show, what, head, reselect, rescore)
    if html:
        write_page(found, plan, place, html)
    if as_json:
        print(found.as_json())  # noqa: T201
    else:
        print_audit(console, found)
    if not found.passed:
        raise typer.Exit(1)


def explain(
    what: Annotated[str, typer.Argument(help="DOC_ID, SHARD:POSITION, FILE:LINE or DOMAIN/ARM.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all facts as one JSON object.")
    ] = False,
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Say why a document or sequence was selected or not, or what changed in a dataset.

    Of a document (the first digits of its doc_id, or the line of the file it was read from) or a
    sequence: where it came from, its losses and by which models, what each arm did with it, and
    which target models trained on it. Of a dataset: what entered and left since its last version,
    and why. Writes nothing.
    """
    from pipelines.explaining import look_up, show
    from resources.home import Home

    place = Home(home)
    place.check(load_recipe(recipe).name)
    found = look_up(place, what)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        show(console, found)


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
    from resources.catalogue import send, write
    from resources.openlineage import events

    found, without_run = events(artifacts_of(Home(home)))
    if file:
        write(found, file)
    else:
        send(found)
    console.print(f"{len(found)} events {'written' if file else 'sent'}", highlight=False)
    if without_run:
        console.print(
            f"{without_run} artefacts left out: no run is on record for them",
            highlight=False,
        )
