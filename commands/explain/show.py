"""Print what commands.explain.documents finds, as text."""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape
from rich.console import Console

from assets.scores.scores import all_refined, overlays
from colorfilter.selection.score_tables import EXCLUDED
from colorfilter.stages import ShardKind
from commands.explain.decisions import Facts, Records
from commands.explain.documents import explain
from resources.artifacts import ArtifactStore
from resources.home import Home
from resources.lineage import Lineage
from resources.score_store import ScoreStore

ROWS = 20  # sequences of a document, or differing inputs, to print at most


def look_up(place: Home, what: str) -> Facts:
    """Return the JSON object that explains a document, a sequence or a dataset.

    Raises InputError if `what` names nothing in the home.
    """
    artifacts = ArtifactStore(home=str(place.root))
    with ScoreStore(home=str(place.root)).read(overlays(all_refined(artifacts))) as connection:
        return explain(Records(artifacts, Lineage(artifacts), connection), what)


def show(console: Console, found: Facts) -> None:
    """Print the facts in human-readable form, with the template explain.txt."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        line_statement_prefix="%",
        line_comment_prefix="##",
        autoescape=select_autoescape(),  # not a .txt
    )
    environment.filters |= {
        "f": lambda value, sign="": "-" if value is None else f"{value:{sign}.4f}",
        "kind": ShardKind.of,
        "n": "{:,}".format,
        "quoted": lambda t: (
            "text not available" if t is None else json.dumps(t, ensure_ascii=False)
        ),
        "short": lambda fingerprint: fingerprint and fingerprint[:8],
        "table": _table,
    }
    template = environment.get_template("explain.txt")
    text = template.render(found=found, excluded=EXCLUDED, rows=ROWS).strip("\n")
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _table(text: str) -> str:
    """Align lines of cells separated by `|` in columns. The first line is the header."""
    rows = [line.split("|") for line in text.splitlines()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["─" * width for width in widths])
    aligned = ("   ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n" + "\n".join(f" {line.rstrip()}" for line in aligned) + "\n\n"
