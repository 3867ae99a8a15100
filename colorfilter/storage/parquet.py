"""Writing rows to Parquet in batches of bounded size, so that memory stays constant."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BATCH_BYTES = 8 * 2**20
BATCH_ROWS = 8_192  # bounds small rows too, which take ten times their size as Python objects


class TableWriter:
    """Writes a Parquet file row by row."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def add(self, row: dict[str, Any], size: int = 100) -> None:
        """Append a row; `size` is its approximate size in bytes."""
        self._rows.append(row)
        self._bytes += size
        if self._bytes >= BATCH_BYTES or len(self._rows) >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows, self._bytes = [], 0
