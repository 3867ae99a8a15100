"""Where sequences stand: losses, rank, what each arm selected, and which models trained on them.

Read from the score tables, the ledger and the artefacts; Dagster's history is not needed. The
tables are asked for all sequences of a document at once, so that the cost is that of one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assets.datasets import InDataset, Records, datasets_of
from colorfilter.recipe import SCORED
from colorfilter.score_tables import EXCLUDED
from colorfilter.selection import SCORES, SHARDS, count_candidates
from colorfilter.tables import fetch
from resources.ledger import Entry

DRAWN = ("random", "full")  # methods whose score is a lot


@dataclass(frozen=True)
class Checkpoint:
    """A model that scored, and what it was trained on."""

    fingerprint: str
    role: str
    domain: str | None
    path: str
    trained_on: dict[str, Any]


@dataclass(frozen=True)
class Score:
    """Losses of a sequence for a domain, nats per token, and where its color ranks.

    `rank` counts from 1 among the candidates, those of lower (color, shard, position) before it;
    of what is no candidate it is the rank it would have. `percentile` is 100 rank / candidates.
    """

    domain: str
    loss_prior: float
    loss_conditional: float
    color: float
    precision_prior: str
    precision_conditional: str
    prior: str
    conditional: str
    rank: int
    candidates: int
    percentile: float


@dataclass(frozen=True)
class Stand:
    """What a version of an arm's selection did with a sequence.

    `margin` is score minus cutoff, negative or zero where it was selected.
    """

    domain: str
    arm: str
    selection: str
    created: str
    current: bool
    decision: str
    why: str | None
    score: float | None
    cutoff: float | None
    margin: float | None
    rank: int | None
    selected: int
    datasets: list[InDataset]


@dataclass(frozen=True)
class Standing:
    """All about one sequence that the score tables and the ledger have."""

    excluded: str | None
    scores: list[Score]
    selections: list[Stand]


def standing(records: Records, shard: str, positions: Sequence[int]) -> dict[int, Standing]:
    """Where sequences of a shard stand, by position."""
    mine = {"shard": shard, "positions": list(positions)}
    reasons = dict(fetch(records.connection, f"SELECT position, reason FROM excluded {MINE}", mine))
    scores = _scores(records, mine)
    stands_ = _selections(records, mine, reasons)
    return {p: Standing(reasons.get(p), scores[p], stands_[p]) for p in positions}


def checkpoints(records: Records) -> list[Checkpoint]:
    """The models that gave the losses in the tables, the prior first."""
    rows = fetch(
        records.connection,
        "SELECT model, role, domain, path FROM models WHERE current ORDER BY role DESC, domain",
    )
    return [
        Checkpoint(model, role, domain, *_trained_on(records, model, role, domain, path))
        for model, role, domain, path in rows
    ]


def _trained_on(
    records: Records, model: str, role: str, domain: str | None, published: str
) -> tuple[str, dict[str, Any]]:
    """Where a checkpoint lies and what it was trained on, followed back through the ledger."""
    entry = records.one(f"{domain}/{role}_model" if domain else f"{role}_model", model)
    if entry is None:
        return published, {"what": "not in the ledger"}
    path = str(records.folder(entry) / str(entry["facts"]["checkpoint"]))
    plan = records.one("sample_plan", entry["inputs"].get("sample_plan"))
    if plan:
        facts = {fact: plan["facts"].get(fact) for fact in ("documents", "chars")}
        tokens = entry["facts"].get("tokens")
        return path, {
            "what": "D_prior",
            **facts,
            "tokens": tokens,
            "sample_plan": plan["fingerprint"],
        }
    packed = records.one(f"{domain}/domain_tokens", entry["inputs"].get(f"{domain}/domain_tokens"))
    if packed is None:
        return path, {"what": "as given", "path": entry["recipe"].get("path")}
    text = records.one(f"{domain}/domain_text", packed["inputs"].get(f"{domain}/domain_text"))
    return path, {
        "what": "D_down",
        "documents": text["facts"].get("down_documents") if text else None,
        "sequences": packed["facts"].get("down_sequences"),
        "tokens": packed["facts"].get("down_tokens"),
        "domain_tokens": packed["fingerprint"],
        "started_from": entry["inputs"].get("prior_model"),
    }


MINE = "WHERE shard = $shard AND position IN (SELECT unnest($positions::BIGINT[]))"

LOSSES = f"""
    SELECT color.domain, color.position, loss_prior, loss_conditional, color,
        p.precision, c.precision, p.model, c.model
    FROM (FROM color {MINE}) AS color
    JOIN models AS pm ON pm.role = 'prior' AND pm.current
    JOIN models AS cm ON cm.role = 'conditional' AND cm.domain = color.domain AND cm.current
    JOIN losses AS p ON p.model = pm.model AND p.shard = $shard AND p.position = color.position
    JOIN losses AS c ON c.model = cm.model AND c.shard = $shard AND c.position = color.position
    ORDER BY color.domain, color.position
