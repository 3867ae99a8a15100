"""What `colorfilter explain` says: the facts of assets.explained, as text or as one JSON object."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from assets.explained import explain
from assets.scores import all_refined, overlays
from assets.standing import Facts, Records
from colorfilter.score_tables import EXCLUDED
from resources.artifacts import ArtifactStore
from resources.home import Home
from resources.lineage import Lineage
from resources.score_store import ScoreStore

ROWS = 20  # sequences of a document, or differing inputs, that are shown


def look_up(place: Home, what: str) -> Facts:
    """What a home has on record of a document, a sequence or a dataset. Raises InputError."""
    artifacts = ArtifactStore(home=str(place.root))
    with ScoreStore(home=str(place.root)).read(overlays(all_refined(artifacts))) as connection:
        return explain(Records(artifacts, Lineage(artifacts), connection), what)


def as_json(found: Facts) -> str:
    """All the facts as one JSON object."""
    return json.dumps(found, indent=1, ensure_ascii=False)


def show(console: Console, found: Facts) -> None:
    """Print the facts for a person to read, by the template explain.txt."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        line_statement_prefix="%",
        line_comment_prefix="##",
        autoescape=select_autoescape(),  # not a .txt
    )
    environment.filters |= {
        "f": _float,
        "n": "{:,}".format,
        "quoted": _quoted,
        "short": lambda fingerprint: fingerprint and fingerprint[:8],
        "table": lambda text: _table(text, console.width),
        "trained": _trained,
        "version": _version,
    }
    template = environment.get_template("explain.txt")
    text = template.render(found=found, excluded=EXCLUDED, rows=ROWS).strip("\n")
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _float(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def _quoted(text: str | None) -> str:
    return "its text is gone" if text is None else json.dumps(text, ensure_ascii=False)


def _table(text: str, width: int) -> str:
    """Lines of cells between bars, the first of them the head, as a table."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    head, *rows = (line.split("|") for line in text.splitlines())
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    written = io.StringIO()
    Console(file=written, width=width).print(table)
    return written.getvalue()


def _trained(datasets: Sequence[Facts]) -> list[tuple[tuple[int, int], int]]:
    """How many sequences were trained on, by a target model's seed and tokens."""
    counts: Counter[tuple[int, int]] = Counter()
    for model in (model for dataset in datasets for model in dataset["trained"]):
        for tokens, reached in model["reached"].items():
            counts[model["seed"], tokens] += reached
    return list(counts.items())


def _version(selection: Facts) -> str:
    """A selection's domain and arm and, for an older version, when it was made."""
    older = "" if selection["current"] else f" of {selection['created']}"
    return f"{selection['domain']}/{selection['arm']}{older}"
