"""Facts of sequences: losses, rank, what each arm did with them, and the models trained on them.

Read from the score tables, the ledger and the artifacts; Dagster's history is not needed. All
sequences of a document are looked up at once, at the cost of one.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from colorfilter.order import training_order
from colorfilter.provenance import content, stands
from colorfilter.recipe import SCORED
from colorfilter.score_tables import EXCLUDED
from colorfilter.selection import SCORES, SHARDS, count_candidates
from colorfilter.tables import fetch, fetch_frame
from resources.artifacts import ArtifactStore
from resources.ledger import Entry
from resources.lineage import Lineage

if TYPE_CHECKING:
    import duckdb

PLACE = ["shard", "position"]
QUOTE = 200  # characters of a text that are shown
DRAWN = ("random", "full")  # methods whose score is a lot
Facts = dict[str, Any]  # an object of the JSON that `colorfilter explain --json` prints
PACKED = "corpus_tokens["  # of the names of packed tokens, by shard
MINE = "shard = $shard AND position IN (SELECT unnest($positions::BIGINT[]))"

# Losses are in nats per token. `rank` counts from 1 among the candidates, in the order of
# selection: (color, shard, position). What is no candidate has the rank that it would have.
# One pass counts the candidates up to each of the sequences' colors.
COLORS = f"""
    WITH mine AS (FROM color WHERE {MINE}),
    candidates AS NOT MATERIALIZED (
        SELECT domain, shard, position, color FROM (FROM color WHERE NOT starts_with(shard, '_'))
        ANTI JOIN excluded USING (shard, position)
    ),
    steps AS (SELECT domain, list(DISTINCT color) AS colors FROM mine GROUP BY domain),
    counts AS (
        SELECT domain, unnest(map_entries(histogram(color, colors)), recursive := true)
        FROM candidates JOIN steps USING (domain) GROUP BY domain
    ),
    lower AS (
        SELECT domain, key AS color, sum(value) OVER (PARTITION BY domain ORDER BY key) AS n
        FROM counts
    ),
    ranks AS (
        SELECT mine.domain, mine.position,
            coalesce(any_value(n), 0)::BIGINT + 1 - count(c.color) AS rank
        FROM mine LEFT JOIN lower USING (domain, color) LEFT JOIN candidates AS c
            ON c.domain = mine.domain AND c.color = mine.color
            AND (c.shard, c.position) >= (mine.shard, mine.position)
        GROUP BY ALL
    )
    SELECT mine.position, mine.domain, loss_prior, loss_conditional, color,
        p.precision AS precision_prior, c.precision AS precision_conditional,
        p.model AS prior, c.model AS conditional,
        rank, $candidates AS candidates, 100 * rank / greatest(1, $candidates) AS percentile
    FROM mine JOIN ranks USING (domain, position)
    JOIN models AS pm ON pm.role = 'prior' AND pm.current
    JOIN models AS cm ON cm.role = 'conditional' AND cm.domain = mine.domain AND cm.current
    JOIN losses AS p ON p.model = pm.model AND p.shard = $shard AND p.position = mine.position
    JOIN losses AS c ON c.model = cm.model AND c.shard = $shard AND c.position = mine.position
    ORDER BY mine.domain
"""
# `alike`: scored by the models whose losses are in the tables.
VERSIONS = """
    SELECT v.domain || '/' || arm AS name, v.domain, arm, v.selection, created, v.current, cutoff,
        n AS selected, p.model IS NOT NULL AND c.model IS NOT NULL AS alike
    FROM selected.selection_versions AS v
    JOIN (SELECT selection, count(*) AS n FROM selected.selections GROUP BY ALL) USING (selection)
    LEFT JOIN models AS p ON p.model = v.prior AND p.role = 'prior' AND p.current
    LEFT JOIN models AS c ON c.model = v.conditional AND c.role = 'conditional'
        AND c.domain = v.domain AND c.current
    ORDER BY v.domain, arm, v.current DESC, created DESC
