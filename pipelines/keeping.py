"""Commands that keep a home: what it no longer needs, backups, homes made of them."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from colorfilter.errors import InputError
from pipelines import settings
from pipelines.terminal import (
    HomeOption,
    RecipeOption,
    artifacts_of,
    console,
    open_home,
    say_what_arrived,
)

BackupArgument = Annotated[Path, typer.Argument(help="The folder of the backup.")]


def prune(
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
    vanished: Annotated[
        bool,
        typer.Option("--vanished", help="Take text out whose files have vanished from the source."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """Remove what the home no longer needs: older versions, retired shards, unfinished work.

    Says what and how much first, and asks. What is current stays, and all that it was made from.
    The ledger keeps its record of what was.
    """
    from assets.common import shard_names
    from pipelines.graph import gpu_of
    from pipelines.running import bring_in
    from resources.pruning import leftovers

    plan, place = open_home(recipe, home)
    artifacts = artifacts_of(place)
    if vanished:
        arrived = bring_in(plan, place, keep_vanished=False)
        if arrived.waiting:
            raise InputError(f"home {place.root}: a run is at work; wait for it or cancel it")
        say_what_arrived(arrived)
    found = leftovers(artifacts, shard_names(artifacts, plan))
    if not found:
        console.print("nothing to remove")
        return
    table = Table("folder of", "why", "folders", "MB", box=box.SIMPLE)
    for asset, why in dict.fromkeys((left.asset, left.why) for left in found):
        sizes = [left.size for left in found if (left.asset, left.why) == (asset, why)]
        table.add_row(asset, why, str(len(sizes)), f"{sum(sizes) / 1e6:,.1f}")
    console.print(table)
    total = sum(left.size for left in found) / 1e6
    if not yes and not typer.confirm(f"Remove {len(found)} folders, {total:,.1f} MB?"):
        raise typer.Exit(1)
    gpu = gpu_of(plan, str(place.root))
    for left in found:
        gpu.discard_copies(left.path)
        artifacts.discard(left.path)
    console.print(f"removed {len(found)} folders, {total:,.1f} MB")


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
    from pipelines.display import show_progress
    from pipelines.forgetting import forget as take_out
    from pipelines.forgetting import look_up, print_surveys
    from pipelines.graph import gpu_of
    from pipelines.running import execute

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


def backup(
    folder: BackupArgument,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Back up the home into a folder, while the pipeline may be at work.

    Copies what the folder does not have yet; what was copied once stays there. A backup that was
    stopped leaves the last one whole, and the next goes on from there.
    """
    from pipelines.display import show_copying
    from resources.backup import back_up
    from resources.home import Home

    with show_copying(console) as listener:
        done = back_up(Home(home), folder, listener)
    console.print(done.summary, highlight=False)


def restore(
    folder: BackupArgument,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Make a new home of a backup, every file checked against its sha256.

    A damaged backup is refused, and leaves no home.
    """
    from pipelines.display import show_copying
    from resources.backup import restore as bring_back
    from resources.home import Home

    with show_copying(console) as listener:
        done = bring_back(folder, Home(home), listener)
    console.print(done.summary, highlight=False)
