"""Packing documents into fixed-length sequences: tokenizer, packing, spans back to documents.

Documents are encoded, each followed by the end-of-text token, concatenated in order and cut into
sequences of T tokens (as in the paper, section 4). Examples of tasks are not concatenated: each is
a sequence of its own. A folder of packed tokens contains

- `tokens.npy`         uint16 or uint32 [n_sequences, T], memory-mapped; padded after `n_tokens`
- `sequences.parquet`  position, n_tokens (T, or less in the last row and in examples), sha256 of
                       the row's real tokens
- `spans.parquet`      position, offset, doc_id, doc_start, n_tokens, char_start, char_end

A span is a piece of one document in one sequence: the `n_tokens` tokens at `offset` in the sequence
are tokens `doc_start...` of the document, and encode its text[char_start:char_end]. The end-of-text
token belongs to the document before it, so the spans cover every token exactly once.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers

from colorfilter.errors import InputError, one_line
from colorfilter.progress import Progress, silent
from colorfilter.storage.parquet import TableWriter
from colorfilter.storage.remote import Place, read_rows

END_OF_TEXT = "<|endoftext|>"
BATCH_CHARS = 250_000
TOKENS = "tokens.npy"
SEQUENCES_FILE = "sequences.parquet"

SEQUENCES = pa.schema([("position", pa.int64()), ("n_tokens", pa.int32()), ("sha256", pa.string())])
SPANS = pa.schema(
    [
        ("position", pa.int64()),
        ("offset", pa.int32()),
        ("doc_id", pa.string()),
        ("doc_start", pa.int64()),
        ("n_tokens", pa.int32()),
        ("char_start", pa.int64()),
        ("char_end", pa.int64()),
    ]
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer and save it in the format of transformers.

    Deterministic for a given order of texts. Raises InputError if the texts are too few for the
    requested vocabulary.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise InputError(
            f"tokenizer.vocab_size: D_prior yields only {tokenizer.get_vocab_size()} tokens, not "
            f"{vocab_size}; lower vocab_size or raise prior.sample_chars"
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def copy_tokenizer(path: str, folder: Path) -> None:
    """Save a Hugging Face tokenizer, given by folder or hub name, to `folder`.

    Raises InputError if there is none, it has no fast version, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"tokenizer.path: no tokenizer at {path} ({one_line(error)}); correct the path"
        ) from error
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise InputError(
            f"tokenizer.path: {path} has no fast tokenizer or no eos_token; use a tokenizer that "
            "has tokenizer.json and eos_token"
        )
    tokenizer.save_pretrained(folder)


class Encoder:
    """Encodes text to token ids. Special tokens that occur in a text are encoded as plain text."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        eos = config["eos_token"]
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.end_of_text: int = self._tokenizer.get_vocab()[
            eos["content"] if isinstance(eos, dict) else eos
        ]
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, texts: list[str]) -> list[tokenizers.Encoding]:
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def pack(
    documents: Iterable[dict[str, Any]],
    encoder: Encoder,
    length: int,
    folder: Path,
    left_out: Collection[str] = (),
    progress: Progress = silent,
) -> dict[str, int]:
    """Encode documents (`doc_id`, `sha256`, `text`) and pack them into sequences of `length`.

    Documents whose sha256 is in `left_out` are skipped. Returns counts: documents, left_out,
    tokens, sequences. Memory is bounded by a batch of texts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"documents": 0, "left_out": 0, "tokens": 0}
    with _Packer(folder, length, encoder.dtype, encoder.end_of_text) as packer:
        for batch in batches_of_text(documents):
            kept = [d for d in batch if d["sha256"] not in left_out]
            counts["left_out"] += len(batch) - len(kept)
            for document, encoding in zip(
                kept, encoder.encode([d["text"] for d in kept]), strict=True
            ):
                packer.add(document["doc_id"], len(document["text"]), encoding)
                counts["documents"] += 1
                counts["tokens"] += len(encoding.ids) + 1
            progress(sum(len(d["text"]) for d in batch))
    return {**counts, "sequences": packer.sequences}