"""


@dataclass(frozen=True)
class Records:
    """All that is on record about a home: ledger, artifacts and score tables."""

    artifacts: ArtifactStore
    lineage: Lineage
    connection: "duckdb.DuckDBPyConnection"

    def current(self, asset: str, partition: str | None = None) -> Entry | None:
        """The current ledger entry of an asset's partition."""
        return self.artifacts.entries().get((asset, partition))

    def one(self, name: str, fingerprint: str | None) -> Entry | None:
        """The last ledger entry of this name and content."""
        found = self.lineage.find(name, fingerprint) if fingerprint else []
        return found[-1] if found else None

    def input(self, entry: Entry | None, name: str) -> Entry | None:
        """The entry of an input of an artifact."""
        return self.one(name, entry["inputs"].get(name)) if entry else None

    def folder(self, entry: Entry) -> Path:
        """The folder of an artifact, which may be gone."""
        return self.artifacts.at.root / str(entry["path"])

    def rows(self, query: str, **parameters: Any) -> list[Facts]:
        """Rows of a query on the score tables, by name of column."""
        return fetch_frame(self.connection, query, parameters).to_dicts()

    def read(
        self, entry: Entry | None, table: str, columns: str, where: str = "true", **parameters: Any
    ) -> pl.DataFrame:
        """Rows of a Parquet table of an artifact; none where the table is gone."""
        path = self.folder(entry) / table if entry else None
        if path is None or not path.exists():
            return pl.DataFrame()
        query = f"SELECT {columns} FROM read_parquet($table) WHERE {where}"
        return fetch_frame(self.connection, query, {"table": str(path), **parameters})


@dataclass(frozen=True)
class Selection:
    """A selection `<domain>/<arm>`, and its entry in the ledger where that has one."""

    records: Records
    name: str
    entry: Entry | None

    @cached_property
    def recipe(self) -> Facts:
        return dict(self.entry["recipe"]) if self.entry else {}

    @cached_property
    def method(self) -> str:
        """The method in its recipe or, where that has none, in the name of the arm."""
        arm = self.name.rpartition("/")[2]
        return str(self.recipe.get("method", arm.partition("_tau")[0].removesuffix("_leaks")))

    @cached_property
    def tables(self) -> Entry | None:
        """The score tables that it was made by."""
        made_from = {**self.entry.get("sources", {}), **self.entry["inputs"]} if self.entry else {}
        return self.records.one("score_tables", made_from.get("score_tables"))

    @cached_property
    def packed(self) -> dict[str, str]:
        """Fingerprints of the packed tokens that it was made over, by shard of the corpus."""
        for entry in filter(None, (self.entry, self.tables)):
            named = {k[:-1].split("[", 1)[1]: v for k, v in entry["inputs"].items() if PACKED in k}
            if named:
                return {shard: made for shard, made in named.items() if not shard.startswith("_")}
        return {}


def standing(records: Records, shard: str, positions: Sequence[int]) -> dict[int, Facts]:
    """Why sequences of a shard are excluded, their scores and selections, by position."""
    mine = {"shard": shard, "positions": list(positions)}
    query = f"SELECT position, reason FROM excluded WHERE {MINE}"
    reasons = dict(fetch(records.connection, query, mine))
    found = {p: Facts(excluded=reasons.get(p), scores=[], selections=[]) for p in positions}
    candidates = count_candidates(records.connection)
    for score in records.rows(COLORS, **mine, candidates=candidates):
        found[score.pop("position")]["scores"].append(score)
    chosen: dict[str, dict[int, Facts]] = {}
    query = f"SELECT selection, position, rank, score FROM selected.selections WHERE {MINE}"
    for row in records.rows(query, **mine):
        chosen.setdefault(row.pop("selection"), {})[row.pop("position")] = row
    for version in records.rows(VERSIONS):
        places = chosen.get(version["selection"], {})
        for position, decision in _decisions(records, version, mine, reasons, places).items():
            found[position]["selections"].append(decision)
    return found


