"""The command `colorfilter forget`."""

from pathlib import Path
from typing import Annotated

import typer

from colorfilter.errors import InputError
from commands.options import (
    HomeOption,
    RecipeOption,
    artifacts_of,
    console,
    open_home,
)
from pipelines import settings


def forget(
    documents: Annotated[
        list[str], typer.Argument(help="DOC_ID (6 digits or more) or FILE:LINE, one or several.")
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Forget without asking.")] = False,
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Take documents out of the home for good, with all their copies, and never read them again.

    Says first what holds them and which models learned from them, and asks. Artifacts that hold
    them are replaced by versions without: texts are empty and tokens are end-of-text tokens.
    Datasets and reports that hold them are removed, and unfinished work but for losses. In the end
    the job `refresh` publishes the scores and selects anew. Models stay as they are, and `audit`
    names those that learned from them.
    """
    from commands.display import show_progress
    from commands.forget.forget import forget as take_out
    from commands.forget.forget import look_up, print_surveys
    from pipelines.graph import gpu_of
    from pipelines.run import execute

    plan, place = open_home(recipe, home)
    surveys = look_up(place, documents)
    print_surveys(console, surveys)
    if not yes and not typer.confirm(f"Forget {len(surveys)} documents? It cannot be undone."):
        raise typer.Exit(1)
    runs = take_out(place, surveys, gpu_of(plan, str(place.root)))
    if runs:
        console.print(f"removed from Dagster's history, where text of them was shown: {runs} runs")
    artifacts = artifacts_of(place)
    if ("score_tables", None) in artifacts.entries():
        with show_progress(console) as listener:
            failure = execute(plan, place, listener, settings.Job.REFRESH)
        if failure:
            raise InputError(f"the text is gone, but nothing was selected anew: {failure.message}")
    for found in surveys:
        for at in sorted(found.document.places):
            console.print(f"still in its source, take it out there: {at}", soft_wrap=True)
    console.print("backups still have it until `colorfilter backup` brings them up to date")
    console.print(f"ledger    {artifacts.ledger.head()}", highlight=False)
