"""Compare a filtered dataset with its previous version: what entered, what left, and why.

Versions are taken from the ledger. If the folder of one is gone, its selection is read from the
score tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from colorfilter.errors import InputError
from colorfilter.selection.score_tables import EXCLUDED
from colorfilter.selection.sql import fetch_frame
from colorfilter.stages import IN_CORPUS, ArtifactName, ShardKind, Stage
from colorfilter.storage.manifest import stands
from commands.explain.decisions import PLACE, UNKNOWN, Facts, Records, leaks_of, method_of
from resources.artifacts import ROWS
from resources.ledger import Entry

EXAMPLES = 5
SCORES = "shard, position, score"
MODELS = {
    Stage.PRIOR_MODEL: "another prior",
    Stage.CONDITIONAL_MODEL: "another conditional",
    Stage.DOMAIN_ONLY_MODEL: "another domain only",
}
CAUSES = {**MODELS, Stage.REFINED_SCORES: "refined scores"}
# Stages that determine a dataset. Its other inputs, such as losses, follow from them.
DECISIVE = {
    *(*CAUSES, Stage.CORPUS_TOKENS, Stage.DOMAIN_TEXT, Stage.FORGOTTEN),
    *(Stage.SAMPLE_PLAN, Stage.TOKENIZER),  # used by dsir and RHO-down
}
# Methods that select a share of the candidates, whatever number of tokens training needs.
BY_SHARE = ("color", "conditional_only", "full")

# Sequences of one version (`members`) that another (`others`) does not have, with the reason. A
# position identifies a sequence only in shards that were packed alike in both (`$same`). A sequence
# that the other selection chose (`chosen`) was excluded from its dataset for a leak.
MOVED = f"""
    SELECT members.*, CASE
        WHEN NOT ({IN_CORPUS}) THEN 'documents were drawn and packed anew'
        WHEN shard NOT IN (SELECT unnest($there::VARCHAR[])) THEN $arrival
        WHEN shard NOT IN (SELECT unnest($same::VARCHAR[])) THEN 'its shard was packed anew'
        WHEN chosen.shard IS NOT NULL AND reason IS NULL THEN $leak
        ELSE coalesce(reason, $causes) END AS why
    FROM members
    ANTI JOIN (FROM others WHERE shard IN (SELECT unnest($same::VARCHAR[]))) AS same
        USING (shard, position)
    LEFT JOIN chosen USING (shard, position)
    LEFT JOIN (FROM excluded WHERE $same_tables) AS excluded USING (shard, position)
"""
FILE = """
    SELECT arg_min(source_file, "offset") AS source_file
    FROM spans JOIN documents USING (shard, doc_id) WHERE shard = $shard AND position = $position
"""


@dataclass(frozen=True)
class Version:
    """A version of a filtered dataset.

    `facts` is what `--json` prints. `inputs` maps names of the deciding inputs to fingerprints,
    `packed` maps shards to fingerprints of packed tokens, `tables` is the fingerprint of the score
    tables. `chosen` are the selected sequences including leaks, `members` those in the dataset
    (reconstructed if its folder is gone).
    """

    facts: Facts
    inputs: dict[str, str]
    packed: dict[str | None, str]
    tables: str | None
    chosen: pl.DataFrame
    members: pl.DataFrame


def explain_dataset(records: Records, name: str) -> Facts:
    """Return the facts of a dataset `<domain>/<arm>`, and how it differs from its last version.

    `last` is the previous version of the arm or, for the first one, the latest dataset of the same
    method in the domain. Raises InputError if no dataset has that name.
    """
    current = records.current(f"{name}/{Stage.FILTERED_DATASET}")
    assets = sorted(asset for asset, _ in records.artifacts.entries())
    datasets = [a for a in assets if ArtifactName.parse(a).stage is Stage.FILTERED_DATASET]
    if current is UNKNOWN:
        known = ", ".join(map(_arm, datasets))
        hint = f"give one of {known}" if known else "there are none yet, use `colorfilter run`"
        raise InputError(f"{name}: no filtered dataset of that name is in the ledger; {hint}")
    now, last = _version(records, current), _last(records, current, datasets)
    versions = [made["recorded"] for made in records.lineage.versions(current["asset"])]
    lists = ("inputs", "recipe", "entering", "leaving", "examples_entering", "examples_leaving")
    found = {"versions": versions, "now": now.facts, "last": None, **{n: [] for n in lists}}
    changes = _changes(records, _version(records, last), now) if last else {}
    return {**found, "both": 0, **changes}


def _arm(dataset: str) -> str:
    """Return the name `<domain>/<arm>` of a dataset's asset."""
    of = ArtifactName.parse(dataset)
    return f"{of.domain}/{of.arm}"


def _made_from(records: Records, dataset: Entry, stage: Stage) -> Entry:
    """Return the entry of the selection or leakage that a dataset was built from."""
    return records.lineage.as_of(dataset, f"{_arm(dataset['asset'])}/{stage}") or UNKNOWN


def _last(records: Records, now: Entry, datasets: Sequence[str]) -> Entry | None:
    """Return the previous version or, for an arm's first, the latest of its method and domain."""
    versions = [e for asset in datasets for e in records.lineage.versions(asset)]
    mine = [e for e in versions if e["asset"] == now["asset"]]
    older = [e for e in mine if e["fingerprint"] != now["fingerprint"]]
    if older:
        return older[-1]

    def kind(dataset: Entry) -> tuple[str | None, str | None]:
        method = method_of(_made_from(records, dataset, Stage.SELECTION))
        return ArtifactName.parse(dataset["asset"]).domain, method

    others = [e for e in versions if e not in mine and e["recorded"] <= now["recorded"]]
    alike = [e for e in others if kind(e) == kind(now)]
    return max(alike, key=lambda e: str(e["recorded"]), default=None)


