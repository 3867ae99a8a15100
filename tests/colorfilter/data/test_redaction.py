"""Redacted copies of tables and tokens lack the document and nothing else."""

import hashlib
import html
import json
import random
import string
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from colorfilter.config.recipe import Source
from colorfilter.data import redaction, tokens
from colorfilter.data.documents import read_documents, text_sha256, write_documents
from colorfilter.data.redaction import (
    Forgotten,
    holding_files,
    touched_sequences,
    write_redacted,
)
from colorfilter.data.shards import InputFile

TEXTS = [f"Document {i}. " + " ".join(f"word{i}x{j}" for j in range(5 + 7 * i)) for i in range(9)]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A shard of documents, the fourth of which stands twice in the file."""
    path = tmp_path / "texts.jsonl"
    rows = [{"text": t, "author": f"someone {i}"} for i, t in enumerate([*TEXTS, TEXTS[3]])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = InputFile("web", path.name, str(path), path.stat().st_size, "1")
    folder = tmp_path / "raw"
    folder.mkdir()
    write_documents([file], [Source(name="web", files=str(path))], folder)
    return folder


def forgotten(raw: Path, which: int) -> Forgotten:
    row = pl.read_parquet(raw / "documents.parquet").row(which, named=True)
    place = f"{row['source_file']}:{row['source_line']}"
    return Forgotten(row["sha256"], {row["doc_id"]}, {place}, row["text"])


def packed(raw: Path, encoder: tokens.Encoder, examples: bool) -> Path:
    out = raw.parent / "packed"
    rows = read_documents(raw / "documents.parquet")
    pack = tokens.pack_examples if examples else tokens.pack
    out.mkdir()
    pack(rows, encoder, 16, out)
    return out


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tokens.Encoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens.train_tokenizer(TEXTS, 300, folder)
    return tokens.Encoder(folder)


def redacted(folder: Path, *documents: Forgotten) -> Path:
    """A copy of a folder without documents."""
    target = folder.with_name(f"{folder.name}-redacted")
    write_redacted(folder, target, documents, holding_files(folder, documents))
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_table_loses_texts_and_what_they_carried(raw: Path) -> None:
    before, gone = contents(raw), [forgotten(raw, 3), forgotten(raw, 5)]
    table = pl.read_parquet(raw / "documents.parquet")
    assert holding_files(raw, gone) == ["documents.parquet", "rejects.parquet"]
    new = redacted(raw, *gone)
    after = pl.read_parquet(new / "documents.parquet")
    for row in (3, 5):
        assert after.row(row, named=True)["text"] == ""
        assert after[row, "extra"] == "{}"
        assert after[row, "n_chars"] == 0
    kept = ["doc_id", "source_file", "source_line", "source", "sha256"]
    assert after.select(kept).equals(table.select(kept))
    others = ~pl.int_range(pl.len()).is_in([3, 5])
    assert after.filter(others).equals(table.filter(others))
    assert after.schema == table.schema
    assert holding_files(new, gone) == []
    texts = [row["text"] for row in read_documents(new / "documents.parquet")]
    assert texts == TEXTS[:3] + TEXTS[4:5] + TEXTS[6:]
    assert contents(raw) == before  # an artifact never changes
    assert (new / "files.parquet").samefile(raw / "files.parquet")


def test_what_was_rejected_as_its_copy_loses_its_beginning(raw: Path) -> None:
    path = raw / "rejects.parquet"
    assert pl.read_parquet(path)["excerpt"].to_list() == [TEXTS[3][:200]]
    assert holding_files(raw, [forgotten(raw, 4)]) == ["documents.parquet"]
    new = redacted(raw, forgotten(raw, 3))
    rejects = pl.read_parquet(new / "rejects.parquet")
    assert rejects.select("reason", "excerpt").row(0) == ("duplicate", "")


@pytest.mark.parametrize("which", [0, 4, 8])
@pytest.mark.parametrize("examples", [False, True])
def test_tokens_become_end_of_text_and_no_other_moves(
    raw: Path, encoder: tokens.Encoder, which: int, examples: bool
) -> None:
    out, gone = packed(raw, encoder, examples), forgotten(raw, which)
    files = contents(out)
    before = np.array(tokens.open_tokens(out))
    rows = pl.read_parquet(out / "sequences.parquet")
    spans = pl.read_parquet(out / "spans.parquet")
    touched = touched_sequences(out, gone)
    assert holding_files(out, [gone]) == ["tokens.npy", "sequences.parquet"]
    new = redacted(out, gone)
    assert holding_files(new, [gone]) == []
    assert contents(out) == files
    after = np.array(tokens.open_tokens(new))
    mine = np.zeros(before.shape, dtype=bool)
    for row in spans.filter(pl.col("doc_id").is_in(list(gone.doc_ids))).iter_rows(named=True):
        mine[row["position"], row["offset"] : row["offset"] + row["n_tokens"]] = True
    assert (after[mine] == encoder.end_of_text).all()
    assert (after[~mine] == before[~mine]).all()
    now = pl.read_parquet(new / "sequences.parquet")
    real = zip(after, now["n_tokens"], strict=True)
    hashes = [hashlib.sha256(r[:n].astype("<u4").tobytes()).hexdigest() for r, n in real]
    assert now["sha256"].to_list() == hashes
    assert set(touched["position"]) == set(np.flatnonzero(mine.any(1)))
    changed = now.filter(now["sha256"] != rows["sha256"])["position"]
    assert set(changed) <= set(touched["position"])
    assert pl.read_parquet(new / "spans.parquet").equals(spans)


def test_documents_of_one_sequence_are_redacted_together(
    raw: Path, encoder: tokens.Encoder
) -> None:
    out, gone = packed(raw, encoder, examples=False), [forgotten(raw, i) for i in range(9)]
    after = np.array(tokens.open_tokens(redacted(out, *gone)))
    assert (after == encoder.end_of_text).all()


def test_a_document_that_is_not_there_is_held_by_nothing(
    raw: Path, encoder: tokens.Encoder
) -> None:
    out = packed(raw, encoder, examples=False)
    stranger = Forgotten(text_sha256("a stranger"), {"0" * 20}, {"elsewhere:1"}, "a stranger")
    assert holding_files(out, [stranger]) == []
    assert holding_files(raw, [stranger]) == []
    assert touched_sequences(out, stranger).is_empty()


TEXT = (
    'def seek(self, "pos"):\n    """Café <go> & see\tthe others.""" # of line 12\n' + "x = y\n" * 20
)


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        (f"before {TEXT} behind", True),
        (html.escape(TEXT), True),
        ("".join(f"<span title='0.1'>{html.escape(c)}</span>" for c in TEXT), True),
        (json.dumps({"quote": TEXT}), True),
        (repr(TEXT[:75]), True),
        (" ".join(TEXT.split()), True),
        (TEXT[:20], False),
        ("def seek(self, other): pass", False),
        ("", False),
    ],
)
def test_a_page_shows_a_text_however_it_is_written(page: str, shown: bool) -> None:
    assert Forgotten("", set(), set(), TEXT).is_shown_in(page) is shown


@pytest.mark.parametrize("long", [1, 1_000_000])
def test_any_thirty_letters_in_a_row_show_a_text(
    long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redaction, "LONG", long)
    """A report's table shows about as many of a sequence."""
    text = "".join(random.Random(0).choices(string.ascii_letters, k=200))
    gone = Forgotten("", set(), set(), text)
    for start in range(len(text) - 29):
        assert gone.is_shown_in(f"| 12 | {text[start : start + 30]} | 0.5 |")


