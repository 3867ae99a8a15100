"""A filtered dataset against its last version: what entered, what left, and why.

The versions are those that the ledger has. Where the folder of one is gone, its selection is read
from the score tables, and what was left out of it for leaking is not known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from assets.datasets import Records, leakage_of
from assets.standing import method_of, packed_for
from colorfilter.errors import InputError
from colorfilter.provenance import stands
from colorfilter.score_tables import EXCLUDED
from colorfilter.tables import fetch, fetch_frame
from resources.ledger import Entry

EXAMPLES = 5
PLACE = ["shard", "position"]
OWN = pl.col("shard").str.starts_with("_")  # sequences that a selection packs for itself
# Assets that follow from other inputs of a dataset, and differ whenever those do.
FOLLOWING = (
    *("raw_corpus", "prior_scores", "conditional_scores", "domain_only_scores"),
    *("score_tables", "domain_tokens", "selection", "leakage", "filtered_dataset"),
)
# Methods that select a share of the candidates: what training needs does not change it.
BY_SHARE = ("color", "conditional_only", "full")


@dataclass(frozen=True)
class DatasetVersion:
    """A version of a dataset: what it is made of. `cutoff` is the score at the selection's end."""

    name: str
    fingerprint: str
    path: str
    recorded: str
    stands: bool
    sequences: int
    tokens: int
    left_out: int
    selection: str
    selected: int | None
    candidates: int | None
    cutoff: float | None
    shards: int
    models: dict[str, str]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Change:
    """So many sequences that entered or left for one reason."""

    why: str
    sequences: int


@dataclass(frozen=True)
class Example:
    """A sequence that entered or left."""

    shard: str
    position: int
    score: float
    source_file: str | None
    why: str


@dataclass(frozen=True)
class Difference:
    """An input or a value of the recipe that the two versions do not share."""

    name: str
    was: Any
    now: Any


@dataclass(frozen=True)
class DatasetExplanation:
    """The current version of a dataset and, where there is one, how it differs from the last.

    `last` is of the same arm or, for an arm's first, the latest by its method at another tau.
    """

    versions: list[str]
    now: DatasetVersion
    last: DatasetVersion | None
    inputs: list[Difference]
    recipe: list[Difference]
    both: int
    entering: list[Change]
    leaving: list[Change]
    examples_entering: list[Example]
    examples_leaving: list[Example]


@dataclass(frozen=True)
class _Made:
    """A dataset's entry with those that it was made from."""

    name: str
    entry: Entry
    selection: Entry | None

    @property
    def choice(self) -> dict[str, Any]:
        """The recipe that decided it."""
        chosen = dict(self.selection["recipe"]) if self.selection else {}
        if self.selection and self.selection.get("seed") is not None:
            chosen["seed"] = self.selection["seed"]
        return {**chosen, **self.entry["recipe"]}

    @property
    def method(self) -> str:
        return method_of(self.name.rpartition("/")[2], self.choice)


def explain_dataset(records: Records, name: str) -> DatasetExplanation:
    """A dataset `<domain>/<arm>` against its last version. Raises InputError where none is made."""
    there = records.lineage.versions(f"{name}/filtered_dataset")
    current = records.artifacts.entries().get((f"{name}/filtered_dataset", None))
    if current is None:
        known = sorted(
            asset.removesuffix("/filtered_dataset")
            for asset, _ in records.artifacts.entries()
            if asset.endswith("/filtered_dataset")
        )
        raise InputError(
            f"{name}: no filtered dataset of that name is in the ledger; give one of "
            f"{', '.join(known) or 'those that `colorfilter run` will make'}"
        )
    now = _made(records, name, current)
    last = _last(records, now, there)
    versions = [str(entry["recorded"]) for entry in there]
    if last is None:
        nothing: list[Any] = []
        return DatasetExplanation(
            versions, _version(records, now), None, [], [], 0, *([nothing] * 4)
        )
    inputs = _differences(_made_from(records, last), _made_from(records, now))
    recipe = _differences(last.choice, now.choice)
    before, after = _members(records, last), _members(records, now)
    entering, leaving, both = _in_and_out(records, last, now, before, after)
    causes = _causes(inputs, recipe, now)
    entering = _why(entering, "entering", records, last, now, causes)
    leaving = _why(leaving, "leaving", records, last, now, causes)
    return DatasetExplanation(
        versions,
        _version(records, now),
        _version(records, last),
        inputs,
        recipe,
        both,
        _counts(entering),
        _counts(leaving),
        _examples(records, entering),
        _examples(records, leaving),
    )


