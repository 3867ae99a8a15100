"""Stage 4: compare a new selection with the last published one before its dataset is written.

A selection that differs more than the recipe's `refresh.limits` allow gives a warning, or blocks
the dataset. The last dataset stays current until a new one is written.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg
import polars as pl

from assets.metadata import picture, table
from colorfilter.config.operation import Limits
from colorfilter.config.recipe import SCORED, Arm, Domain, Recipe
from colorfilter.evaluation.figures import binned_scores
from colorfilter.selection.drift import drift, histogram
from colorfilter.selection.sql import fetch, fetch_row
from resources.artifacts import Artifact, ArtifactStore
from resources.score_store import ScoreStore

if TYPE_CHECKING:
    import duckdb

CHECK = "changes_within_limits"


class Published(NamedTuple):
    """A published selection: its fingerprint, arm, conditional's fingerprint, and time."""

    selection: str
    arm: str
    conditional: str
    created: str


def last_published(
    connection: "duckdb.DuckDBPyConnection", domain: Domain, arm: Arm
) -> Published | None:
    """Return the arm's current selection, or else the latest by its method at another tau.

    Returns None if there is neither.
    """
    found = fetch(
        connection,
        """
        SELECT selection, arm, conditional, created FROM selected.selection_versions
        WHERE domain = $domain AND (arm = $arm OR starts_with(arm, $method || '_'))
        ORDER BY arm = $arm DESC, current DESC, created DESC LIMIT 1
        """,
        {"domain": domain.name, "arm": arm.name, "method": arm.method},
    )
    return Published(*found[0]) if found else None


def in_and_out(
    connection: "duckdb.DuckDBPyConnection", chosen: pl.DataFrame, last: Published
) -> dict[str, Any]:
    """Return the numbers of entering and leaving sequences, and the overlap.

    The overlap is the number of sequences in both selections, divided by the size of the smaller.
    """
    connection.register("chosen", chosen.select("shard", "position").to_arrow())
    before, both = fetch_row(
        connection,
        """
        SELECT count(*), count(*) FILTER (chosen.shard IS NOT NULL)
        FROM selected.selections LEFT JOIN chosen USING (shard, position)
        WHERE selection = ?
        """,
        [last.selection],
    )
    return {
        "entering": len(chosen) - both,
        "leaving": before - both,
        "overlap": both / max(1, min(before, len(chosen))),
    }


def shares(
    connection: "duckdb.DuckDBPyConnection", chosen: pl.DataFrame, last: Published
) -> list[dict[str, Any]]:
    """Return each source's share of the selected tokens, now and in the last selection.

    Tokens of the last selection count only if the corpus still contains them.
    """
    connection.register("chosen", chosen.select("shard", "position").to_arrow())
    rows = fetch(
        connection,
        """
        WITH both_selections AS (
            SELECT shard, position, true AS now FROM chosen
            UNION ALL
            SELECT shard, position, false FROM selected.selections WHERE selection = ?
        ),
        tokens AS (
            SELECT source, now, sum(spans.n_tokens) AS n
            FROM both_selections JOIN spans USING (shard, position)
            JOIN documents USING (shard, doc_id) GROUP BY ALL
        )
        SELECT source,
            coalesce(sum(n) FILTER (now), 0) / (SELECT sum(n) FROM tokens WHERE now),
            coalesce(sum(n) FILTER (NOT now), 0) / (SELECT sum(n) FROM tokens WHERE NOT now)
        FROM tokens GROUP BY source ORDER BY source
        """,
        [last.selection],
    )
    return [{"source": source, "now": now, "last": before or 0.0} for source, now, before in rows]


def change_checks(recipe: Recipe) -> list[dg.AssetChecksDefinition]:
    """Return the check `changes_within_limits` of every arm that selects by scores."""
    return [
        _changes_within_limits(recipe, domain, arm)
        for domain in recipe.domains
        for arm in recipe.arms
        if arm.method in SCORED
    ]


