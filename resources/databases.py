"""DuckDB files that are replaced atomically, and copies of SQLite files that are in use.

A reader of a DuckDB file keeps reading the version that it opened.
"""

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import duckdb

from colorfilter.storage.files import lock, require_space, write_atomically

# Memory limits beyond which DuckDB spills to disk.
READING_MEMORY = "1GB"
PUBLISHING_MEMORY = "2GB"
# The newest storage version that every supported DuckDB version reads.
STORAGE_VERSION = "v1.2.0"


@contextlib.contextmanager
def next_version(
    path: Path, leases: Path, schema: str = "", fresh: bool = False
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Connect to a copy of a database; it replaces the database if the block raises no error.

    With `fresh` the copy starts empty. A lock in `leases` admits one writer at a time. Use several
    transactions for large changes, because a transaction keeps all its inserts in memory.
    """
    with lock(leases / path.name), _copied(path, schema, fresh) as connection:
        yield connection


@contextlib.contextmanager
def _copied(path: Path, schema: str, fresh: bool) -> Iterator[duckdb.DuckDBPyConnection]:
    temporary = path.with_suffix(".next")
    _unlink(temporary)
    if path.exists() and not fresh:
        require_space(path.parent, path.stat().st_size * 3 // 2, f"a new {path.name}")
        shutil.copyfile(path, temporary)
    connection = duckdb.connect()
    try:
        limit_memory(connection, path, PUBLISHING_MEMORY)
        attach(connection, temporary, "next", f"STORAGE_VERSION '{STORAGE_VERSION}'")
        connection.execute("USE next")
        connection.execute(schema)
        yield connection
        connection.execute("USE memory")
        connection.execute("DETACH next")
    except BaseException:
        connection.close()
        _unlink(temporary)
        raise
    connection.close()
    write_atomically(temporary, path)


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy the committed content of an SQLite database that may be in use.

    Creates the folder of the target. Raises OSError for a file that is not a database.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{source.as_uri()}?mode=rw", uri=True)) as read,
            contextlib.closing(sqlite3.connect(target)) as write,
        ):
            read.backup(write)
    except sqlite3.Error as error:
        raise OSError(f"{source}: {error}") from error


def _unlink(database: Path) -> None:
    """Remove a database and its write-ahead log, if they exist."""
    database.unlink(missing_ok=True)
    database.with_name(f"{database.name}.wal").unlink(missing_ok=True)


@contextlib.contextmanager
def transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Run the block in a transaction. After an error the caller must discard the database."""
    connection.execute("BEGIN")
    yield
    connection.execute("COMMIT")


def attach(
    connection: duckdb.DuckDBPyConnection, path: Path, name: str, options: str = "READ_ONLY"
) -> None:
    """Attach the database file at `path` as `name`."""
    quoted = str(path).replace("'", "''")
    connection.execute(f"ATTACH '{quoted}' AS {name} ({options})")


def limit_memory(connection: duckdb.DuckDBPyConnection, path: Path, memory: str) -> None:
    """Limit the memory of a connection; beyond it, DuckDB spills to a folder next to `path`."""
    connection.execute(f"SET memory_limit = '{memory}'")
    connection.execute("SET preserve_insertion_order = false")
    connection.execute("SET enable_progress_bar = false")
    connection.execute("SET temp_directory = ?", [str(path.with_suffix(".spill"))])
