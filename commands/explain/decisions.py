"""Look up sequences: losses, rank, the decision of each arm, and the models trained on them.

Everything is read from the score tables, the ledger and the artifacts, not from Dagster's history.
All sequences of a document are looked up at once, at the cost of one.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl

from colorfilter.config.recipe import SCORED
from colorfilter.selection.score_tables import EXCLUDED
from colorfilter.selection.select import SCORES, SHARDS, count_candidates
from colorfilter.selection.sql import fetch, fetch_frame, parquet
from colorfilter.stages import IN_CORPUS, ShardKind, Stage
from colorfilter.storage.manifest import content, stands
from colorfilter.training.schedule import training_order
from resources.artifacts import ROWS, ArtifactStore
from resources.ledger import Entry
from resources.lineage import Lineage

PLACE = ["shard", "position"]
QUOTE = 200  # characters of a text to show
DRAWN = ("random", "full")  # methods whose score is a random key
Facts = dict[str, Any]  # an object in the JSON of `colorfilter explain --json`
# Placeholder for an artifact that is not in the ledger: no inputs, no facts, no files.
UNKNOWN: Entry = {"path": "gone", "inputs": {}, "sources": {}, "recipe": {}, "facts": {}}
MINE = "shard = $shard AND position IN (SELECT unnest($positions::BIGINT[]))"

# Losses are in nats per token. `rank` counts candidates from 1 in the order of selection: (color,
# shard, position). A sequence that is not a candidate gets the rank it would have.
# One pass counts the candidates up to each sequence's color; ties are counted separately.
COLORS = f"""
    WITH mine AS (FROM color WHERE {MINE}),
    candidates AS NOT MATERIALIZED (
        FROM (FROM color WHERE {IN_CORPUS}) ANTI JOIN excluded USING (shard, position)
    ),
    counts AS (
        SELECT domain, unnest(map_entries(histogram(color, colors)), recursive := true)
        FROM candidates
        JOIN (SELECT domain, list(DISTINCT color) AS colors FROM mine GROUP BY domain)
            USING (domain)
        GROUP BY domain
    ),
    ranked AS (
        SELECT *, 1 + (
            SELECT coalesce(sum(value), 0)::BIGINT FROM counts
            WHERE counts.domain = mine.domain AND key <= mine.color
        ) - (
            SELECT count(*) FROM candidates AS tie
            WHERE tie.domain = mine.domain AND tie.color = mine.color
                AND (tie.shard, tie.position) >= (mine.shard, mine.position)
        ) AS rank FROM mine
    )
    SELECT mine.position, mine.domain, loss_prior, loss_conditional, color,
        p.precision AS precision_prior, c.precision AS precision_conditional,
        p.model AS prior, c.model AS conditional,
        rank, $candidates AS candidates, 100 * rank / greatest(1, $candidates) AS percentile
    FROM ranked AS mine
    JOIN models AS pm ON pm.role = 'prior' AND pm.current
    JOIN models AS cm ON cm.role = 'conditional' AND cm.domain = mine.domain AND cm.current
    JOIN losses AS p ON p.model = pm.model AND p.shard = $shard AND p.position = mine.position
    JOIN losses AS c ON c.model = cm.model AND c.shard = $shard AND c.position = mine.position
    ORDER BY mine.domain
"""
# `alike`: whether it was selected with the models whose losses are in the tables now.
VERSIONS = """
    WITH models AS (SELECT model FROM models WHERE current),
    sizes AS (SELECT selection, count(*) AS selected FROM selected.selections GROUP BY ALL)
    SELECT domain, arm, selection, created, current, cutoff, selected,
        coalesce(prior IN (FROM models) AND conditional IN (FROM models), false) AS alike
    FROM selected.selection_versions JOIN sizes USING (selection)
    ORDER BY domain, arm, current DESC, created DESC
