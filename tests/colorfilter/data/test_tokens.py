import json
import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from colorfilter.data import tokens
from colorfilter.data.documents import text_sha256
from colorfilter.data.tokens import (
    END_OF_TEXT,
    Encoder,
    open_tokens,
    pack,
    pack_examples,
    train_tokenizer,
)
from colorfilter.errors import InputError


def as_documents(texts: list[str]) -> list[dict[str, str]]:
    return [
        {"doc_id": f"doc{i}", "sha256": text_sha256(text), "text": text}
        for i, text in enumerate(texts)
    ]


def read_packed(folder: Path) -> tuple[np.ndarray, pl.DataFrame, pl.DataFrame]:
    return (
        open_tokens(folder),
        pl.read_parquet(folder / "sequences.parquet"),
        pl.read_parquet(folder / "spans.parquet"),
    )


def assert_packed_right(texts: list[str], encoder: Encoder, length: int, folder: Path) -> None:
    counts = pack(as_documents(texts), encoder, length, folder)
    rows, sequences, spans = read_packed(folder)
    streams = [[*encoder.encode([text])[0].ids, encoder.end_of_text] for text in texts]
    total = sum(map(len, streams))
    assert counts == {
        "documents": len(texts),
        "left_out": 0,
        "tokens": total,
        "sequences": -(-total // length),
    }
    assert rows.shape == (counts["sequences"], length)
    assert sequences["position"].to_list() == list(range(len(rows)))
    assert sequences["n_tokens"].to_list() == [
        min(length, total - start) for start in range(0, total, length)
    ]
    claimed = np.zeros(rows.shape, dtype=int)
    found: dict[str, list[dict]] = {f"doc{i}": [] for i in range(len(texts))}
    for span in spans.to_dicts():
        claimed[span["position"], span["offset"] : span["offset"] + span["n_tokens"]] += 1
        found[span["doc_id"]].append(span)
    assert (claimed.ravel()[:total] == 1).all()
    assert (claimed.ravel()[total:] == 0).all()
    assert (rows.ravel()[total:] == encoder.end_of_text).all()
    for (doc_id, parts), text, stream in zip(found.items(), texts, streams, strict=True):
        ids: list[int] = []
        rebuilt, reached = "", 0
        for span in parts:
            assert span["doc_start"] == len(ids), doc_id
            ids += rows[span["position"]][span["offset"] :][: span["n_tokens"]].tolist()
            assert reached - 1 <= span["char_start"] <= reached
            assert span["char_start"] <= span["char_end"]
            rebuilt += text[max(reached, span["char_start"]) : span["char_end"]]
            reached = max(reached, span["char_end"])
        assert ids == stream
        assert rebuilt == text
        assert encoder.decode(ids[:-1]) == text


any_text = st.text(min_size=1, max_size=40) | st.sampled_from(
    [END_OF_TEXT, f"a{END_OF_TEXT}b", "\U0001f600\U0001f600", "  \n\t ", "time year people way"]
)


@given(st.lists(any_text, max_size=8), st.integers(2, 20))
@example(["\U0001f600" * 20], 2)
@example(["\U0001f600", "x", "é" * 7], 3)
@example([], 4)
def test_spans_find_every_token_and_character_of_every_document_once(
    encoder: Encoder,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    length: int,
) -> None:
    assert_packed_right(texts, encoder, length, tmp_path_factory.mktemp("packed"))


def test_spans_do_not_depend_on_the_batches(
    encoder: Encoder, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(as_documents(texts), encoder, 16, tmp_path / "one")
    monkeypatch.setattr(tokens, "BATCH_CHARS", 50)
    pack(as_documents(texts), encoder, 16, tmp_path / "many")
    for name in ("tokens.npy", "sequences.parquet", "spans.parquet"):
        one, many = (tmp_path / "one" / name, tmp_path / "many" / name)
        assert one.read_bytes() == many.read_bytes()


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_spans_cover_the_whitespace_of_a_tokenizer_that_trims_its_offsets(
    tokenizer_folder: Path, texts: list[str], tmp_path: Path, trim_offsets: bool
) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = (tokenizer_folder / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config)
    folder = tmp_path / "packed"
    pack(as_documents(texts), Encoder(tmp_path), 8, folder)
    spans = pl.read_parquet(folder / "spans.parquet")
    for i, text in enumerate(texts):
        covered = [False] * len(text)
        for span in spans.filter(pl.col("doc_id") == f"doc{i}").to_dicts():
            size = span["char_end"] - span["char_start"]
            covered[span["char_start"] : span["char_end"]] = [True] * size
        assert all(covered)


def test_what_looks_like_the_end_of_text_is_encoded_as_plain_text(encoder: Encoder) -> None:
    for text in (END_OF_TEXT, f"before {END_OF_TEXT} after"):
        ids = encoder.encode([text])[0].ids
        assert encoder.end_of_text not in ids
        assert encoder.decode(ids) == text
    assert encoder.decode([encoder.end_of_text]) == END_OF_TEXT


def test_the_hash_of_a_sequence_is_of_its_real_tokens(packed: Path) -> None:
    import hashlib

    rows, sequences, _ = read_packed(packed)
    assert sequences["n_tokens"][-1] < rows.shape[1]
    for row, n, sha256 in zip(rows, sequences["n_tokens"], sequences["sha256"], strict=True):
        assert hashlib.sha256(row[:n].astype("<u4").tobytes()).hexdigest() == sha256


def test_the_hash_does_not_depend_on_the_width_of_the_tokens(
    encoder: Encoder, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(as_documents(texts), encoder, 16, tmp_path / "narrow")
    monkeypatch.setattr(Encoder, "dtype", np.uint32)
    pack(as_documents(texts), encoder, 16, tmp_path / "wide")
    narrow, wide = read_packed(tmp_path / "narrow"), read_packed(tmp_path / "wide")
    assert (narrow[0].dtype, wide[0].dtype) == (np.uint16, np.uint32)
    assert (narrow[0] == wide[0]).all()
    assert narrow[1].equals(wide[1])


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_tokens_are_16_bits_wide_where_the_vocabulary_fits(
    tmp_path: Path, size: int, dtype: type
) -> None:
    vocab = {END_OF_TEXT: 0, "a": 1} | {f"t{i}": i for i in range(2, size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    encoder = Encoder(tmp_path)
    assert encoder.vocab_size == size
    assert encoder.dtype is dtype
    pack(as_documents([f"a t{size - 1}"]), encoder, 4, tmp_path)
    rows = open_tokens(tmp_path)
    assert rows.dtype == dtype
    assert rows.tolist() == [[1, size - 1, 0, 0]]


def test_documents_that_are_left_out_leave_no_trace(
    encoder: Encoder, texts: list[str], tmp_path: Path
) -> None:
    out = {text_sha256(t) for t in texts[::3]}
    counts = pack(as_documents(texts), encoder, 16, tmp_path / "with", left_out=out)
    assert counts["left_out"] == len(texts[::3])
    assert counts["documents"] == len(texts) - len(texts[::3])
    rest = [d for d in as_documents(texts) if d["sha256"] not in out]
    pack(rest, encoder, 16, tmp_path / "without")
    for name in ("tokens.npy", "sequences.parquet", "spans.parquet"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


@pytest.mark.parametrize("documents", [[], as_documents(["left out"])])
def test_nothing_to_pack_gives_empty_tables(
    encoder: Encoder, tmp_path: Path, documents: list[dict[str, str]]
) -> None:
    counts = pack(documents, encoder, 16, tmp_path, left_out={text_sha256("left out")})
    rows, sequences, spans = read_packed(tmp_path)
    assert counts["sequences"] == 0
    assert rows.shape == (0, 16)
    assert len(sequences) == len(spans) == 0


def test_tokens_open_with_plain_numpy_memory_mapped(packed: Path) -> None:
    rows = np.load(packed / "tokens.npy", mmap_mode="r")
    assert isinstance(rows, np.memmap)
    assert rows.flags.c_contiguous
    assert len(rows) == len(pl.read_parquet(packed / "sequences.parquet"))
    assert (packed / "tokens.npy").stat().st_size == rows.offset + rows.nbytes


def test_progress_adds_up_to_the_characters(
    encoder: Encoder, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARS", 200)
    done: list[int] = []
    pack(as_documents(texts), encoder, 16, tmp_path, progress=done.append)
    assert len(done) > 1
    assert sum(done) == sum(map(len, texts))


def test_memory_of_packing_does_not_grow_with_the_corpus(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARS", 2_000)
    monkeypatch.setattr("colorfilter.storage.parquet.BATCH_BYTES", 20_000)
    text = "time year people way day man " * 10

    def peak(n: int) -> int:
        documents = ({"doc_id": str(i), "sha256": str(i), "text": text} for i in range(n))
        tracemalloc.start()
        try:
            pack(documents, encoder, 64, tmp_path / str(n))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)
    assert peak(2_000) < 1.2 * peak(500) + 100_000


# Tokenizers ----------------------------------------------------------------------------------


def test_a_tokenizer_trained_twice_is_the_same(texts: list[str], tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        train_tokenizer(iter(texts), 300, tmp_path / name)
        files.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert files[0] == files[1]
    assert Encoder(tmp_path / "a").vocab_size == 300


def test_too_little_text_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.vocab_size: D_prior yields only \d+ tokens"):
        train_tokenizer(["few words"], 1000, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_text_is_token_0(encoder: Encoder) -> None:
    assert encoder.end_of_text == 0


def test_a_saved_tokenizer_agrees_with_transformers(
    tokenizer_folder: Path, encoder: Encoder, texts: list[str]
) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert loaded.eos_token == END_OF_TEXT
    assert loaded.eos_token_id == encoder.end_of_text
    assert len(loaded) == encoder.vocab_size
    for text in [*texts[:10], "größer 😀\n\n  spaces", " leading"]:
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert ids == encoder.encode([text])[0].ids
        assert loaded.decode(ids) == text


def test_a_given_tokenizer_is_copied_and_encodes_the_same(
    tokenizer_folder: Path, encoder: Encoder, texts: list[str], tmp_path: Path
) -> None:
    tokens.copy_tokenizer(str(tokenizer_folder), tmp_path)
    copied = Encoder(tmp_path)
    assert copied.end_of_text == encoder.end_of_text
    assert copied.vocab_size == encoder.vocab_size
    for text in [*texts, f"a {END_OF_TEXT} b"]:
        assert copied.encode([text])[0].ids == encoder.encode([text])[0].ids


def test_a_tokenizer_that_truncates_and_pads_encodes_whole_texts(
    tokenizer_folder: Path, encoder: Encoder, texts: list[str], tmp_path: Path
) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = (tokenizer_folder / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config)
    for mine, plain in zip(Encoder(tmp_path).encode(texts), encoder.encode(texts), strict=True):
        assert mine.ids == plain.ids


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.path: no tokenizer at") as raised:
        tokens.copy_tokenizer(str(tmp_path / "nothing"), tmp_path)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = (tokenizer_folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="eos_token"):
        tokens.copy_tokenizer(str(tmp_path), tmp_path / "out")


# Examples ------------------------------------------------------------------------------------


@given(st.lists(any_text, max_size=8), st.integers(2, 20))
@example(["\U0001f600" * 20, "x"], 3)
@example(["a b", "time year people way " * 9], 8)
def test_every_example_is_a_row_of_its_own_that_keeps_its_end(
    encoder: Encoder,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    length: int,
) -> None:
    folder = tmp_path_factory.mktemp("examples")
    counts = pack_examples(as_documents(texts), encoder, length, folder)
    rows, sequences, spans = read_packed(folder)
    streams = [[*encoder.encode([text])[0].ids, encoder.end_of_text] for text in texts]
    assert rows.shape == (len(texts), length)
    assert counts["documents"] == counts["sequences"] == len(texts)
    assert counts["cut"] == sum(len(stream) > length for stream in streams)
    assert counts["tokens"] == sum(min(length, len(stream)) for stream in streams)
    assert sequences["n_tokens"].to_list() == [min(length, len(stream)) for stream in streams]
    for i, (row, stream, span) in enumerate(zip(rows, streams, spans.to_dicts(), strict=True)):
        n = min(length, len(stream))
        assert row[:n].tolist() == stream[-length:]
        assert (row[n:] == encoder.end_of_text).all()
        assert (span["position"], span["offset"], span["n_tokens"]) == (i, 0, n)
        assert (span["doc_id"], span["doc_start"]) == (f"doc{i}", len(stream) - n)
        assert span["char_end"] == len(texts[i])
        kept = texts[i][span["char_start"] :].encode()
        assert kept.endswith(encoder.decode(stream[-length:-1]).strip("\ufffd").encode())


def test_label_bytes_are_those_behind_each_rows_first_token(
    encoder: Encoder, tmp_path: Path
) -> None:
    whole, cut = "time year", "x" * 30
    counts = pack_examples(as_documents([whole, cut]), encoder, 16, tmp_path)
    first = encoder.decode(encoder.encode([whole])[0].ids[:1])
    kept = encoder.decode(encoder.encode([cut])[0].ids[-14:])
    assert counts["label_bytes"] == len(whole) - len(first) + len(kept)
