"""The recipe and the home, read from environment variables that the command line sets."""

import enum
import os
from pathlib import Path

from colorfilter.config.load import load
from colorfilter.config.recipe import Recipe
from colorfilter.errors import InputError

RECIPES = Path(__file__).resolve().parent / "recipes"
RECIPE_VARIABLE = "COLORFILTER_RECIPE"
HOME_VARIABLE = "COLORFILTER_HOME"
DEFAULT_RECIPE = "sample"
DEFAULT_HOME = ".colorfilter"


class Job(enum.StrEnum):
    """Names of the jobs; see `pipelines.jobs` for what each does."""

    EVERYTHING = "everything"
    REFRESH = "refresh"
    RESCORE = "rescore"
    RESELECT = "reselect"
    RETRAIN = "retrain"
    EVALUATE = "evaluate"


def recipe() -> Recipe:
    """Load the recipe that COLORFILTER_RECIPE sets: the name of a shipped one, or a file's path.

    Raises InputError if there is no such recipe or it is invalid.
    """
    return load(recipe_path(os.environ.get(RECIPE_VARIABLE, DEFAULT_RECIPE)))


def recipe_path(name: str) -> Path:
    """Return the path of a shipped recipe, given by name, or of a YAML file, given by path.

    Raises InputError if no shipped recipe has the name.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        return path
    shipped = {p.stem: p for p in RECIPES.glob("*.yaml")}
    if name not in shipped:
        raise InputError(
            f"no recipe named '{name}': give one of {', '.join(sorted(shipped))}, or the path to "
            "a .yaml file"
        )
    return shipped[name]


def home() -> Path:
    """Return the absolute path of the home that COLORFILTER_HOME sets."""
    return Path(os.environ.get(HOME_VARIABLE, DEFAULT_HOME)).resolve()