def _version(records: Records, dataset: Entry) -> Version:
    """Read a version of a dataset, given its entry in the ledger."""
    name, folder, facts = _arm(dataset["asset"]), records.folder(dataset), dataset["facts"]
    selection = _made_from(records, dataset, Stage.SELECTION)
    tables = records.input(selection, Stage.SCORE_TABLES)
    leakage = _made_from(records, dataset, Stage.LEAKAGE)
    made_from = [records.lineage.made_from(made) for made in (tables, selection, leakage)]
    named = {n: made for pairs in made_from for n, made in pairs}
    domain = ArtifactName.parse(dataset["asset"]).domain
    of = {n: part for n in named if _decides(part := ArtifactName.parse(n), domain)}
    inputs = {n: named[n] for n in of}
    packed = {of[n].partition: inputs[n] for n in of if of[n].stage is Stage.CORPUS_TOKENS}
    seed = {} if selection.get("seed") is None else {"seed": selection["seed"]}
    fingerprint = dataset["inputs"][f"{name}/{Stage.SELECTION}"]
    if stands(records.folder(selection)):
        chosen = records.read(selection, "selection.parquet", SCORES)
    else:
        query = f"SELECT {SCORES} FROM selected.selections WHERE selection = $made"
        chosen = fetch_frame(records.connection, query, {"made": fingerprint})
    if exists := stands(folder):
        members = records.read(dataset, ROWS, SCORES)
    else:
        members = chosen.join(leaks_of(records, name, dataset), on=PLACE, how="anti")
    about = {
        "name": name,
        "fingerprint": dataset["fingerprint"],
        "path": str(folder),
        "recorded": dataset["recorded"],
        "stands": exists,
        **{n: facts.get(n, 0) for n in ("sequences", "tokens", "left_out")},
        "selection": fingerprint,
        **{n: selection["facts"].get(n) for n in ("selected", "candidates", "cutoff")},
        "shards": len(packed),
        "models": {n: inputs[n] for n in of if of[n].stage in MODELS},
        "recipe": {**selection["recipe"], **seed, **dataset["recipe"]},
    }
    return Version(about, inputs, packed, tables.get("fingerprint"), chosen, members)


def _decides(of: ArtifactName, domain: str | None) -> bool:
    """Return whether a named artifact (a model, a shard, ...) determines datasets of a domain."""
    ours = of.domain in {None, domain} and of.stage in DECISIVE
    return ours and ShardKind.of(of.partition or "") is ShardKind.CORPUS


def _changes(records: Records, last: Version, now: Version) -> Facts:
    """Return how a dataset differs from its last version."""
    found: Facts = {"last": last.facts}
    recipes = last.facts["recipe"], now.facts["recipe"]
    for what, was, new in (("inputs", last.inputs, now.inputs), ("recipe", *recipes)):
        names = [n for n in sorted({*was, *new}) if was.get(n) != new.get(n)]
        found[what] = [{"name": n, "was": was.get(n), "now": new.get(n)} for n in names]
    causes = _causes(found["inputs"], found["recipe"], recipes[1].get("method"))
    for way, version, other in (("entering", now, last), ("leaving", last, now)):
        moved = _moved(records, version, other, way == "leaving", causes)
        counts = moved.group_by("why").agg(sequences=pl.len())
        found[way] = counts.sort("sequences", "why", descending=[True, False]).to_dicts()
        best = moved.sort("score", *PLACE).head(EXAMPLES).to_dicts()
        files = [records.rows(FILE, **{n: e[n] for n in PLACE})[0] for e in best]
        found[f"examples_{way}"] = [e | file for e, file in zip(best, files, strict=True)]
        found["both"] = len(version.members) - len(moved)
    return found


def _causes(inputs: list[Facts], recipe: list[Facts], method: str | None) -> str:
    """Return, in words, what can have changed the decision for a sequence both versions saw."""
    names = [ArtifactName.parse(difference["name"]) for difference in inputs]
    decisive = {"method", "tau", "batch", "seed"} | (set() if method in BY_SHARE else {"needed"})
    words = [CAUSES[name.stage] for name in names if name.stage in CAUSES]
    words += [f"{d['name']} {d['was']} -> {d['now']}" for d in recipe if d["name"] in decisive]
    if any(name.partition for name in names):
        words.append("other candidates beside it")
    return ", ".join(words) or "no cause on record"


def _moved(
    records: Records, version: Version, other: Version, leaving: bool, causes: str
) -> pl.DataFrame:
    """Return the sequences of a version that the other lacks: shard, position, score and why."""
    frames = {"members": version.members, "others": other.members, "chosen": other.chosen}
    for name, frame in frames.items():
        records.connection.register(name, frame.to_arrow())
    tables = records.current(Stage.SCORE_TABLES).get("fingerprint")
    wanted = {
        "causes": causes,
        "arrival": "retired data" if leaving else "new data",
        "leak": "found to quote held-out text" if leaving else "no longer found to leak",
        "there": list(other.packed),
        "same": [
            shard for shard, made in version.packed.items() if other.packed.get(shard) == made
        ],
        # The table `excluded` belongs to the current score tables, so it can only explain what left
        # if the other version was made from them.
        "same_tables": leaving and other.tables == tables,
    }
    moved = fetch_frame(records.connection, MOVED, wanted)
    return moved.with_columns(pl.col("why").replace(EXCLUDED))
