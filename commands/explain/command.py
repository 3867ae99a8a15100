"""The command `colorfilter explain`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from commands.options import (
    HomeOption,
    RecipeOption,
    console,
    load_recipe,
)
from pipelines import settings


def explain(
    what: Annotated[
        str,
        typer.Argument(
            help="A document: its doc_id (at least 6 digits) or FILE:LINE of its source. A "
            "sequence: SHARD:POSITION. A dataset: DOMAIN/ARM."
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as one JSON object.")
    ] = False,
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Explain why a document or sequence was selected or not, or what changed in a dataset.

    For a document or sequence: the source file, its losses and the models they were computed with,
    the decision of every arm, and the target models trained on it. For a dataset: what entered and
    left since its previous version, and why. Writes nothing.
    """
    from commands.explain.show import look_up, show
    from resources.home import Home

    place = Home(home)
    place.check(load_recipe(recipe).name)
    found = look_up(place, what)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        show(console, found)