def _decisions(
    records: Records,
    version: Facts,
    mine: Mapping[str, Any],
    reasons: Mapping[int, str],
    places: Mapping[int, Facts],
) -> dict[int, Facts]:
    """What a selection, a row of VERSIONS, did with sequences, by position.

    `reasons` say why sequences are excluded; `places` are ranks and scores in the selection.
    `margin` is score minus cutoff: negative or zero where the sequence was selected.
    """
    alike, cutoff, name = version.pop("alike"), version["cutoff"], version.pop("name")
    made = Selection(records, name, records.one(f"{name}/selection", version["selection"]))
    apart = _apart(made, mine["shard"])
    scores = {} if apart else _scores(made, alike, mine)
    selected = {**mine, "positions": [] if apart else list(places)}
    datasets = _datasets(records, name, version["selection"], selected)
    found = {}
    for position in mine["positions"]:
        decision, why, place = "refused", None, {"rank": None, "score": scores.get(position)}
        if apart:
            decision, why = apart
        elif position in places:
            decision, place = "selected", dict(places[position])
        elif position in reasons:
            decision, why, place["score"] = "excluded", EXCLUDED[reasons[position]], None
        else:
            why = _why_refused(made, alike, cutoff, place["score"])
        # The pools of random batches have a cutoff each.
        by_cutoff = None not in {place["score"], cutoff} and not made.recipe.get("batch")
        margin = place["score"] - cutoff if by_cutoff else None
        decided = {"decision": decision, "why": why, **place, "margin": margin}
        found[position] = {**version, **decided, "datasets": datasets.get(position, [])}
    return found


def _apart(made: Selection, shard: str) -> tuple[str, str] | None:
    """Decision and reason where a selection was not made over a shard as it is packed now."""
    if shard.startswith("_probe_"):
        return "never", "the probe of a domain is scored and never selected"
    if made.method == "dsir":
        return "not asked", "dsir draws documents and packs sequences of its own"
    tables = made.records.current("score_tables")
    now = tables["inputs"].get(f"{PACKED}{shard}]") if tables else None
    then = made.packed.get(shard)
    if made.entry is None or then == now:
        return None
    if then is None:
        return "not there", "its shard was not in the corpus then"
    return "not there", "its shard was packed otherwise then"


def _why_refused(
    made: Selection, alike: bool, cutoff: float | None, score: float | None
) -> str | None:
    """The reason other than the cutoff for which a selection does not hold a candidate."""
    why = None
    if made.method not in SCORES:
        why = "the proxy did not choose it while it learned"
    elif made.recipe.get("batch"):
        why = "not among the best of its random batch"
    elif made.method in SCORED and not alike:
        why = "by the scores of models that are no longer in the tables"
    elif score is None:
        why = "has no label, so no loss"
    elif cutoff is not None and score <= cutoff:
        why = "its score or the candidates have changed since"
    return why


def _scores(made: Selection, alike: bool, mine: Mapping[str, Any]) -> dict[int, float]:
    """Scores of sequences by a selection's method, where the tables still have what they need."""
    if made.method in DRAWN and made.entry:
        wanted = {**mine, "seed": made.entry["seed"]}
    elif made.method in SCORED and alike:
        wanted = {**mine, "domain": made.name.rpartition("/")[0]}
    else:
        return {}
    query = f"WITH {SHARDS}, {SCORES[made.method]} SELECT position, score FROM scores WHERE {MINE}"
    return dict(fetch(made.records.connection, query, wanted))


def _datasets(
    records: Records, name: str, selection: str, mine: Mapping[str, Any]
) -> dict[int, list[Facts]]:
    """Facts of the datasets made of a selection, by position of a sequence that it chose.

    `stands` is false where the folder is gone, and with it what is known of the sequence. `row` is
    null where the sequence was left out.
    """
    found: dict[int, list[Facts]] = {position: [] for position in mine["positions"]}
    for made in records.lineage.versions(f"{name}/filtered_dataset") if found else ():
        if made["inputs"].get(f"{name}/selection") != selection:
            continue
        folder, table = records.folder(made), "tokens/sequences.parquet"
        facts = {k: made[k] for k in ("fingerprint", "recorded")} | {"path": str(folder)}
        exists = stands(folder)
        rows, quotes = {}, {}
        if exists:
            rows = dict(records.read(made, table, 'position, "row"', MINE, **mine).rows())
            leaks = leakage_of(records, name, made)
            if leaks is not None:
                quotes = dict(leaks.filter(shard=mine["shard"]).drop("shard").rows())
        trained = _trained(records, name, made, rows.values())
        for position, datasets in found.items():
            row, left_out = rows.get(position), quotes.get(position, "quotes held-out text")
            out = {"row": row, "left_out": left_out if exists and row is None else None}
            datasets.append({**facts, "stands": exists, **out, "trained": trained.get(row, [])})
    return found


