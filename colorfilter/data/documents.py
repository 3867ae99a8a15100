"""Reading raw files into documents as a stream, with a record of everything rejected.

Files are read line by line (JSON Lines), in batches of rows (Parquet) or as a whole (text, up to
16 MiB), so memory does not grow with file size. Unusable records and exact duplicates within a
shard are written to a rejects table with the reason. The sha256 of every file is computed while
reading it.
"""

import ast
import codecs
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from colorfilter.config.recipe import Source
from colorfilter.data.shards import InputFile
from colorfilter.errors import InputError, one_line
from colorfilter.progress import Progress, silent
from colorfilter.storage.parquet import TableWriter

MAX_DOCUMENT_BYTES = 16 * 2**20

DOCUMENTS = pa.schema(
    [
        ("doc_id", pa.string()),
        ("source_file", pa.string()),
        ("source_line", pa.int64()),
        ("source", pa.string()),
        ("n_chars", pa.int64()),
        ("sha256", pa.string()),
        ("extra", pa.string()),
        ("text", pa.string()),
    ]
)
REJECTS = pa.schema(
    [
        ("source_file", pa.string()),
        ("source_line", pa.int64()),
        ("source", pa.string()),
        ("reason", pa.string()),
        ("excerpt", pa.string()),
    ]
)
FILES = pa.schema(
    [
        ("source", pa.string()),
        ("path", pa.string()),
        ("uri", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    zlib.error,
    pa.ArrowException,
)


class Document(NamedTuple):
    """A text with its file, its line and its other fields."""

    file: str
    line: int
    text: str
    extra: dict[str, Any]


class Row(NamedTuple):
    """A record as read from a file, with its line or row number."""

    line: int
    value: Any


class Reject(NamedTuple):
    """A record that could not be used, and why."""

    file: str
    line: int
    reason: str
    excerpt: str


class Hashed(io.RawIOBase):
    """A binary stream that is read once from start to end and hashes what is read."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._sha256 = hashlib.sha256()
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self._sha256.update(data)
        self.size += len(data)
        return len(data)

    def hexdigest(self) -> str:
        """Read the rest of the stream and return the sha256 of the complete stream."""
        while self.readinto(bytearray(2**20)):
            pass
        return self._sha256.hexdigest()


def content_of(file: InputFile) -> dict[str, Any]:
    """Return the current size and sha256 of a file as a row of FILES.

    Raises OSError if it cannot be read.
    """
    with fsspec.open(file.uri, "rb") as raw:
        return _content(file, Hashed(raw))


def _content(file: InputFile, read: Hashed) -> dict[str, Any]:
    digest = read.hexdigest()
    return {
        "source": file.source,
        "path": file.path,
        "uri": file.uri,
        "bytes": read.size,
        "sha256": digest,
    }


Contents = list[dict[str, Any]]


def read_file(
    file: InputFile, source: Source, contents: Contents | None = None
) -> Iterator[Document | Reject]:
    """Yield one file's documents and rejects in file order.

    See read_rows for `contents` and exceptions.
    """
    for row in read_rows(file, source, contents):
        if isinstance(row, Row):
            yield _document(file.uri, row, source.text_field)
        else:
            yield row


def read_rows(
    file: InputFile, source: Source, contents: Contents | None = None
) -> Iterator[Row | Reject]:
    """Yield one file's records and rejects in file order.

    After the last record, a row of FILES with the sha256 of the file is appended to `contents`.
    Raises InputError if the file is unreadable or its format is unknown.
    """
    path, compression = file.uri, None
    for suffix, name in COMPRESSIONS.items():
        if path.endswith(suffix):
            path, compression = path.removesuffix(suffix), name
    kind = source.format or SUFFIXES.get(Path(path).suffix)
    if kind is None:
        raise InputError(
            f"source {source.name}: {file.uri}: unknown suffix; set the source's `format` to "
            "jsonl, parquet or text"
        )
    read = {"jsonl": _jsonl, "parquet": _parquet, "text": _text, "python_dict": _python_dict}[kind]
    try:
        with fsspec.open(file.uri, "rb") as raw:
            hashed = Hashed(raw)
            # Parquet is not read sequentially, so it is hashed in a separate pass.
            begun = raw if kind == "parquet" else io.BufferedReader(hashed)
            with _decompressed(begun, compression) as stream:
                yield from read(stream, file.uri, source.text_field)
                if contents is not None:
                    contents.append(
                        content_of(file) if kind == "parquet" else _content(file, hashed)
                    )
    except UNREADABLE as error:
        raise InputError(
            f"source {source.name}: {file.uri} cannot be read ({one_line(error)}); fix or "
            "exclude it"
        ) from error


def _decompressed(raw: BinaryIO, compression: str | None) -> BinaryIO:
    if compression == "gzip":
        return cast("BinaryIO", gzip.open(raw))
    if compression == "zstd":
        # Unlike zstandard's own reader, Arrow's detects truncated files.
        return cast("BinaryIO", io.BufferedReader(pa.CompressedInputStream(raw, "zstd")))
    return raw


def _jsonl(stream: BinaryIO, uri: str, _field: str) -> Iterator[Row | Reject]:
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MAX_DOCUMENT_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_DOCUMENT_BYTES)
            yield Reject(uri, number, "longer than 16 MiB", "")
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield Reject(uri, number, "not UTF-8", excerpt(line))
        except (ValueError, RecursionError):
            blank = not line.strip()
            yield Reject(uri, number, "blank line" if blank else "not JSON", excerpt(line))
        else:
            yield Row(number, row)


def _parquet(stream: BinaryIO, _uri: str, _field: str) -> Iterator[Row | Reject]:
    number = 0
    for batch in pq.ParquetFile(stream).iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield Row(number, row)


def _text(stream: BinaryIO, uri: str, field: str) -> Iterator[Row | Reject]:
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        yield Reject(uri, 1, "longer than 16 MiB", excerpt(data[:200]))
        return
    try:
        yield Row(1, {field: data.decode("utf-8-sig")})
    except UnicodeDecodeError:
        yield Reject(uri, 1, "not UTF-8", excerpt(data[:200]))


def _python_dict(stream: BinaryIO, _uri: str, field: str) -> Iterator[Row | Reject]:
    """Yield the constant values of a module's dict literals; the module is parsed, never run."""
    for statement in ast.parse(stream.read()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for key, value in zip(statement.value.keys, statement.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield Row(value.lineno, {"key": key.value, field: value.value})


def _document(uri: str, found: Row, field: str) -> Document | Reject:
    line, row = found
    if not isinstance(row, dict) or row.get(field) is None:
        return Reject(uri, line, f"no field '{field}'", excerpt(str(row)))
    text = row[field]
    if not isinstance(text, str):
        return Reject(uri, line, f"field '{field}' is not a string", excerpt(str(row)))
    if not text.strip():
        return Reject(uri, line, "empty", excerpt(str(row)))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Reject(uri, line, "lone surrogate in the text", excerpt(ascii(text)))
    return Document(uri, line, text, {k: v for k, v in row.items() if k != field})


def excerpt(value: str | bytes) -> str:
    """Return the first 200 characters of a rejected record, as valid UTF-8 text."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return text[:200].encode("utf-8", "replace").decode("utf-8")


def text_sha256(text: str) -> str:
    """Return the sha256 of a text in UTF-8, the identity used to find duplicates."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def document_id(source: str, path: str, line: int, sha256: str) -> str:
    """Return a document's id, which depends only on its source, path, line and text."""
    return hashlib.sha256(f"{source}\n{path}\n{line}\n{sha256}".encode()).hexdigest()[:20]


def write_documents(
    files: Sequence[InputFile],
    sources: Sequence[Source],
    folder: Path,
    progress: Progress = silent,
    unwanted: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Read files into `documents.parquet` and `rejects.parquet` in `folder`.

    Also writes `files.parquet`, with the size and sha256 of each file. `unwanted` maps the sha256
    of texts to reject to the reason; no excerpt of them is kept. `progress` is called with the size
    of each finished file. Returns counts: documents, chars, bytes, duplicates, rejects. Raises
    InputError for a file that cannot be read.
    """
    by_name = {s.name: s for s in sources}
    counts = dict.fromkeys(("documents", "chars", "bytes", "duplicates", "rejects"), 0)
    seen: set[bytes] = set()
    contents: Contents = []
    with (
        TableWriter(folder / "documents.parquet", DOCUMENTS) as documents,
        TableWriter(folder / "rejects.parquet", REJECTS) as rejects,
    ):
        for file in files:
            for found in read_file(file, by_name[file.source], contents):
                item = found
                if isinstance(item, Document):
                    size = len(item.text.encode("utf-8"))
                    sha256 = text_sha256(item.text)
                    if unwanted and sha256 in unwanted:
                        item = Reject(item.file, item.line, unwanted[sha256], "")
                    elif bytes.fromhex(sha256) not in seen:
                        seen.add(bytes.fromhex(sha256))
                        counts["documents"] += 1
                        counts["chars"] += len(item.text)
                        counts["bytes"] += size
                        documents.add(
                            {
                                "doc_id": document_id(file.source, file.path, item.line, sha256),
                                "source_file": item.file,
                                "source_line": item.line,
                                "source": file.source,
                                "n_chars": len(item.text),
                                "sha256": sha256,
                                "extra": json.dumps(item.extra, default=str),
                                "text": item.text,
                            },
                            size,
                        )
                        continue
                    else:
                        item = Reject(item.file, item.line, "duplicate", excerpt(item.text))
                counts["duplicates" if item.reason == "duplicate" else "rejects"] += 1
                rejects.add(
                    {
                        "source_file": item.file,
                        "source_line": item.line,
                        "source": file.source,
                        "reason": item.reason,
                        "excerpt": item.excerpt,
                    },
                    len(item.excerpt),
                )
            progress(file.size)
    write_contents(contents, folder)
    return counts


def write_contents(contents: Contents, folder: Path) -> None:
    """Write rows of FILES to `files.parquet`."""
    pq.write_table(pa.Table.from_pylist(contents, FILES), folder / "files.parquet")


def read_documents(
    path: Path, columns: Sequence[str] = ("doc_id", "sha256", "text")
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a documents table, skipping rows with empty text (redacted documents)."""
    for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=list(columns)):
        for row in batch.to_pylist():
            if row.get("text") != "" and row.get("n_chars") != 0:
                yield row
