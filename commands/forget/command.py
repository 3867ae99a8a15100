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
        list[str],
        typer.Argument(
            help="One or more documents: a doc_id (at least its first 6 digits), or FILE:LINE."
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Remove documents and all their copies from the home, and never read them again.

    Lists the artifacts that contain them and the models trained on them, and asks for
    confirmation. Then every artifact that contains them is replaced by a version in which their
    text is empty and their tokens are end-of-text tokens. Datasets, reports and unfinished work
    that contain them are deleted; losses are kept. Finally the job `refresh` publishes the scores
    and selects again. Models are not changed; `audit` lists those trained on the documents.
    """
    from commands.display import show_progress
    from commands.forget.forget import forget as take_out
    from commands.forget.forget import look_up, print_surveys
    from pipelines.graph import gpu_of
    from pipelines.run import execute

    plan, place = open_home(recipe, home)
    surveys = look_up(place, documents)
    print_surveys(console, surveys)
    if not yes and not typer.confirm("Forget them? This cannot be undone."):
        raise typer.Exit(1)
    runs = take_out(place, surveys, gpu_of(plan, str(place.root)))
    if runs:
        console.print(f"removed from Dagster's history, as they showed the text: {runs} runs")
    artifacts = artifacts_of(place)
    if ("score_tables", None) in artifacts.entries():
        with show_progress(console) as listener:
            failure = execute(plan, place, listener, settings.Job.REFRESH)
        if failure:
            raise InputError(f"the text is removed, but selecting again failed: {failure.message}")
    for found in surveys:
        for at in sorted(found.document.places):
            console.print(f"still in the source file; remove it there: {at}", soft_wrap=True)
    console.print("still in backups, until the next `colorfilter backup` to each of them")
    console.print(f"ledger    {artifacts.ledger.head()}", highlight=False)
