"""What `colorfilter explain` says: the facts of assets.explained, as text or as one JSON object."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape
from rich.console import Console

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
        "f": lambda value, sign="": "-" if value is None else f"{value:{sign}.4f}",
        "n": "{:,}".format,
        "quoted": lambda t: "its text is gone" if t is None else json.dumps(t, ensure_ascii=False),
        "short": lambda fingerprint: fingerprint and fingerprint[:8],
        "table": _table,
        "trained": _trained,
        "version": _version,
    }
    template = environment.get_template("explain.txt")
    text = template.render(found=found, excluded=EXCLUDED, rows=ROWS).strip("\n")
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _table(text: str) -> str:
    """Lines of cells between bars, the first of them the head, in columns."""
    rows = [line.split("|") for line in text.splitlines()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["─" * width for width in widths])
    aligned = ("   ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n" + "\n".join(f" {line.rstrip()}" for line in aligned) + "\n\n"


def _trained(datasets: Sequence[Facts]) -> list[tuple[tuple[int, int], int]]:
    """How many sequences were trained on, by a target model's seed and tokens."""
    counts: Counter[tuple[int, int]] = Counter()
    for model in (model for dataset in datasets for model in dataset["trained"]):
        for tokens, reached in model["reached"].items():
            counts[model["seed"], tokens] += reached
    return list(counts.items())


def _version(made: Facts) -> str:
    """The name of a selection and, of an older version, when it was made."""
    older = "" if made["current"] else f" of {made['created']}"
    return f"{made['domain']}/{made['arm']}{older}"
