import gzip
import hashlib
import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from colorfilter.config.recipe import Source
from colorfilter.data import documents
from colorfilter.data.documents import (
    Document,
    Reject,
    read_file,
    text_sha256,
    write_documents,
)
from colorfilter.data.shards import list_files
from colorfilter.errors import InputError


def source_of(files: object, **more: Any) -> Source:
    return Source(name="web", files=str(files), **more)


def read(source: Source) -> list[Document | Reject]:
    return [found for file in list_files([source]) for found in read_file(file, source)]


def written(source: Source, folder: Path) -> tuple[dict[str, int], pl.DataFrame, pl.DataFrame]:
    folder.mkdir(parents=True, exist_ok=True)
    counts = write_documents(list_files([source]), [source], folder)
    return (
        counts,
        pl.read_parquet(folder / "documents.parquet"),
        pl.read_parquet(folder / "rejects.parquet"),
    )


def jsonl(*texts: object, **more: object) -> bytes:
    return b"".join(json.dumps({"text": t, **more}).encode() + b"\n" for t in texts)


def packing(suffix: str, data: bytes) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    return zstandard.compress(data) if suffix == ".zst" else data


# Reading -------------------------------------------------------------------------------------

TEXTS = ["first text", "zweiter Text, größer", "第三\u2028の文 😀"]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_json_lines_are_read_with_line_numbers_and_other_fields(
    tmp_path: Path, compression: str
) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(packing(compression, jsonl(*TEXTS, url="u", tags=[1, {"a": None}])))
    found = read(source_of(path))
    extra = {"url": "u", "tags": [1, {"a": None}]}
    assert found == [Document(str(path), i + 1, t, extra) for i, t in enumerate(TEXTS)]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.txt{compression}"
    text = "\n".join(TEXTS) + "\n"
    path.write_bytes(packing(compression, text.encode()))
    assert read(source_of(path)) == [Document(str(path), 1, text, {})]


def test_parquet_is_read_over_row_groups_with_other_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"text {i}" for i in range(700)]
    pq.write_table(pa.table({"text": texts, "n": range(700)}), path, row_group_size=300)
    found = read(source_of(path))
    assert found == [Document(str(path), i + 1, t, {"n": i}) for i, t in enumerate(texts)]


def test_python_dict_reads_string_values_and_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "topics.py"
    path.write_text("raise SystemExit\ntopics = {'one': 'text of one',\n 'two': f(), 'three': 3}\n")
    first, second = read(source_of(path, format="python_dict"))
    assert first == Document(str(path), 2, "text of one", {"key": "one"})
    assert isinstance(second, Reject)
    assert second.reason == "field 'text' is not a string"


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_json_lines_are_known_by_suffix(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(jsonl("text"))
    assert [d.text for d in read(source_of(tmp_path / "*"))] == ["text"]


def test_the_format_overrules_the_suffix_and_the_text_field_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_text('{"content": "text", "text": "other"}\n')
    (found,) = read(source_of(tmp_path / "*", format="jsonl", text_field="content"))
    assert found == Document(str(tmp_path / "a.dat"), 1, "text", {"text": "other"})


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_text("x")
    with pytest.raises(InputError, match=r"source web: .*a\.dat: unknown suffix"):
        read(source_of(tmp_path / "*"))


def test_a_last_line_without_newline_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("one", "two").rstrip(b"\n"))
    assert [d.text for d in read(source_of(tmp_path / "*"))] == ["one", "two"]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_file_of_several_compressed_members_is_read_to_its_end(
    tmp_path: Path, compression: str
) -> None:
    data = packing(compression, jsonl("one")) + packing(compression, jsonl("two"))
    (tmp_path / f"a.jsonl{compression}").write_bytes(data)
    assert [d.text for d in read(source_of(tmp_path / "*"))] == ["one", "two"]