"""


@dataclass(frozen=True)
class Records:
    """The records of a home: ledger, artifacts, and a connection to the score tables."""

    artifacts: ArtifactStore
    lineage: Lineage
    connection: duckdb.DuckDBPyConnection

    def current(self, asset: str, partition: str | None = None) -> Entry:
        """Return the current ledger entry of an asset's partition, or UNKNOWN."""
        return self.artifacts.entries().get((asset, partition), UNKNOWN)

    def one(self, name: str, fingerprint: str) -> Entry:
        """Return the last ledger entry with this name and fingerprint, or UNKNOWN."""
        return (self.lineage.find(name, fingerprint) or [UNKNOWN])[-1]

    def input(self, entry: Entry, name: str) -> Entry:
        """Return the entry of the named input that an artifact was built from, or UNKNOWN."""
        made_from = dict(self.lineage.made_from(entry))
        return self.one(name, made_from[name]) if name in made_from else UNKNOWN

    def folder(self, entry: Entry) -> Path:
        """Return the folder of an artifact. It may no longer exist."""
        return self.artifacts.at.root / str(entry["path"])

    def rows(self, query: str, **parameters: Any) -> list[Facts]:
        """Return the rows of a query on the score tables, as dicts by column name."""
        return fetch_frame(self.connection, query, parameters).to_dicts()

    def read(
        self, entry: Entry, table: str, columns: str, where: str = "true", **parameters: Any
    ) -> pl.DataFrame:
        """Return rows of a Parquet table of an artifact; an empty frame if the table is gone."""
        path = self.folder(entry) / table
        if not path.exists():
            return pl.DataFrame()
        query = f"SELECT {columns} FROM {parquet('$table')} WHERE {where}"
        return fetch_frame(self.connection, query, {"table": str(path), **parameters})


def method_of(selection: Entry) -> str | None:
    """Return the method of a selection. Entries of dsir do not name it. None if UNKNOWN."""
    return None if selection is UNKNOWN else str(selection["recipe"].get("method", "dsir"))


def standing(records: Records, shard: str, positions: Sequence[int]) -> dict[int, Facts]:
    """Return why sequences of a shard are excluded, their scores and selections, by position.

    `margin` is score minus cutoff, which is negative or zero for a selected sequence.
    """
    mine = {"shard": shard, "positions": list(positions)}
    found = {p: Facts(excluded=None, scores=[], selections=[]) for p in positions}
    for row in records.rows(f"SELECT position, reason FROM excluded WHERE {MINE}", **mine):
        found[row["position"]]["excluded"] = row["reason"]
    for row in records.rows(COLORS, **mine, candidates=count_candidates(records.connection)):
        found[row.pop("position")]["scores"].append(row)
    chosen: dict[str, dict[int, Facts]] = {}
    query = f"SELECT selection, position, rank, score FROM selected.selections WHERE {MINE}"
    for row in records.rows(query, **mine):
        chosen.setdefault(row.pop("selection"), {})[row.pop("position")] = row
    for version in records.rows(VERSIONS):
        name, alike = f"{version['domain']}/{version['arm']}", version.pop("alike")
        made = records.one(f"{name}/{Stage.SELECTION}", version["selection"])
        never = _never_asked(records, made, shard)
        places = {} if never else chosen.get(version["selection"], {})
        scores = {} if never else _scores(records, made, version["domain"], alike, mine)
        datasets = _datasets(records, name, version["selection"], shard, places)
        for position, facts in found.items():
            score = None if facts["excluded"] else scores.get(position)
            place = places.get(position, {"rank": None, "score": score})
            decision, why = never or _decision(made, version, alike, facts["excluded"], place)
            # With random batches every pool has a cutoff of its own.
            cutoff = None if made["recipe"].get("batch") else version["cutoff"]
            margin = None if None in {place["score"], cutoff} else place["score"] - cutoff
            decided = {"decision": decision, "why": why, **place, "margin": margin}
            decided["datasets"] = datasets.get(position, [])
            facts["selections"].append({**version, **decided})
    return found


