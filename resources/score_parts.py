"""Parts of the score tables: how each is inserted and removed."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import duckdb

from colorfilter.selection.sql import fetch_row, parquet


@dataclass(frozen=True)
class Part:
    """A unit to publish: the text tables of a shard, or a model's losses over a shard.

    `documents`, `tokens` and `losses` are the folders of the shard's documents, its packed tokens
    and the chunks of losses.
    """

    shard: str
    fingerprint: str
    documents: Path | None = None
    tokens: Path | None = None
    model: str | None = None
    losses: Path | None = None

    @property
    def kind(self) -> str:
        return "text" if self.losses is None else "losses"


@dataclass(frozen=True)
class PublishedModel:
    """A checkpoint whose losses are published.

    `role` is 'prior', 'conditional' or 'domain_only'.
    """

    model: str
    role: str
    domain: str | None
    path: str


# (kind, shard, model or domain, fingerprint). Derived tables also have keys; their fingerprints
# cover everything that they are derived from.
Key = tuple[str, str, str | None, str]


def exclusion(parts: Sequence[Part], length: int) -> Key:
    """Return the key of the excluded sequences, which covers the texts they are derived from."""
    texts = sorted((p.shard, p.fingerprint) for p in parts if p.kind == "text")
    return "excluded", "", None, hashlib.sha256(repr((length, texts)).encode()).hexdigest()


def pairs(parts: Sequence[Part], models: Sequence[PublishedModel]) -> Iterator[Key]:
    """Yield a key per domain and shard of paired losses, which covers the losses they pair."""
    losses = {(p.model, p.shard): p.fingerprint for p in parts if p.kind == "losses"}
    priors = [m.model for m in models if m.role == "prior"]
    domains = {m.model: m.domain for m in models if m.role == "conditional"}
    for (model, shard), prior in itertools.product(losses, priors):
        if model in domains and (prior, shard) in losses:
            found = prior, losses[prior, shard], model, losses[model, shard]
            yield "pairs", shard, domains[model], " ".join(found)


# By kind of part: the tables with its rows, their key columns, and the matching columns of `parts`.
ROWS = {
    "text": (("documents", "spans", "sequences"), "shard", "shard"),
    "losses": (("losses",), "shard, model", "shard, model"),
    "pairs": (("paired_losses",), "shard, domain", "shard, model"),
}


def remove(connection: duckdb.DuckDBPyConnection, parts: Set[Key]) -> None:
    """Remove parts and their rows, in a single pass over each table."""
    if not parts:
        return
    connection.execute("CREATE OR REPLACE TEMP TABLE gone AS FROM parts LIMIT 0")
    connection.executemany("INSERT INTO gone VALUES (?, ?, ?, ?)", [list(key) for key in parts])
    for kind, (tables, columns, key) in ROWS.items():
        if any(part[0] == kind for part in parts):
            for table in tables:
                connection.execute(
                    f"DELETE FROM {table} "
                    f"WHERE ({columns}) IN (SELECT ({key}) FROM gone WHERE kind = ?)",
                    [kind],
                )
    connection.execute(
        "DELETE FROM parts USING gone WHERE parts.kind = gone.kind AND parts.shard = gone.shard "
        "AND parts.model IS NOT DISTINCT FROM gone.model"
    )
    connection.execute("DROP TABLE gone")


def insert(connection: duckdb.DuckDBPyConnection, part: Part) -> None:
    """Insert a part. Raises ValueError for losses that are not finite or occur twice."""
    if part.losses is not None:
        _insert_losses(connection, part)
        return
    assert part.tokens is not None
    assert part.documents is not None
    for table in ("spans", "sequences"):
        connection.execute(
            f"INSERT INTO {table} BY NAME SELECT $shard AS shard, * FROM {parquet('$file')}",
            {"shard": part.shard, "file": str(part.tokens / f"{table}.parquet")},
        )
    connection.execute(
        f"""
        INSERT INTO documents BY NAME
        SELECT $shard AS shard, d.* EXCLUDE (text), s.n_tokens
        FROM {parquet("$documents")} AS d
        LEFT JOIN (
            SELECT doc_id, sum(n_tokens)::BIGINT AS n_tokens
            FROM {parquet("$spans")} GROUP BY doc_id
        ) AS s USING (doc_id)
        """,
        {
            "shard": part.shard,
            "documents": str(part.documents / "documents.parquet"),
            "spans": str(part.tokens / "spans.parquet"),
        },
    )


def _insert_losses(connection: duckdb.DuckDBPyConnection, part: Part) -> None:
    """Check and insert a model's losses over one shard.

    One part is loaded at a time, so that memory does not grow with the table.
    """
    assert part.losses is not None
    files = sorted(str(p) for p in part.losses.glob("losses-*.parquet"))
    if not files:
        return
    wanted = {"model": part.model, "shard": part.shard}
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE part AS "
        f"SELECT * FROM {parquet('$files')} WHERE model = $model AND shard = $shard",
        {"files": files, **wanted},
    )
    bad, twice = fetch_row(
        connection,
        "SELECT count(*) FILTER (NOT isfinite(loss)), count(*) - count(DISTINCT position) "
        "FROM part",
    )
    if bad:
        raise ValueError(f"{bad} losses of {part.shard} are not finite; nothing was published")
    if twice:
        raise ValueError(
            f"{twice} sequences of {part.shard} have several losses with one model; "
            "nothing was published"
        )
    connection.execute("INSERT INTO losses BY NAME FROM part")
    connection.execute("DROP TABLE part")
