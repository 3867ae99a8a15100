"""Which recipe and which home: from the environment, which the command line sets."""

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
    """The jobs by name; `pipelines.jobs` says what each does."""

    EVERYTHING = "everything"
    REFRESH = "refresh"
    RESCORE = "rescore"
    RESELECT = "reselect"
    RETRAIN = "retrain"
    EVALUATE = "evaluate"


def recipe() -> Recipe:
    """The recipe that COLORFILTER_RECIPE names: a shipped one by name, or a file by path.

    Raises InputError.
    """
    return load(recipe_path(os.environ.get(RECIPE_VARIABLE, DEFAULT_RECIPE)))


def recipe_path(name: str) -> Path:
    """The file of a recipe, shipped (by name) or given (by path). Raises InputError."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        return path
    shipped = {p.stem: p for p in RECIPES.glob("*.yaml")}
    if name not in shipped:
        raise InputError(
            f"no recipe named '{name}': give one of {', '.join(sorted(shipped))}, or the path of "
            "a .yaml file"
        )
    return shipped[name]


def home() -> Path:
    """The home that COLORFILTER_HOME names."""
    return Path(os.environ.get(HOME_VARIABLE, DEFAULT_HOME)).resolve()
