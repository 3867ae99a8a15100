"""What the commands share: options, the terminal, and how a recipe and a home are opened."""

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

# Into a file or a pipe, where a terminal's width says nothing, names are not cut.
console = Console(width=None if sys.stdout.isatty() else 160)
errors = Console(stderr=True)

RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        envvar=settings.RECIPE_VARIABLE,
        help="A shipped recipe by name, or the path of a .yaml file.",
    ),
]
HomeOption = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar=settings.HOME_VARIABLE,
        help="The folder for everything that is produced; it belongs to one recipe.",
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks of failures.")]


def open_home(recipe: str, home: Path) -> tuple["Recipe", "Home"]:
    """Load the recipe, claim the home, and set the environment for Dagster's processes."""
    from resources.home import Home

    plan = load_recipe(recipe)
    place = Home(home).claim(plan.name)
    os.environ[settings.HOME_VARIABLE] = str(place.root)
    os.environ["DAGSTER_HOME"] = str(place.dagster)
    return plan, place


def load_recipe(recipe: str) -> "Recipe":
    """Load the recipe, and name it in the environment for Dagster's processes."""
    path = settings.recipe_path(recipe).resolve()
    os.environ[settings.RECIPE_VARIABLE] = str(path)
    return settings.recipe()


def artifacts_of(place: "Home") -> "ArtifactStore":
    """The artifacts of a home."""
    from resources.artifacts import ArtifactStore

    return ArtifactStore(home=str(place.root))


def say_what_arrived(found: "Arrivals") -> None:
    """Print which shards are new or retired, and which files are gone."""
    if found.waiting:
        console.print(
            "[yellow]noted [/] the sources have changed; that is planned when the run at work ends",
            highlight=False,
        )
    if found.new or found.retired:
        retired = f", {len(found.retired)} retired" if found.retired else ""
        console.print(f"{len(found.new)} new shards{retired}", highlight=False)
    for files, what in (
        (found.vanished, "have vanished from their source; their text is kept"),
        (found.lost, "are gone, and their text leaves the corpus with them"),
    ):
        if files:
            console.print(
                f"[yellow]noted [/] {len(files)} files {what}; the first: {escape(files[0])}",
                highlight=False,
                soft_wrap=True,
            )