def damaged_files() -> Iterator[Any]:
    lines = jsonl(*(f"{i} {random.Random(i).random()}" for i in range(3000)))
    for suffix in (".gz", ".zst"):
        whole = packing(suffix, lines)
        name = f"a.jsonl{suffix}"
        yield pytest.param(name, whole[: len(whole) // 2], id=f"{suffix} cut off")
        middle = len(whole) // 2
        bad = whole[:middle] + b"\xff" * 64 + whole[middle + 64 :]
        yield pytest.param(name, bad, id=f"{suffix} changed in the middle")
        yield pytest.param(name, whole[:12] + b"\xff" * 64, id=f"{suffix} changed at the beginning")
        yield pytest.param(name, b"nothing compressed", id=f"{suffix} not compressed")
    yield pytest.param("a.parquet", b"PAR1 but no more", id="parquet")


@pytest.mark.parametrize(("name", "data"), damaged_files())
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"source web: .*{name} cannot be read") as raised:
        read(source_of(tmp_path / "*"))
    assert "\n" not in str(raised.value)


def test_a_module_that_does_not_parse_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def (")
    with pytest.raises(InputError, match=r"a\.py cannot be read"):
        read(source_of(tmp_path / "*", format="python_dict"))


# Rejects -------------------------------------------------------------------------------------

BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"text": "\xff\xfe"}', "not UTF-8"),
    (b'{"text": "cut', "not JSON"),
    (b"   ", "blank line"),
    (b'{"body": "x"}', "no field 'text'"),
    (b'{"text": null}', "no field 'text'"),
    (b'["text"]', "no field 'text'"),
    (b'{"text": 5}', "field 'text' is not a string"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n\\t "}', "empty"),
    (b'{"text": "a\\ud800b"}', "lone surrogate in the text"),
    (b"[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(
    ("line", "reason"), BAD_LINES, ids=[f"{r} {i}" for i, (_, r) in enumerate(BAD_LINES)]
)
def test_an_unusable_line_is_a_reject_with_reason_and_line_and_reading_goes_on(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl("before") + line + b"\n" + jsonl("after"))
    counts, kept, rejects = written(source_of(path), tmp_path / "out")
    assert kept["text"].to_list() == ["before", "after"]
    assert kept["source_line"].to_list() == [1, 3]
    assert rejects.select("source_file", "source_line", "source", "reason").rows() == [
        (str(path), 2, "web", reason)
    ]
    assert (counts["documents"], counts["rejects"], counts["duplicates"]) == (2, 1, 0)


@pytest.mark.parametrize("excess", [1, 900, 901, 5_000])
def test_an_overlong_line_is_a_reject_and_the_next_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excess: int
) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1_000)
    path = tmp_path / "a.jsonl"
    head = len(jsonl(""))
    path.write_bytes(jsonl("before", "x" * (1_000 - head + excess), "after"))
    _, kept, rejects = written(source_of(path), tmp_path / "out")
    assert kept["text"].to_list() == ["before", "after"]
    assert kept["source_line"].to_list() == [1, 3]
    assert rejects["source_line"].to_list() == [2]
    assert rejects["reason"][0].startswith("longer than")


def test_a_line_of_exactly_the_largest_size_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1_000)
    (tmp_path / "a.jsonl").write_bytes(jsonl("x" * (1_000 - len(jsonl("")))))
    (found,) = read(source_of(tmp_path / "*"))
    assert isinstance(found, Document)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"\xff\xfe", "not UTF-8"), (b" \n ", "empty"), (b"", "empty"), (b"x" * 2_000, "longer than")],
)
def test_an_unusable_text_file_is_a_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, reason: str
) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1_000)
    (tmp_path / "a.txt").write_bytes(data)
    (found,) = read(source_of(tmp_path / "*"))
    assert isinstance(found, Reject)
    assert found.line == 1
    assert found.reason.startswith(reason)


@given(st.lists(st.binary(max_size=40).filter(lambda b: b"\n" not in b), max_size=20))
def test_every_line_is_a_document_or_a_reject(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert [found.line for found in read(source_of(path))] == list(range(1, len(lines) + 1))


# Documents and duplicates --------------------------------------------------------------------


def test_duplicates_are_dropped_counted_and_kept_as_rejects(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("one", "two", "one"))
    (tmp_path / "b.jsonl").write_bytes(jsonl("two", "three"))
    counts, kept, rejects = written(source_of(tmp_path / "*.jsonl"), tmp_path / "out")
    assert kept["text"].to_list() == ["one", "two", "three"]
    assert rejects.select("reason", "source_line", "excerpt").rows() == [
        ("duplicate", 3, "one"),
        ("duplicate", 1, "two"),
    ]
    assert counts == {"documents": 3, "chars": 11, "bytes": 11, "duplicates": 2, "rejects": 0}


def test_a_document_carries_its_place_size_hash_and_extra_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl("größe", url="ü", meta={"n": [1, None]}))
    counts, kept, _ = written(source_of(path), tmp_path / "out")
    (row,) = kept.to_dicts()
    assert row["source_file"] == str(path)
    assert row["source"] == "web"
    assert row["n_chars"] == 5
    assert row["sha256"] == text_sha256("größe")
    assert json.loads(row["extra"]) == {"url": "ü", "meta": {"n": [1, None]}}
    assert counts["bytes"] == 7


