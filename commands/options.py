"""Shared by the commands: options, consoles, and functions that open a recipe and a home."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from pipelines import settings

if TYPE_CHECKING:
    from assets.corpus.sources import Arrivals
    from colorfilter.config.recipe import Recipe
    from resources.artifacts import ArtifactStore
    from resources.home import Home

# Output to a file or pipe has no terminal width; 160 columns keep long names uncut.
console = Console(width=None if sys.stdout.isatty() else 160)
errors = Console(stderr=True)

RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        envvar=settings.RECIPE_VARIABLE,
        help="Name of a recipe that ships with colorfilter, or path of a .yaml file.",
    ),
]
HomeOption = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar=settings.HOME_VARIABLE,
        help="Folder for everything the pipeline writes. Each recipe needs its own.",
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Print tracebacks of failures.")]


def open_home(recipe: str, home: Path) -> tuple["Recipe", "Home"]:
    """Load the recipe, claim the home for it, and set the environment of Dagster's processes."""
    from resources.home import Home

    plan = load_recipe(recipe)
    place = Home(home).claim(plan.name)
    os.environ[settings.HOME_VARIABLE] = str(place.root)
    os.environ["DAGSTER_HOME"] = str(place.dagster)
    return plan, place


def load_recipe(recipe: str) -> "Recipe":
    """Load the recipe, and pass its path to Dagster's processes in the environment."""
    path = settings.recipe_path(recipe).resolve()
    os.environ[settings.RECIPE_VARIABLE] = str(path)
    return settings.recipe()


def artifacts_of(place: "Home") -> "ArtifactStore":
    """Return the artifact store of a home."""
    from resources.artifacts import ArtifactStore

    return ArtifactStore(home=str(place.root))


def say_what_arrived(found: "Arrivals") -> None:
    """Print how many shards are new or retired, and which files have disappeared."""
    if found.waiting:
        console.print(
            "[yellow]noted [/] the sources have changed; new shards are planned once the current "
            "run finishes",
            highlight=False,
        )
    if found.new or found.retired:
        retired = f", {len(found.retired)} retired" if found.retired else ""
        console.print(f"{len(found.new)} new shards{retired}", highlight=False)
    for files, what in (
        (found.vanished, "have disappeared from their source; their text is kept"),
        (found.lost, "have disappeared; their text is removed from the corpus"),
    ):
        if files:
            console.print(
                f"[yellow]noted [/] {len(files)} files {what} (first: {escape(files[0])})",
                highlight=False,
                soft_wrap=True,
            )