def _made(records: Records, name: str, entry: Entry) -> _Made:
    return _Made(name, entry, records.lineage.as_of(entry, f"{name}/selection"))


def _last(records: Records, now: _Made, there: list[Entry]) -> _Made | None:
    """The version before, or of an arm that has none the latest by its method in the domain."""
    older = [e for e in there if e["fingerprint"] != now.entry["fingerprint"]]
    if older:
        return _made(records, now.name, older[-1])
    domain = now.name.rpartition("/")[0]
    assets = {
        asset
        for asset, _ in records.artifacts.entries()
        if asset.startswith(f"{domain}/") and asset.endswith("/filtered_dataset")
    }
    others = [
        _made(records, asset.removesuffix("/filtered_dataset"), entry)
        for asset in sorted(assets - {f"{now.name}/filtered_dataset"})
        for entry in records.lineage.versions(asset)
        if str(entry["recorded"]) <= str(now.entry["recorded"])
    ]
    alike = [other for other in others if other.method == now.method and "tau" in now.choice]
    return max(alike, key=lambda o: str(o.entry["recorded"]), default=None) if alike else None


def _version(records: Records, made: _Made) -> DatasetVersion:
    facts = made.entry["facts"]
    chosen = made.selection["facts"] if made.selection else {}
    folder = records.folder(made.entry)
    models = {k: v for k, v in _made_from(records, made).items() if k.endswith("_model")}
    return DatasetVersion(
        made.name,
        made.entry["fingerprint"],
        str(folder),
        str(made.entry["recorded"]),
        stands(folder),
        facts["sequences"],
        facts["tokens"],
        facts.get("left_out", 0),
        str(made.entry["inputs"].get(f"{made.name}/selection")),
        chosen.get("selected"),
        chosen.get("candidates"),
        chosen.get("cutoff"),
        len(packed_for(records, made.selection)),
        models,
        made.choice,
    )


def _made_from(records: Records, made: _Made) -> dict[str, str]:
    """What decided a dataset, by name: shards, models, refined scores, the domain's text.

    Not what follows from those, such as losses, which differ whenever a model does.
    """
    entries = [made.selection, records.lineage.as_of(made.entry, f"{made.name}/leakage")]
    named: dict[str, str] = {}
    for entry in entries:
        if entry:
            named |= {**entry.get("sources", {}), **entry["inputs"]}
    tables = records.one("score_tables", named.get("score_tables"))
    named = {**(tables["inputs"] if tables else {}), **named}
    domain = made.name.rpartition("/")[0]
    return {name: made_of for name, made_of in named.items() if _decides(name, domain)}


def _decides(name: str, domain: str) -> bool:
    """Whether what goes by this name is no result of other inputs of a dataset of a domain."""
    asset = name.partition("[")[0]
    of, _, last = asset.rpartition("/")
    return of in {"", domain} and "[_" not in name and last not in FOLLOWING


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    return [
        Difference(name, was.get(name), now.get(name))
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]


def _causes(inputs: list[Difference], recipe: list[Difference], now: _Made) -> list[str]:
    """What can have changed the decision about a sequence that both versions were made over."""
    words = []
    for difference in inputs:
        part = difference.name.rpartition("/")[2]
        if part.endswith("_model"):
            words.append(f"another {part.removesuffix('_model').replace('_', ' ')}")
        elif part == "refined_scores":
            words.append("refined scores")
    for difference in recipe:
        decides = difference.name in {"method", "tau", "batch", "seed", "needed"}
        if decides and not (difference.name == "needed" and now.method in BY_SHARE):
            words.append(f"{difference.name} {difference.was} -> {difference.now}")
    if any("[" in d.name for d in inputs):
        words.append("other candidates beside it")
    return words


def _members(records: Records, made: _Made) -> pl.DataFrame:
    """What a dataset holds, or where its folder is gone what was selected: places and scores."""
    folder = records.folder(made.entry)
    if stands(folder):
        table = pl.read_parquet(folder / "tokens" / "sequences.parquet")
        return table.select(*PLACE, "score")
    chosen = _selected(records, made)
    leaks = leakage_of(records, made.name, made.entry)
    if leaks is None or chosen.is_empty():
        return chosen
    return chosen.join(_leaking(leaks), on=PLACE, how="anti")


def _leaking(leaks: pl.DataFrame) -> pl.DataFrame:
    return leaks.select("shard", position="positions").explode("position").unique()