def pack_examples(
    documents: Iterable[dict[str, Any]], encoder: Encoder, length: int, folder: Path
) -> dict[str, int]:
    """Encode documents (`doc_id`, `text`), each as a sequence of its own.

    This is the paper's form of a task's examples (section 4). A row is the text, the end-of-text
    token, and padding, which is not a label (see labels.shifted_labels). The loss covers the
    complete text, question and answer, like the authors'; unlike theirs, it excludes the padding. A
    document longer than a sequence is cut at the start, so that the answer stays. Returns counts:
    documents, cut, tokens, label_bytes (of the text after each row's first token), sequences.
    Memory is bounded by a batch of texts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"documents": 0, "cut": 0, "tokens": 0, "label_bytes": 0}
    with _Packer(folder, length, encoder.dtype, encoder.end_of_text) as packer:
        for batch in batches_of_text(documents):
            for document, encoding in zip(
                batch, encoder.encode([d["text"] for d in batch]), strict=True
            ):
                start = max(0, len(encoding.ids) + 1 - length)
                packer.add(document["doc_id"], len(document["text"]), encoding, start)
                packer.end_sequence()
                counts["documents"] += 1
                counts["cut"] += start > 0
                counts["tokens"] += len(encoding.ids) + 1 - start
                first_end = encoding.offsets[start][1] if encoding.ids else 0
                counts["label_bytes"] += len(document["text"][first_end:].encode("utf-8"))
    return {**counts, "sequences": packer.sequences}


def token_ends(encoding: tokenizers.Encoding, n_chars: int) -> list[int]:
    """Return where the text of each token ends in a document of `n_chars` characters.

    The end-of-text token comes last. It and the token before it end at `n_chars`, even if the
    tokenizer strips characters at the end of the text.
    """
    # Read `offsets` once: each access takes time proportional to the document's length.
    return [end for _, end in encoding.offsets[:-1]] + [n_chars, n_chars]


def batches_of_text(documents: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield lists of rows (`text`) of about BATCH_CHARS characters each."""
    batch: list[dict[str, Any]] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document["text"])
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class _Packer:
    """Appends documents to the three files of a folder of packed tokens."""

    def __init__(self, folder: Path, length: int, dtype: type, end_of_text: int) -> None:
        self._tokens = _GrowingArray(folder / TOKENS, length, dtype)
        self._sequences = TableWriter(folder / SEQUENCES_FILE, SEQUENCES)
        self._spans = TableWriter(folder / "spans.parquet", SPANS)
        self._row: np.ndarray = np.full(length, end_of_text, dtype=dtype)
        self._used = 0
        self._end_of_text = end_of_text
        self.sequences = 0

    def __enter__(self) -> "_Packer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.end_sequence()
        self._tokens.close()
        self._sequences.close()
        self._spans.close()

    def add(self, doc_id: str, n_chars: int, encoding: tokenizers.Encoding, start: int = 0) -> None:
        """Append a document, starting at its token `start`."""
        ids = np.array([*encoding.ids, self._end_of_text], dtype=self._row.dtype)
        ends = token_ends(encoding, n_chars)
        char_start = ends[start - 1] if start else 0
        while start < len(ids):
            take = min(len(self._row) - self._used, len(ids) - start)
            end = start + take
            self._row[self._used : self._used + take] = ids[start:end]
            self._spans.add(
                {
                    "position": self.sequences,
                    "offset": self._used,
                    "doc_id": doc_id,
                    "doc_start": start,
                    "n_tokens": take,
                    "char_start": char_start,
                    "char_end": ends[end - 1],
                }
            )
            self._used += take
            start, char_start = end, ends[end - 1]
            if self._used == len(self._row):
                self._emit()

    def end_sequence(self) -> None:
        """Pad and write the current sequence if it has tokens."""
        if self._used:
            self._emit()

    def _emit(self) -> None:
        real = self._row[: self._used]
        digest = hashlib.sha256(real.astype("<u4").tobytes()).hexdigest()
        self._sequences.add({"position": self.sequences, "n_tokens": self._used, "sha256": digest})
        self._row[self._used :] = self._end_of_text
        self._tokens.append(self._row)
        self.sequences += 1
        self._used = 0


class _GrowingArray:
    """A .npy file that grows by rows; `close` writes the final header."""

    def __init__(self, path: Path, length: int, dtype: type) -> None:
        self._file = path.open("wb")
        self._length = length
        self._dtype = np.dtype(dtype)
        self._rows = 0
        self._header()

    def _header(self) -> None:
        # numpy pads the header so that the first dimension can grow.
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self._rows, self._length),
            },
        )

    def append(self, row: np.ndarray) -> None:
        self._file.write(row.tobytes())
        self._rows += 1

    def close(self) -> None:
        self._header()
        self._file.close()


def open_tokens(folder: Path) -> np.ndarray:
    """Return the packed sequences of a folder, memory-mapped: [n_sequences, T]."""
    tokens: np.ndarray = np.load(folder / TOKENS, mmap_mode="r")
    return tokens


def read_tokens(place: Place, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Read the packed sequences [start, stop) of a folder: [n, T]. Reads no other rows."""
    if isinstance(place, Path):
        return open_tokens(place)[start:stop]
    return read_rows(place / TOKENS, start, stop)


def real_tokens(place: Place) -> np.ndarray:
    """Return the number of real tokens of each packed sequence, int64 [n_sequences]."""
    with (place / SEQUENCES_FILE).open("rb") as stream:
        column = pq.read_table(stream, columns=["n_tokens"])["n_tokens"]
    return pl.Series(column).cast(pl.Int64).to_numpy(writable=True)
