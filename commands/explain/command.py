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
    what: Annotated[str, typer.Argument(help="DOC_ID, SHARD:POSITION, FILE:LINE or DOMAIN/ARM.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all facts as one JSON object.")
    ] = False,
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Say why a document or sequence was selected or not, or what changed in a dataset.

    Of a document (the first digits of its doc_id, or the line of the file it was read from) or a
    sequence: where it came from, its losses and by which models, what each arm did with it, and
    which target models trained on it. Of a dataset: what entered and left since its last version,
    and why. Writes nothing.
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
