"""What selection needs and no arm changes, worked out once from the published tables.

Both run inside the transaction that publishes, under its memory limit.
"""

import duckdb

# A document that occurs in several shards counts once: in the first of them. A sequence that
# carries any piece of a later copy is no candidate, and neither is a shard's padded last one.
# Only what repeats by a short hash is compared by sha256: memory does not hold every sha256.
# A document whose text was withdrawn has 0 characters (colorfilter.withdrawal).
FORGOTTEN = """
    INSERT INTO excluded
    SELECT DISTINCT shard, position, 'forgotten'
    FROM spans JOIN documents USING (shard, doc_id)
    WHERE NOT starts_with(shard, '_') AND n_chars = 0
"""

PADDED = """
    INSERT INTO excluded
    SELECT shard, position, 'padded'
    FROM sequences ANTI JOIN excluded USING (shard, position)
    WHERE NOT starts_with(shard, '_') AND n_tokens < $length
"""

COPIES = """
    INSERT INTO excluded
    WITH repeated AS (
        SELECT hash(sha256) AS short FROM documents
        WHERE NOT starts_with(shard, '_')
        GROUP BY short HAVING count(*) > 1
    ),
    copies AS (
        SELECT shard, doc_id FROM documents
        WHERE NOT starts_with(shard, '_') AND hash(sha256) IN (FROM repeated)
        QUALIFY shard > min(shard) OVER (PARTITION BY sha256)
    )
    SELECT DISTINCT shard, position, 'copy'
    FROM spans JOIN copies USING (shard, doc_id) ANTI JOIN excluded USING (shard, position)
"""

PAIR = """
    INSERT INTO paired_losses
    SELECT c_model.domain, c.shard, c.position, p.loss, c.loss
    FROM losses AS c
    JOIN models AS c_model
        ON c_model.model = c.model AND c_model.role = 'conditional' AND c_model.current
    JOIN losses AS p ON p.position = c.position
    JOIN models AS p_model
        ON p_model.model = p.model AND p_model.role = 'prior' AND p_model.current
    WHERE c_model.domain = $domain AND c.shard = $shard AND p.shard = $shard
"""


def exclude(connection: duckdb.DuckDBPyConnection, length: int) -> None:
    """Fill `excluded` anew: the corpus sequences that are no candidates, one row each.

    The reason is 'forgotten', for any piece of a document whose text was withdrawn; 'padded', for
    fewer than `length` real tokens; or 'copy', for any piece of a document that stands in an
    earlier shard too.
    """
    connection.execute("DELETE FROM excluded")
    connection.execute(FORGOTTEN)
    connection.execute(PADDED, {"length": length})
    connection.execute(COPIES)


def pair(connection: duckdb.DuckDBPyConnection, domain: str, shard: str) -> None:
    """Make a domain's rows of `paired_losses` over a shard anew from `losses` and `models`.

    What changes losses in place calls this for every shard it changed and every domain whose
    prior or conditional they are by.
    """
    unpair(connection, domain, shard)
    connection.execute(PAIR, {"domain": domain, "shard": shard})


def unpair(connection: duckdb.DuckDBPyConnection, domain: str, shard: str) -> None:
    """Take a domain's rows over a shard out of `paired_losses`."""
    connection.execute("DELETE FROM paired_losses WHERE domain = ? AND shard = ?", [domain, shard])