def test_a_lone_surrogate_in_another_field_does_not_stop_the_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "title": "\\ud800"}\n{"text": "two"}\n')
    counts, _, _ = written(source_of(path), tmp_path / "out")
    assert counts["documents"] + counts["rejects"] == 2
    assert counts["documents"] >= 1


def test_ids_do_not_depend_on_where_the_data_lies(tmp_path: Path) -> None:
    ids = []
    for root in ("here", "over/there"):
        folder = tmp_path / root / "data" / "sub"
        folder.mkdir(parents=True)
        (folder / "a.jsonl").write_bytes(jsonl("one", "two"))
        source = source_of(tmp_path / root / "data" / "**" / "*.jsonl")
        ids.append(written(source, tmp_path / root / "out")[1]["doc_id"].to_list())
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


def test_ids_tell_place_and_text_apart() -> None:
    places = [
        ("web", "a", 1, "x"),
        ("web", "a", 2, "x"),
        ("web", "b", 1, "x"),
        ("wiki", "a", 1, "x"),
    ]
    ids = {documents.document_id(*p) for p in [*places, ("web", "a", 1, "y")]}
    assert len(ids) == 5


def test_progress_adds_up_to_the_size_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("one"))
    (tmp_path / "b.jsonl").write_bytes(jsonl("two", "three"))
    source = source_of(tmp_path / "*.jsonl")
    done: list[int] = []
    write_documents(list_files([source]), [source], tmp_path, done.append)
    assert sum(done) == sum(p.stat().st_size for p in tmp_path.glob("*.jsonl"))


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    def peak(n: int) -> int:
        path = tmp_path / f"{n}.jsonl"
        path.write_bytes(b"".join(jsonl(f"{i} " + "word " * 400) for i in range(n)))
        source = source_of(path)
        (file,) = list_files([source])
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_file(file, source)) == n
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)
    assert peak(4_000) < 1.2 * peak(1_000) + 50_000


def test_documents_come_from_any_file_system(tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/remote_corpus/sub/a.jsonl", jsonl("one"))
    filesystem.pipe("/remote_corpus/sub/b.jsonl.gz", gzip.compress(jsonl("two")))
    try:
        source = source_of("memory://remote_corpus/**/*.jsonl*")
        files = list_files([source])
        assert [f.path for f in files] == ["sub/a.jsonl", "sub/b.jsonl.gz"]
        assert files[0].size == len(jsonl("one"))
        _, kept, _ = written(source, tmp_path)
        assert kept["text"].to_list() == ["one", "two"]
        assert kept["source_file"][0].startswith("memory://")
    finally:
        filesystem.rm("/remote_corpus", recursive=True)


def test_a_file_that_vanished_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("one"))
    source = source_of(tmp_path / "*")
    (file,) = list_files([source])
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        list(read_file(file, source))


@pytest.mark.parametrize("form", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_every_file_is_recorded_with_the_hash_of_its_bytes(form: str, tmp_path: Path) -> None:
    path = tmp_path / form
    if form == "a.parquet":
        pl.DataFrame({"text": TEXTS}).write_parquet(path)
    else:
        path.write_bytes(packing(path.suffix, jsonl(*TEXTS) * 5_000))
    written(source_of(path), tmp_path / "out")
    (row,) = pl.read_parquet(tmp_path / "out" / "files.parquet").to_dicts()
    data = path.read_bytes()
    assert row == {
        "source": "web",
        "path": form,
        "uri": str(path),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (file,) = list_files([source_of(path)])
    assert documents.content_of(file) == row
