"""The command `colorfilter prune`."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from colorfilter.errors import InputError
from commands.options import (
    HomeOption,
    RecipeOption,
    artifacts_of,
    console,
    open_home,
    say_what_arrived,
)
from pipelines import settings


def prune(
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
    vanished: Annotated[
        bool,
        typer.Option(
            "--vanished",
            help="Also remove the text of files that have disappeared from their source.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Free disk space: remove older versions, retired shards and unfinished work from the home.

    Lists what would be removed and its size, and asks for confirmation. Current artifacts and
    everything they were built from are kept. The ledger keeps its entries for removed artifacts.
    """
    from assets.common import shard_names
    from pipelines.graph import gpu_of
    from pipelines.run import bring_in
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
    table = Table("asset", "reason", "folders", "MB", box=box.SIMPLE)
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