def test_a_text_hardly_longer_than_a_piece_is_shown_as_a_whole() -> None:
    for size in range(24, 31):
        text = "".join(random.Random(size).choices(string.ascii_letters, k=size))
        gone = Forgotten("", set(), set(), text)
        assert all(gone.is_shown_in(f"{'x' * before}{text}{'x' * 9}") for before in range(12))


def test_a_short_text_is_shown_as_a_whole_and_an_unknown_one_never() -> None:
    short = Forgotten("", set(), set(), "Hi there")
    assert short.is_shown_in("excerpt | Hi there! | 7")
    assert short.is_shown_in("<td>1</td><td><b>Hi there</b></td>")
    assert not short.is_shown_in("She said Hi there to all")  # other texts will have it too
    assert not short.is_shown_in("Hi you")
    assert not Forgotten("", set(), set(), "...").is_shown_in("anything...")
    assert not Forgotten("", set(), set()).is_shown_in("anything")


def test_a_forgotten_text_is_not_read_again(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    file = InputFile("web", path.name, str(path), path.stat().st_size, "1")
    folder = tmp_path / "again"
    folder.mkdir()
    source = Source(name="web", files=str(path))
    gone = {text_sha256(TEXTS[3]): "forgotten"}
    counts = write_documents([file], [source], folder, unwanted=gone)
    assert counts["documents"] == len(TEXTS) - 1
    assert counts["rejects"] == 2
    rejects = pl.read_parquet(folder / "rejects.parquet")
    assert rejects.select("source_line", "reason", "excerpt").rows() == [
        (4, "forgotten", ""),
        (10, "forgotten", ""),
    ]


@pytest.mark.parametrize(
    "text", ["Ни слова по-английски в этом тексте", "".join(map(chr, range(0x10400, 0x1041A)))]
)
def test_a_text_without_ascii_is_found_in_json_within_json(text: str) -> None:
    gone = Forgotten("", set(), set(), text)
    assert gone.is_shown_in(json.dumps({"a": text}))
    assert gone.is_shown_in(json.dumps([json.dumps({"a": text})]))
    assert not gone.is_shown_in(json.dumps({"a": "\u0430" * 40}))
