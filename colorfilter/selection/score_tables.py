"""Tables that selection needs and that no arm changes, computed once from the published tables.

They are computed in the step that publishes scores, under its memory limit.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import duckdb
import polars as pl

from colorfilter.selection.sql import fetch, fetch_frame, fetch_row, parquet
from colorfilter.stages import IN_CORPUS

# Why a sequence is not a candidate, by the reason in the table `excluded`.
EXCLUDED = {
    "forgotten": "it contained a document that was forgotten",
    "padded": "the padded last sequence of its shard: too short",
    "copy": "it contains a document that is also in an earlier shard",
}

# A document that occurs in several shards counts once, in the first of them. A sequence that
# contains any part of a later copy is not a candidate, and neither is a shard's padded last one.
# A short hash finds possible copies, and only these are compared by sha256, because all sha256
# would not fit in memory. A forgotten document has 0 characters (colorfilter.data.redaction).
FORGOTTEN = f"""
    INSERT INTO excluded
    SELECT DISTINCT shard, position, 'forgotten'
    FROM spans JOIN documents USING (shard, doc_id)
    WHERE {IN_CORPUS} AND n_chars = 0
"""

PADDED = f"""
    INSERT INTO excluded
    SELECT shard, position, 'padded'
    FROM sequences ANTI JOIN excluded USING (shard, position)
    WHERE {IN_CORPUS} AND n_tokens < $length
"""

COPIES = f"""
    INSERT INTO excluded
    WITH repeated AS (
        SELECT hash(sha256) AS short FROM documents
        WHERE {IN_CORPUS}
        GROUP BY short HAVING count(*) > 1
    ),
    copies AS (
        SELECT shard, doc_id FROM documents
        WHERE {IN_CORPUS} AND hash(sha256) IN (FROM repeated)
        QUALIFY shard > min(shard) OVER (PARTITION BY sha256)
    )
    SELECT DISTINCT shard, position, 'copy'
    FROM spans JOIN copies USING (shard, doc_id) ANTI JOIN excluded USING (shard, position)
"""

# The rows with the losses of shards under a domain's current models. A part is inserted in one
# piece, so its first and last row tell DuckDB which row groups contain it. The shard's name does
# not: DuckDB keeps only the first eight characters per row group, and shard names begin alike.
PLACES = """
    SELECT
        shard, role, any_value(model) AS model, min(losses.rowid) AS first,
        max(losses.rowid) AS last
    FROM losses JOIN models USING (model)
    WHERE current AND (role = 'prior' OR role = 'conditional' AND domain = $domain)
        AND shard IN (SELECT unnest($shards::VARCHAR[]))
    GROUP BY shard, role
"""

PAIR = """
    INSERT INTO paired_losses
    SELECT $domain, $shard, position, p.loss, c.loss
    FROM losses AS c JOIN losses AS p USING (position)
    WHERE c.model = $conditional AND c.shard = $shard
        AND c.rowid BETWEEN $conditional_first AND $conditional_last
        AND p.model = $prior AND p.shard = $shard AND p.rowid BETWEEN $prior_first AND $prior_last
"""


def exclude(connection: duckdb.DuckDBPyConnection, length: int) -> None:
    """Rebuild `excluded`: one row for each corpus sequence that is not a candidate.

    The reason is a key of EXCLUDED; 'padded' means fewer than `length` real tokens.
    """
    connection.execute("DELETE FROM excluded")
    connection.execute(FORGOTTEN)
    connection.execute(PADDED, {"length": length})
    connection.execute(COPIES)


# Views of this connection only, which take precedence over the tables of the same names. Two
# domains may have refined the same prior loss: a domain's color uses its own.
OVERLAY = """
    CREATE TEMP VIEW losses AS
    SELECT model, shard, position, coalesce(exact.loss, published.loss) AS loss, n_tokens,
        coalesce(exact.precision, published.precision) AS precision
    FROM {database}.losses AS published
    LEFT JOIN (
        SELECT DISTINCT ON (model, shard, position) model, shard, position, loss, precision
        FROM refined_losses
    ) AS exact USING (model, shard, position);

    CREATE TEMP VIEW paired_losses AS
    SELECT domain, shard, position, coalesce(exact.prior, loss_prior) AS loss_prior,
        coalesce(exact.conditional, loss_conditional) AS loss_conditional
    FROM {database}.paired_losses
    LEFT JOIN (
        SELECT refined_losses.domain, shard, position,
            any_value(loss) FILTER (role = 'prior') AS prior,
            any_value(loss) FILTER (role = 'conditional') AS conditional
        FROM refined_losses JOIN {database}.models USING (model)
        GROUP BY ALL
    ) AS exact USING (domain, shard, position);

    CREATE TEMP VIEW color AS
    SELECT *, loss_conditional::DOUBLE - loss_prior::DOUBLE AS color FROM paired_losses;
"""


def overlay(connection: duckdb.DuckDBPyConnection, refined: Mapping[str, Path]) -> None:
    """Replace published losses by refined ones, given by domain, in this connection's views."""
    (database,) = fetch_row(connection, "SELECT current_database()")
    connection.execute(
        "CREATE TEMP TABLE refined_losses(domain VARCHAR, model VARCHAR, shard VARCHAR, "
        "position BIGINT, loss FLOAT, precision VARCHAR)"
    )
    for domain, table in refined.items():
        connection.execute(
            "INSERT INTO refined_losses BY NAME "
            "SELECT ? AS domain, model, shard, position, loss, precision "
            f"FROM {parquet('?')}",
            [domain, str(table)],
        )
    connection.execute(OVERLAY.format(database=database))


def changed_since_scored(connection: duckdb.DuckDBPyConnection) -> pl.DataFrame:
    """Return the sequences (shard, position) whose tokens are no longer those that were scored."""
    return fetch_frame(
        connection, "SELECT shard, position FROM excluded WHERE reason = 'forgotten'", {}
    )


def pair(connection: duckdb.DuckDBPyConnection, domain: str, shards: Collection[str]) -> None:
    """Rebuild a domain's rows of `paired_losses` for `shards` from `losses` and `models`.

    Code that changes losses in place must call this for the changed shards and for every domain
    whose prior or conditional model they belong to.
    """
    wanted = {"domain": domain, "shards": list(shards)}
    connection.execute(
        "DELETE FROM paired_losses "
        "WHERE domain = $domain AND shard IN (SELECT unnest($shards::VARCHAR[]))",
        wanted,
    )
    found: dict[str, dict[str, str | int]] = {}
    for shard, role, model, first, last in fetch(connection, PLACES, wanted):
        rows = {role: model, f"{role}_first": first, f"{role}_last": last}
        found.setdefault(shard, {"domain": domain, "shard": shard}).update(rows)
    for shard in sorted(found):
        if {"prior", "conditional"} <= found[shard].keys():
            connection.execute(PAIR, found[shard])