def _never_asked(records: Records, selection: Entry, shard: str) -> tuple[str, str] | None:
    """Return decision and reason if a selection did not consider the shard as it is packed now."""
    if ShardKind.of(shard) is ShardKind.PROBE:
        return "never", "the probe of a domain is scored and never selected"
    if method_of(selection) == "dsir":
        return "not asked", "dsir draws documents and packs sequences of its own"
    packed = f"{Stage.CORPUS_TOKENS}[{shard}]"
    tables = records.input(selection, Stage.SCORE_TABLES)
    then = {**tables["inputs"], **selection["inputs"]}.get(packed)
    if then is None:
        return "not there", "its shard was not in the corpus then"
    if then != records.current(Stage.SCORE_TABLES)["inputs"].get(packed):
        return "not there", "its shard was packed otherwise then"
    return None


def _decision(
    selection: Entry, version: Facts, alike: bool, excluded: str | None, place: Facts
) -> tuple[str, str | None]:
    """Return decision and reason for a sequence; the reason is None if it was the score."""
    method, score, cutoff = method_of(selection), place["score"], version["cutoff"]
    if place["rank"]:
        return "selected", None
    if excluded:
        return "excluded", EXCLUDED[excluded]
    why = None
    if method not in SCORES:
        why = "the proxy did not choose it while it learned"
    elif selection["recipe"].get("batch"):
        why = "not among the best of its random batch"
    elif method in SCORED and not alike:
        why = "by the scores of models that are no longer in the tables"
    elif score is None:
        why = "has no label, so no loss"
    elif cutoff is not None and score <= cutoff:
        why = "its score or the candidates have changed since"
    return "refused", why


def _scores(
    records: Records, selection: Entry, domain: str, alike: bool, mine: Mapping[str, Any]
) -> dict[int, float]:
    """Return sequence scores by a selection's method; empty if the tables no longer have them."""
    method = method_of(selection)
    if method not in DRAWN and not (method in SCORED and alike):
        return {}
    wanted = {"seed": selection["seed"]} if method in DRAWN else {"domain": domain}
    query = f"WITH {SHARDS}, {SCORES[method]} SELECT position, score FROM scores WHERE {MINE}"
    return dict(fetch(records.connection, query, {**mine, **wanted}))


def _datasets(
    records: Records, name: str, selection: str, shard: str, positions: Collection[int]
) -> dict[int, list[Facts]]:
    """Return the facts of the datasets built from a selection, by position of selected sequences.

    `stands` is whether the folder exists; without it nothing else is known. `row` is null if the
    sequence was excluded from the dataset.
    """
    found: dict[int, list[Facts]] = {position: [] for position in positions}
    mine = {"shard": shard, "positions": list(positions)}
    for made in records.lineage.versions(f"{name}/{Stage.FILTERED_DATASET}") if found else ():
        if made["inputs"].get(f"{name}/{Stage.SELECTION}") != selection:
            continue
        folder = records.folder(made)
        facts = {k: made[k] for k in ("fingerprint", "recorded")} | {"path": str(folder)}
        facts["stands"] = stands(folder)
        rows = {}
        if facts["stands"]:
            rows = dict(records.read(made, ROWS, 'position, "row"', MINE, **mine).rows())
        words = dict(leaks_of(records, name, made).filter(shard=shard).drop("shard").rows())
        trained = _trained(records, name, made, rows.values())
        for position, datasets in found.items():
            row, why = rows.get(position), words.get(position, "quotes held-out text")
            left_out = why if facts["stands"] and row is None else None
            known = {"row": row, "left_out": left_out, "trained": trained.get(row, [])}
            datasets.append({**facts, **known})
    return found


