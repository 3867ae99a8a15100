"""A filtered dataset against its last version: what entered, what left, and why.

The versions are those in the ledger. Where the folder of one is gone, its selection is read from
the score tables, and the sequences left out of it for leaking are not known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from assets.standing import PLACE, Facts, Records, Selection, leakage_of
from colorfilter.errors import InputError
from colorfilter.provenance import stands
from colorfilter.score_tables import EXCLUDED
from colorfilter.tables import fetch_frame
from resources.ledger import Entry

EXAMPLES = 5
SCORES = "shard, position, score"
# Assets that follow from other inputs of a dataset, and differ whenever those do.
FOLLOWING = (
    *("raw_corpus", "prior_scores", "conditional_scores", "domain_only_scores"),
    *("score_tables", "domain_tokens", "selection", "leakage", "filtered_dataset"),
)
# Methods that select a share of the candidates: what training needs does not change it.
BY_SHARE = ("color", "conditional_only", "full")

# Sequences of a version (`members`) that another one (`others`) does not hold, with the reason.
# Sequences of a shard that was packed anew are others at the same places, and so are those that a
# selection packs for itself. What the other selection chose was left out of its dataset for a leak.
MOVED = """
    WITH same AS (
        FROM others
        WHERE shard NOT IN (SELECT unnest($anew::VARCHAR[])) AND NOT starts_with(shard, '_')
    )
    SELECT moved.*, CASE
        WHEN shard IN (SELECT unnest($apart::VARCHAR[]))
            THEN if($leaving, 'retired data', 'new data')
        WHEN shard IN (SELECT unnest($anew::VARCHAR[])) THEN 'its shard was packed anew'
        WHEN starts_with(shard, '_') THEN 'documents were drawn and packed anew'
        WHEN chosen.shard IS NOT NULL AND reason IS NULL
            THEN if($leaving, 'found to quote held-out text', 'no longer found to leak')
        ELSE coalesce(reason, $causes) END AS why
    FROM (FROM members ANTI JOIN same USING (shard, position)) AS moved
    LEFT JOIN chosen USING (shard, position)
    LEFT JOIN (FROM excluded WHERE $leaving AND $same_tables) USING (shard, position)
"""
FILE = """
    SELECT arg_min(source_file, "offset") AS source_file
    FROM spans JOIN documents USING (shard, doc_id) WHERE shard = $shard AND position = $position
