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
            help="What to audit: an asset such as reference/color_tau16/filtered_dataset, one of "
            "its partitions as ASSET[PARTITION], or the folder of an artifact. Default: every "
            "current artifact."
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="Ledger head noted down after an earlier run or audit (at least 8 hex digits). "
            "The ledger must still contain it."
        ),
    ] = None,
    reselect: Annotated[
        bool, typer.Option("--reselect", help="Repeat every selection from the scores and compare.")
    ] = False,
    rescore: Annotated[
        int | None,
        typer.Option(
            help="Score this many random sequences of every shard again and compare. Loads models."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write the result to this HTML file.")
    ] = None,
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Verify the home against the ledger, from datasets and models back to the raw files.

    Reads every byte of the audited artifacts and of everything they were built from. Prints one
    line per problem: asset, where, what was expected, what was found. Exit codes: 0 no problems
    (warnings are allowed), 1 problems found, 2 invalid input.
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
