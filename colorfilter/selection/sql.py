"""Helpers to read from a DuckDB connection, for DuckDB 1.5 and 2."""

from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import polars as pl

Parameters = Sequence[Any] | Mapping[str, Any]


def fetch(
    connection: duckdb.DuckDBPyConnection, query: str, parameters: Parameters = ()
) -> list[tuple[Any, ...]]:
    """Return all rows. A partially read result would block the connection in DuckDB 2."""
    return connection.execute(query, parameters).fetchall()


def fetch_row(
    connection: duckdb.DuckDBPyConnection, query: str, parameters: Parameters = ()
) -> tuple[Any, ...]:
    """Return the row of a query that always returns exactly one, such as an aggregate."""
    (row,) = fetch(connection, query, parameters)
    return row


def fetch_frame(
    connection: duckdb.DuckDBPyConnection, query: str, parameters: Mapping[str, Any]
) -> pl.DataFrame:
    """Return all rows as a polars frame."""
    return pl.DataFrame(connection.sql(query, params=dict(parameters)).to_arrow_table())


def parquet(files: str) -> str:
    """Return SQL that reads Parquet files, named by a parameter such as `$files`.

    A folder such as `date=2026-11-30` in their path is not read as a column.
    """
    return f"read_parquet({files}, hive_partitioning = false)"