def _changes_within_limits(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetChecksDefinition:
    limits = recipe.refresh.limits
    blocks = limits.beyond == "block"

    @dg.asset_check(
        asset=dg.AssetKey([domain.name, arm.name, "selection"]),
        name=CHECK,
        blocking=True,
        description="The selection differs from the last published one by no more than the "
        "recipe's `refresh.limits`: overlap, shares of the sources, and drift of the scores of "
        "new shards against the other shards. "
        + (
            "A failure blocks the new dataset, and the last one stays current."
            if blocks
            else "A failure is a warning; the new dataset is written."
        ),
    )
    def changes_within_limits(
        artifacts: ArtifactStore, score_store: ScoreStore
    ) -> dg.AssetCheckResult:
        chosen = artifacts.current(f"{domain.name}/{arm.name}/selection")
        with score_store.read() as connection:
            last = last_published(connection, domain, arm)
            if last is None or last.arm != arm.name:
                return dg.AssetCheckResult(passed=True, description="first selection of this arm")
            if last.selection == chosen.fingerprint:
                return dg.AssetCheckResult(
                    passed=True, description="identical to the last published selection"
                )
            found, shown = _compare(connection, artifacts, domain, arm, chosen, last)
        beyond = _beyond(found, limits)
        words = "; ".join(beyond) or "within the limits"
        if beyond and blocks:
            words += (
                f". The dataset of {last.created} stays current. To publish this selection, relax "
                "refresh.limits in the recipe, or materialize only the assets after it in the web "
                "UI"
            )
        return dg.AssetCheckResult(
            passed=not beyond,
            severity=dg.AssetCheckSeverity.ERROR if blocks else dg.AssetCheckSeverity.WARN,
            description=words,
            metadata={**{k: v for k, v in found.items() if v is not None}, **shown},
        )

    return changes_within_limits


def _compare(
    connection: "duckdb.DuckDBPyConnection",
    artifacts: ArtifactStore,
    domain: Domain,
    arm: Arm,
    selection: Artifact,
    last: Published,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figures that have limits, and further metadata to show."""
    chosen = pl.read_parquet(selection.path / "selection.parquet")
    by_source = shares(connection, chosen, last)
    found = {
        **in_and_out(connection, chosen, last),
        "source_shift": max((abs(row["now"] - row["last"]) for row in by_source), default=0.0),
        "drift": None,
    }
    shown: dict[str, Any] = {"last published": last.created, "shares of tokens": table(by_source)}
    new = _new_shards(artifacts, selection, last)
    conditional = artifacts.current(f"{domain.name}/conditional_model").fingerprint
    if new and last.conditional == conditional:
        drifted = drift(connection, arm.method, domain.name, new)
        found["drift"] = drifted.size
        shown["new shards"] = len(new)
        shown["sequences in new shards"] = drifted.new
        shown["mean score in new shards"] = drifted.mean_new
        shown["mean score in other shards"] = drifted.mean_others
        counts, low, high = histogram(connection, arm.method, domain.name, new)
        sides = dict(zip(("other shards", "new shards"), counts.tolist(), strict=True))
        shown["scores of new shards"] = picture(binned_scores(sides, low, high))
    return found, shown


def _new_shards(artifacts: ArtifactStore, selection: Artifact, last: Published) -> list[str]:
    """Return the corpus's shards that, by the ledger, the last selection was not built from."""
    made = {(e["asset"], e["fingerprint"]): e["inputs"] for e in artifacts.ledger}
    before = made.get((selection.asset, last.selection), {}).get("score_tables")
    known = made.get(("score_tables", before), {}).items()
    now = {s.name: artifacts.current("corpus_tokens", s.name) for s in artifacts.at.shards()}
    return [
        shard for shard, packed in now.items() if (packed.name, packed.fingerprint) not in known
    ]


def _beyond(found: dict[str, Any], limits: Limits) -> list[str]:
    """Describe each figure that is beyond its limit."""
    words = []
    if found["overlap"] < limits.overlap:
        words.append(f"overlap {found['overlap']:.3f} is below {limits.overlap}")
    if found["source_shift"] > limits.source_shift:
        words.append(
            f"a source's share moved by {found['source_shift']:.3f}, more than "
            f"{limits.source_shift}"
        )
    if found["drift"] is not None and abs(found["drift"]) > limits.drift:
        words.append(
            f"the scores of new shards drifted by {found['drift']:+.3f} standard deviations, more "
            f"than {limits.drift}"
        )
    return words