"""

# Candidates before each of some sequences, in the order of selection: (color, shard, position).
# The sequences' colors cut the candidates into steps, so one pass counts for all of them.
RANKS = f"""
    WITH mine AS (SELECT position, color FROM color {MINE} AND domain = $domain),
    candidates AS NOT MATERIALIZED (
        SELECT shard, position, color
        FROM (FROM color WHERE domain = $domain AND NOT starts_with(shard, '_'))
        ANTI JOIN excluded USING (shard, position)
    ),
    steps AS (SELECT DISTINCT color FROM mine),
    between AS (
        SELECT steps.color, count(*) AS n
        FROM candidates ASOF JOIN steps ON candidates.color < steps.color GROUP BY steps.color
    ),
    lower AS (
        SELECT color, coalesce(sum(n) OVER (ORDER BY color), 0)::BIGINT AS n
        FROM steps LEFT JOIN between USING (color)
    ),
    ties AS (
        SELECT mine.position, count(*) AS n FROM mine JOIN candidates AS c
        ON c.color = mine.color
            AND (c.shard < $shard OR (c.shard = $shard AND c.position < mine.position))
        GROUP BY mine.position
    )
    SELECT position, lower.n + coalesce(ties.n, 0) + 1
    FROM mine JOIN lower USING (color) LEFT JOIN ties USING (position)
"""


def _scores(records: Records, mine: Mapping[str, Any]) -> dict[int, list[Score]]:
    found: dict[int, list[Score]] = {position: [] for position in mine["positions"]}
    candidates = count_candidates(records.connection)
    ranks: dict[str, dict[int, int]] = {}
    for row in fetch(records.connection, LOSSES, mine):
        domain, position, *losses_and_models = row
        if domain not in ranks:
            wanted = {**mine, "domain": domain}
            ranks[domain] = dict(fetch(records.connection, RANKS, wanted))
        rank = ranks[domain][position]
        place = rank, candidates, 100 * rank / max(1, candidates)
        found[position].append(Score(*(domain, *losses_and_models, *place)))
    return found


@dataclass(frozen=True)
class Version:
    """A selection that is in the tables, and its entry in the ledger."""

    selection: str
    domain: str
    arm: str
    cutoff: float | None
    created: str
    current: bool
    scored_alike: bool  # by the models whose losses are in the tables
    selected: int
    entry: Entry | None

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.arm}"

    @property
    def terms(self) -> dict[str, Any]:
        """The recipe of the selection."""
        return dict(self.entry["recipe"]) if self.entry else {}

    @property
    def method(self) -> str:
        return method_of(self.arm, self.terms)


def method_of(arm: str, terms: Mapping[str, Any]) -> str:
    """An arm's method, by the recipe of its selection or, where that has none, by its name."""
    return str(terms.get("method", arm.partition("_tau")[0].removesuffix("_leaks")))


def selection_versions(records: Records) -> list[Version]:
    """All selections in the tables, by domain and arm, the current one of each first."""
    rows = fetch(
        records.connection,
        """
        SELECT v.selection, v.domain, arm, cutoff, created, v.current, p.model IS NOT NULL
            AND c.model IS NOT NULL, n
        FROM selected.selection_versions AS v
        JOIN (SELECT selection, count(*) AS n FROM selected.selections GROUP BY selection)
            USING (selection)
        LEFT JOIN models AS p ON p.model = v.prior AND p.role = 'prior' AND p.current
        LEFT JOIN models AS c ON c.model = v.conditional AND c.role = 'conditional'
            AND c.domain = v.domain AND c.current
        ORDER BY v.domain, arm, v.current DESC, created DESC
        """,
    )
    return [Version(*(*row, records.one(f"{row[1]}/{row[2]}/selection", row[0]))) for row in rows]


