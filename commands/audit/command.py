"""The command `colorfilter audit`."""

from pathlib import Path
from typing import Annotated

import typer

from commands.options import (
    HomeOption,
    RecipeOption,
    console,
    errors,
    load_recipe,
)
from pipelines import settings


def audit(
    what: Annotated[
        str | None,
        typer.Argument(
            help="An asset such as reference/color_tau16/filtered_dataset, one partition of it in "
            "brackets, or an artifact's folder; by default all that is current."
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

    Reads every byte of what the artifact was made from. A line for each thing that does not hold:
    asset, where, what was expected and what was found. Exit code 0: all holds; 1: not all does.
    """
    from commands.audit.audit import audit as run_audit
    from commands.audit.audit import print_audit, write_page
    from commands.display import show_steps
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