def leaks_of(records: Records, name: str, dataset: Entry) -> pl.DataFrame:
    """Return sequences excluded from a dataset for quoting held-out text: shard, position, words.

    Empty if the leakage artifact that the dataset was built from is gone.
    """
    entry = records.input(dataset, f"{name}/{Stage.LEAKAGE}")
    if dataset["recipe"].get("leaks") == "keep" or not stands(records.folder(entry)):
        return pl.DataFrame(schema={"shard": str, "position": int, "words": str})
    columns = "shard, unnest(positions) AS position, protected, n_words, quote"
    leaks = records.read(entry, "leakage.parquet", columns)
    quote = pl.col("quote").str.replace_all(r"\s+", " ").str.strip_chars().str.head(QUOTE)
    words = "quotes held-out text of {}, {} words: {}"
    return leaks.select(*PLACE, words=pl.format(words, "protected", "n_words", quote))


def _trained(
    records: Records, name: str, dataset: Entry, rows: Collection[int]
) -> dict[int | None, list[Facts]]:
    """Return the facts of the target models trained on a dataset, for each of some rows.

    `place` is the position of the row in the training order, from 1. `reached` maps the tokens of
    each end point to whether training had reached the row.
    """
    found: dict[int | None, list[Facts]] = {row: [] for row in rows}
    tokens = content(records.folder(dataset), "tokens").fingerprint if rows else None
    models = records.lineage.of(f"{name}/{Stage.TARGET_MODEL}") if rows else []
    for model in sorted(models, key=lambda m: (int(m["seed"]), str(m["recorded"]))):
        if model["inputs"].get(f"{name}/{Stage.FILTERED_DATASET}/tokens") != tokens:
            continue
        order = training_order(model["seed"], dataset["facts"]["sequences"])
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        facts = {"path": str(records.folder(model)), "of": len(places)}
        facts |= {k: model[k] for k in ("seed", "fingerprint")}
        # Checkpoints are named by tokens; end points count sequences.
        checkpoints = sorted(map(int, model["facts"]["checkpoints"]))
        ends = list(zip(checkpoints, sorted(model["recipe"]["endpoints"]), strict=True))
        for row in rows:
            reached = {n: bool(places[row] < end) for n, end in ends}
            found[row].append({**facts, "place": int(places[row]) + 1, "reached": reached})
    return found


def checkpoints(records: Records) -> list[Facts]:
    """Return the models that the losses in the tables were computed with, the prior first.

    `trained_on` is traced back through the ledger.
    """
    query = "SELECT model AS fingerprint, role, domain, path FROM models WHERE current"
    models = records.rows(f"{query} ORDER BY role DESC, domain")
    for model in models:
        domain, name = model["domain"], f"{model['role']}_model"
        made = records.one(f"{domain}/{name}" if domain else name, model["fingerprint"])
        plan = records.input(made, Stage.SAMPLE_PLAN)
        packed = records.input(made, f"{domain}/{Stage.DOMAIN_TOKENS}")
        text = records.input(packed, f"{domain}/{Stage.DOMAIN_TEXT}")
        if made is UNKNOWN:
            model["trained_on"] = {"what": "not in the ledger"}
            continue
        model["path"] = str(records.folder(made) / str(made["facts"]["checkpoint"]))
        if plan is not UNKNOWN:
            facts = {n: plan["facts"].get(n) for n in ("documents", "chars")}
            facts |= {"tokens": made["facts"].get("tokens"), "sample_plan": plan["fingerprint"]}
            model["trained_on"] = {"what": "D_prior", **facts}
        elif packed is not UNKNOWN:
            facts = {"documents": text["facts"].get("down_documents")}
            facts |= {n: packed["facts"].get(f"down_{n}") for n in ("sequences", "tokens")}
            facts["domain_tokens"] = packed["fingerprint"]
            facts["started_from"] = made["inputs"].get(Stage.PRIOR_MODEL)
            model["trained_on"] = {"what": "D_down", **facts}
        else:
            model["trained_on"] = {"what": "as given", "path": made["recipe"].get("path")}
    return models