def _selected(records: Records, made: _Made) -> pl.DataFrame:
    """All that a dataset's selection chose, leaks and all, from the tables or its own folder."""
    if made.selection and stands(records.folder(made.selection)):
        table = pl.read_parquet(records.folder(made.selection) / "selection.parquet")
        return table.select(*PLACE, "score")
    return fetch_frame(
        records.connection,
        "SELECT shard, position, score FROM selected.selections WHERE selection = $selection",
        {"selection": made.entry["inputs"].get(f"{made.name}/selection")},
    )


def _in_and_out(
    records: Records, last: _Made, now: _Made, before: pl.DataFrame, after: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame, int]:
    """Sequences that entered, that left, and the number of those that stayed.

    A place in a shard that has been packed anew since is another sequence, and so is one among
    those that a selection packs for itself.
    """
    was, is_ = packed_for(records, last.selection), packed_for(records, now.selection)
    anew = [shard for shard, made in was.items() if is_.get(shard, made) != made]
    other = pl.col("shard").is_in(anew) | OWN
    same = before.filter(~other)
    entering = after.join(same, on=PLACE, how="anti")
    leaving = before.join(after.filter(~other), on=PLACE, how="anti")
    return entering, leaving, len(after) - len(entering)


def _why(
    moved: pl.DataFrame,
    way: str,
    records: Records,
    last: _Made,
    now: _Made,
    causes: list[str],
) -> pl.DataFrame:
    """`moved` with the reason, column `why`, that each sequence enters or leaves for."""
    was, is_ = packed_for(records, last.selection), packed_for(records, now.selection)
    here, there = (is_, was) if way == "entering" else (was, is_)
    other = last if way == "entering" else now
    gone = [s for s in here if s not in there]
    anew = [s for s in here if s in there and here[s] != there[s]]
    data = "new data" if way == "entering" else "retired data"
    leak = "no longer found to leak" if way == "entering" else "found to quote held-out text"
    # Selected in both, and left out of one: the leaks differ.
    kept_apart = _selected(records, other).select(PLACE).with_columns(leaked=pl.lit(True))
    excluded = _excluded(records, now)
    excluded = excluded if way == "leaving" else excluded.clear()
    because = ", ".join(causes) or "no cause on record"
    return (
        moved.join(kept_apart, on=PLACE, how="left", maintain_order="left")
        .join(excluded, on=PLACE, how="left", maintain_order="left")
        .with_columns(
            why=pl.when(pl.col("shard").is_in(gone))
            .then(pl.lit(data))
            .when(pl.col("shard").is_in(anew))
            .then(pl.lit("its shard was packed anew"))
            .when(OWN)
            .then(pl.lit("documents were drawn and packed anew"))
            .when(pl.col("leaked") & pl.col("excluded").is_null())
            .then(pl.lit(leak))
            .otherwise(pl.coalesce("excluded", pl.lit(because)))
        )
        .drop("leaked", "excluded")
    )


def _excluded(records: Records, now: _Made) -> pl.DataFrame:
    """What can no longer be selected and why, as far as the tables are those that `now` is of."""
    places = fetch_frame(records.connection, "SELECT shard, position, reason FROM excluded", {})
    places = places.select(*PLACE, excluded=pl.col("reason").replace_strict(EXCLUDED))
    tables = records.artifacts.entries().get(("score_tables", None))
    made_of = _tables_of(now.selection)
    return places if tables and tables["fingerprint"] == made_of else places.clear()


def _tables_of(selection: Entry | None) -> str | None:
    """The fingerprint of the score tables that a selection was made by."""
    if selection is None:
        return None
    return {**selection.get("sources", {}), **selection["inputs"]}.get("score_tables")


def _counts(moved: pl.DataFrame) -> list[Change]:
    counts = moved.group_by("why").len().sort("len", "why", descending=[True, False])
    return [Change(*row) for row in counts.iter_rows()]


def _examples(records: Records, moved: pl.DataFrame) -> list[Example]:
    """The few of lowest score, each with the file that it begins in."""
    best = moved.sort("score", *PLACE).head(EXAMPLES)
    return [
        Example(row["shard"], row["position"], row["score"], _file(records, row), row["why"])
        for row in best.to_dicts()
    ]


def _file(records: Records, place: Mapping[str, Any]) -> str | None:
    """The file that a sequence begins in, where its shard is in the tables."""
    rows = fetch(
        records.connection,
        """
        SELECT source_file FROM spans JOIN documents USING (shard, doc_id)
        WHERE shard = ? AND position = ? ORDER BY "offset" LIMIT 1
        """,
        [place["shard"], place["position"]],
    )
    return rows[0][0] if rows else None