def leakage_of(records: Records, name: str, dataset: Entry) -> pl.DataFrame | None:
    """Sequences of a dataset's selection that quote held-out text, and what, as found at the time.

    None where that is gone. Empty where the arm keeps such sequences.
    """
    entry = records.input(dataset, f"{name}/leakage")
    if entry is None or not stands(records.folder(entry)):
        return None
    columns = "shard, unnest(positions) AS position, protected, n_words, quote"
    leaks = records.read(entry, "leakage.parquet", columns)
    quote = pl.col("quote").str.replace_all(r"\s+", " ").str.strip_chars().str.head(QUOTE)
    words = "quotes held-out text of {}, {} words: {}"
    found = leaks.select(*PLACE, words=pl.format(words, "protected", "n_words", quote))
    return found.clear() if dataset["recipe"].get("leaks") == "keep" else found


def _trained(
    records: Records, name: str, dataset: Entry, rows: Collection[int]
) -> dict[int | None, list[Facts]]:
    """Facts of the target models of a dataset, for each of some rows.

    `place` is the row's in the order of training, from 1. `reached` says, by the tokens of each
    end point, whether training had come to it.
    """
    found: dict[int | None, list[Facts]] = {row: [] for row in rows}
    tokens = content(records.folder(dataset), "tokens").fingerprint if rows else None
    models = records.lineage.of(f"{name}/target_model") if rows else []
    for model in sorted(models, key=lambda m: (int(m["seed"]), str(m["recorded"]))):
        if model["inputs"].get(f"{name}/filtered_dataset/tokens") != tokens:
            continue
        order = training_order(model["seed"], dataset["facts"]["sequences"])
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        # A checkpoint is named by its tokens. Its end point counts sequences.
        checkpoints = sorted(map(int, model["facts"]["checkpoints"]))
        ends = list(zip(checkpoints, sorted(model["recipe"]["endpoints"]), strict=True))
        facts = {"path": str(records.folder(model)), "of": len(places)}
        facts |= {k: model[k] for k in ("seed", "fingerprint")}
        for row in rows:
            reached = {n: bool(places[row] < end) for n, end in ends}
            found[row].append({**facts, "place": int(places[row]) + 1, "reached": reached})
    return found


def checkpoints(records: Records) -> list[Facts]:
    """The models that gave the losses in the tables, the prior first.

    `trained_on` is followed back through the ledger.
    """
    query = "SELECT model AS fingerprint, role, domain, path FROM models WHERE current"
    models = records.rows(f"{query} ORDER BY role DESC, domain")
    for model in models:
        domain, name = model["domain"], f"{model['role']}_model"
        entry = records.one(f"{domain}/{name}" if domain else name, model["fingerprint"])
        if entry is None:
            model["trained_on"] = {"what": "not in the ledger"}
            continue
        model["path"] = str(records.folder(entry) / str(entry["facts"]["checkpoint"]))
        plan = records.input(entry, "sample_plan")
        packed = records.input(entry, f"{domain}/domain_tokens")
        if plan:
            facts = {name: plan["facts"].get(name) for name in ("documents", "chars")}
            facts |= {"tokens": entry["facts"].get("tokens"), "sample_plan": plan["fingerprint"]}
            model["trained_on"] = {"what": "D_prior", **facts}
        elif packed:
            text = records.input(packed, f"{domain}/domain_text")
            counts = {"documents": text and text["facts"].get("down_documents")}
            counts |= {n: packed["facts"].get(f"down_{n}") for n in ("sequences", "tokens")}
            made_of = {"domain_tokens": packed["fingerprint"]}
            made_of["started_from"] = entry["inputs"].get("prior_model")
            model["trained_on"] = {"what": "D_down", **counts, **made_of}
        else:
            model["trained_on"] = {"what": "as given", "path": entry["recipe"].get("path")}
    return models