def packed_for(records: Records, selection: Entry | None) -> dict[str, str]:
    """Fingerprints of the packed tokens that a selection was made over, by shard of the corpus."""
    if selection is None:
        return {}
    made_from = selection["inputs"]
    tables = {**selection.get("sources", {}), **made_from}.get("score_tables")
    if not any(name.startswith("corpus_tokens[") for name in made_from):
        entry = records.one("score_tables", tables)
        made_from = entry["inputs"] if entry else {}
    named = {
        name.removeprefix("corpus_tokens[").removesuffix("]"): fingerprint
        for name, fingerprint in made_from.items()
        if name.startswith("corpus_tokens[")
    }
    return {shard: made for shard, made in named.items() if not shard.startswith("_")}


def _selections(
    records: Records, mine: Mapping[str, Any], reasons: Mapping[int, str]
) -> dict[int, list[Stand]]:
    shard, positions = mine["shard"], mine["positions"]
    rows = fetch(
        records.connection,
        f"SELECT selection, position, rank, score FROM selected.selections {MINE}",
        mine,
    )
    chosen = {(selection, position): (rank, score) for selection, position, rank, score in rows}
    tables = records.artifacts.entries().get(("score_tables", None))
    now = tables["inputs"].get(f"corpus_tokens[{shard}]") if tables else None
    found: dict[int, list[Stand]] = {position: [] for position in positions}
    for version in selection_versions(records):
        apart = _apart(records, version, shard, now)
        scores = {} if apart else _by_method(records, version, mine)
        places = {
            p: chosen[version.selection, p] for p in positions if (version.selection, p) in chosen
        }
        datasets = datasets_of(
            records, version.name, version.selection, shard, [] if apart else sorted(places)
        )
        for position in positions:
            rank, score = None, scores.get(position)
            if apart:
                decision, why = apart
            elif position in places:
                decision, why = "selected", None
                rank, score = places[position]
            elif position in reasons:
                decision, why, score = "excluded", EXCLUDED[reasons[position]], None
            else:
                decision, why = "refused", _why_refused(version, score)
            margin = None
            # The pools of random batches have a cutoff each.
            if score is not None and version.cutoff is not None and not version.terms.get("batch"):
                margin = score - version.cutoff
            found[position].append(
                Stand(
                    version.domain,
                    version.arm,
                    version.selection,
                    version.created,
                    version.current,
                    decision,
                    why,
                    score,
                    version.cutoff,
                    margin,
                    rank,
                    version.selected,
                    datasets.get(position, []),
                )
            )
    return found


def _apart(
    records: Records, version: Version, shard: str, now: str | None
) -> tuple[str, str] | None:
    """Why a selection was not among a shard as it is `now` (its fingerprint), if it was not."""
    if shard.startswith("_probe_"):
        return "never", "the probe of a domain is scored and never selected"
    if version.method == "dsir":
        return "not asked", "dsir draws documents and packs sequences of its own"
    then = packed_for(records, version.entry).get(shard)
    if version.entry is None or then == now:
        return None
    if then is None:
        return "not there", "its shard was not in the corpus then"
    return "not there", "its shard was packed otherwise then"


def _why_refused(version: Version, score: float | None) -> str | None:
    """What beside the cutoff there is to say of a candidate that a selection does not hold."""
    why = None
    if version.method not in SCORES:
        why = "the proxy did not choose it while it learned"
    elif version.terms.get("batch"):
        why = "not among the best of its random batch"
    elif version.method in SCORED and not version.scored_alike:
        why = "by the scores of models that are no longer in the tables"
    elif score is None:
        why = "has no label, so no loss"
    elif version.cutoff is not None and score <= version.cutoff:
        why = "its score or the candidates have changed since"
    return why


def _by_method(records: Records, version: Version, mine: Mapping[str, Any]) -> dict[int, float]:
    """Scores of sequences by a version's method, where the tables still have what they were by."""
    wanted = dict(mine)
    if version.method in DRAWN and version.entry:
        wanted["seed"] = version.entry["seed"]
    elif version.method in SCORED and version.scored_alike:
        wanted["domain"] = version.domain
    else:
        return {}
    query = f"WITH {SHARDS}, {SCORES[version.method]} SELECT position, score FROM scores {MINE}"
    return dict(fetch(records.connection, query, wanted))