"""


@dataclass(frozen=True)
class Version:
    """A version of a filtered dataset, by its entry in the ledger."""

    records: Records
    name: str
    entry: Entry

    @cached_property
    def selection(self) -> Selection:
        made = self.records.lineage.as_of(self.entry, f"{self.name}/selection")
        return Selection(self.records, self.name, made)

    @property
    def recipe(self) -> Facts:
        """The recipe that decided it."""
        seed = self.selection.entry.get("seed") if self.selection.entry else None
        drawn = {} if seed is None else {"seed": seed}
        return {**self.selection.recipe, **drawn, **self.entry["recipe"]}

    @cached_property
    def inputs(self) -> dict[str, str]:
        """What decided it, by name: shards, models, refined scores, the domain's text.

        Without what follows from those, such as losses, which differ whenever a model does.
        """
        named: dict[str, str] = {}
        leakage = self.records.lineage.as_of(self.entry, f"{self.name}/leakage")
        for entry in filter(None, (self.selection.tables, self.selection.entry, leakage)):
            named |= {**entry.get("sources", {}), **entry["inputs"]}
        found = {}
        for name, fingerprint in named.items():
            domain, _, asset = name.partition("[")[0].rpartition("/")
            ours = domain in {"", self.name.rpartition("/")[0]} and "[_" not in name
            if ours and asset not in FOLLOWING:
                found[name] = fingerprint
        return found

    def facts(self) -> Facts:
        """What it is made of. `cutoff` is the score at the end of the selection."""
        folder, facts = self.records.folder(self.entry), self.entry["facts"]
        chosen = self.selection.entry["facts"] if self.selection.entry else {}
        return {
            "name": self.name,
            "fingerprint": self.entry["fingerprint"],
            "path": str(folder),
            "recorded": self.entry["recorded"],
            "stands": stands(folder),
            "sequences": facts["sequences"],
            "tokens": facts["tokens"],
            "left_out": facts.get("left_out", 0),
            "selection": str(self.entry["inputs"].get(f"{self.name}/selection")),
            **{name: chosen.get(name) for name in ("selected", "candidates", "cutoff")},
            "shards": len(self.selection.packed),
            "models": {k: v for k, v in self.inputs.items() if k.endswith("_model")},
            "recipe": self.recipe,
        }

    @cached_property
    def chosen(self) -> pl.DataFrame:
        """Places and scores of all that its selection chose, leaks too."""
        made = self.selection.entry
        if made and stands(self.records.folder(made)):
            return self.records.read(made, "selection.parquet", SCORES)
        query = f"SELECT {SCORES} FROM selected.selections WHERE selection = $made"
        fingerprint = self.entry["inputs"].get(f"{self.name}/selection")
        return fetch_frame(self.records.connection, query, {"made": fingerprint})

    @cached_property
    def members(self) -> pl.DataFrame:
        """Places and scores of what it holds or, where its folder is gone, was to hold."""
        if stands(self.records.folder(self.entry)):
            return self.records.read(self.entry, "tokens/sequences.parquet", SCORES)
        leaks = leakage_of(self.records, self.name, self.entry)
        if leaks is None:
            return self.chosen
        return self.chosen.join(leaks, on=PLACE, how="anti")


def explain_dataset(records: Records, name: str) -> Facts:
    """Facts of a dataset `<domain>/<arm>`, and how it differs from its last version.

    `last` is of the same arm or, for an arm's first, the latest by its method at another tau.
    Raises InputError where no dataset has that name.
    """
    current = records.current(f"{name}/filtered_dataset")
    if current is None:
        known = ", ".join(_names(records)) or "those that `colorfilter run` will make"
        raise InputError(
            f"{name}: no filtered dataset of that name is in the ledger; give one of {known}"
        )
    now = Version(records, name, current)
    last = _last(now)
    versions = [made["recorded"] for made in records.lineage.versions(f"{name}/filtered_dataset")]
    lists = ("inputs", "recipe", "entering", "leaving", "examples_entering", "examples_leaving")
    found = {"versions": versions, "now": now.facts(), "last": None, **{n: [] for n in lists}}
    return {**found, "both": 0, **(_changes(last, now) if last else {})}


def _changes(last: Version, now: Version) -> Facts:
    """How a dataset differs from its last version."""
    inputs, recipe = _differences(last.inputs, now.inputs), _differences(last.recipe, now.recipe)
    found: Facts = {"last": last.facts(), "inputs": inputs, "recipe": recipe}
    causes = _causes(inputs, recipe, now.selection.method)
    for way, version, other in (("entering", now, last), ("leaving", last, now)):
        moved = _moved(version, other, way == "leaving", causes)
        counts = moved.group_by("why").agg(sequences=pl.len())
        found[way] = counts.sort("sequences", "why", descending=[True, False]).to_dicts()
        best = moved.sort("score", *PLACE).head(EXAMPLES).to_dicts()
        files = [now.records.rows(FILE, **{n: e[n] for n in PLACE})[0] for e in best]
        found[f"examples_{way}"] = [e | file for e, file in zip(best, files, strict=True)]
        found["both"] = len(version.members) - len(moved)
    return found


def _names(records: Records) -> list[str]:
    """All datasets in the ledger, as `<domain>/<arm>`."""
    last = "/filtered_dataset"
    assets = (asset for asset, _ in records.artifacts.entries())
    return sorted(asset.removesuffix(last) for asset in assets if asset.endswith(last))


def _last(now: Version) -> Version | None:
    """The version before or, for an arm's first, the latest by its method in the domain."""
    versions, name = now.records.lineage.versions, f"{now.name}/filtered_dataset"
    older = [e for e in versions(name) if e["fingerprint"] != now.entry["fingerprint"]]
    if older:
        return Version(now.records, now.name, older[-1])
    if "tau" not in now.recipe:
        return None
    domain = now.name.rpartition("/")[0]
    others = [
        Version(now.records, name, entry)
        for name in _names(now.records)
        if name.startswith(f"{domain}/") and name != now.name
        for entry in versions(f"{name}/filtered_dataset")
        if entry["recorded"] <= now.entry["recorded"]
    ]
    alike = (other for other in others if other.selection.method == now.selection.method)
    return max(alike, key=lambda o: str(o.entry["recorded"]), default=None)


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Facts]:
    return [
        {"name": name, "was": was.get(name), "now": now.get(name)}
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]


def _causes(inputs: list[Facts], recipe: list[Facts], method: str) -> str:
    """What can have changed the decision about a sequence that both versions were made over."""
    words = []
    for part in (difference["name"].rpartition("/")[2] for difference in inputs):
        if part.endswith("_model"):
            words.append(f"another {part.removesuffix('_model').replace('_', ' ')}")
        elif part == "refined_scores":
            words.append("refined scores")
    decisive = {"method", "tau", "batch", "seed"} | (set() if method in BY_SHARE else {"needed"})
    words += [f"{d['name']} {d['was']} -> {d['now']}" for d in recipe if d["name"] in decisive]
    if any("[" in difference["name"] for difference in inputs):
        words.append("other candidates beside it")
    return ", ".join(words) or "no cause on record"


def _moved(version: Version, other: Version, leaving: bool, causes: str) -> pl.DataFrame:
    """The sequences of a version that another one does not hold: place, score and why."""
    records, packed, there = version.records, version.selection.packed, other.selection.packed
    frames = {"members": version.members, "others": other.members, "chosen": other.chosen}
    for name, frame in frames.items():
        records.connection.register(name, frame.to_arrow())
    # The table `excluded` is of the score tables: it explains what left if they are the same.
    tables, made_by = records.current("score_tables"), other.selection.tables
    wanted = {
        "causes": causes,
        "leaving": leaving,
        "same_tables": bool(tables and made_by and tables["fingerprint"] == made_by["fingerprint"]),
        "apart": [shard for shard in packed if shard not in there],
        "anew": [shard for shard in packed if packed[shard] != there.get(shard, packed[shard])],
    }
    moved = fetch_frame(records.connection, MOVED, wanted)
    return moved.with_columns(pl.col("why").replace(EXCLUDED))
