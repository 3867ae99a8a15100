"""Chunks of scoring: which sequences make one, which of them stand, which are missing.

A chunk is a Parquet file of consecutive sequences, written under a temporary name, flushed to disk
and renamed, its own sha256 in its name. Nothing here loads torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from colorfilter.data.tokens import real_tokens
from colorfilter.storage.files import file_sha256
from colorfilter.storage.remote import Place

# Tokens in a batch by kind of device: what stays in a core's cache, or fills a device.
BATCH_TOKENS = {"cpu": 2_048, "cuda": 65_536}
# Of a model's arithmetic, a chunk by kind of device; about a minute on one core or one device.
FLOPS_PER_CHUNK = {"cpu": 4e12, "cuda": 1.5e16}

Range = tuple[int, int]


@dataclass(frozen=True)
class Chunk:
    """Sequences [start, stop) of packed tokens, to score by models: fingerprint -> checkpoint, and
    -> place of its losses. `eot_id` as in labels.shifted_labels.
    """

    models: Mapping[str, Place]
    tokens: Place
    shard: str
    start: int
    stop: int
    outs: Mapping[str, Place]
    precision: str
    eot_id: int | None

    def __str__(self) -> str:
        return f"sequences {self.start:,} to {self.stop:,} of shard {self.shard}"


@dataclass(frozen=True)
class Receipt:
    """What a committed chunk of one model's losses holds and what it took.

    `unscored` of the sequences have no label and so no row. `seconds` is this model's share of the
    time, 0 for a chunk found standing. `kernel` is the form that was used, `matrix_share` the rate
    of the products with the model's weights as a share of that of one large product; `device` and
    `node` say where.
    """

    model: str
    file: str
    sha256: str
    start: int
    stop: int
    sequences: int
    unscored: int
    tokens: int
    seconds: float = 0.0
    kernel: str | None = None
    precision: str | None = None
    matrix_share: float | None = None
    device: str | None = None
    node: str | None = None


def batch_sequences(length: int, device: str) -> int:
    """Sequences in a batch, by their length and the kind of device."""
    return max(1, BATCH_TOKENS.get(device, 16_384) // length)


def chunk_sequences(parameters: int, length: int, device: str) -> int:
    """Sequences in a chunk: whole batches that take about a minute on a device of its kind.

    Decided from the sizes alone and not from the clock, so that chunks of the same scores are the
    same files everywhere.
    """
    batch = batch_sequences(length, device)
    minute = FLOPS_PER_CHUNK.get(device, 1e14) / (2 * parameters * length)
    return max(1, int(minute / batch)) * batch


def plan_chunks(
    tokens: Path, outs: Mapping[str, Path], chunk: int
) -> tuple[dict[str, list[Receipt]], dict[Range, list[str]]]:
    """The receipts of each model's chunks that stand in its folder of `outs`, and the ranges of
    those that are missing, each with the models it is missing of.

    Chunks of any size stand, such as those of another kind of device. What a killed run left
    half-written, and chunks that were damaged since, are removed.
    """
    n_tokens = real_tokens(tokens)
    standing: dict[str, list[Receipt]] = {}
    missing: dict[Range, list[str]] = {}
    for model, out in outs.items():
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob("*.tmp"):
            leftover.unlink()
        standing[model] = _standing(model, out, n_tokens)
        stops = [0, *(r.stop for r in standing[model])]
        starts = [*(r.start for r in standing[model]), len(n_tokens)]
        for first, last in zip(stops, starts, strict=True):
            for start in range(first - first % chunk, last, chunk):
                piece = max(first, start), min(start + chunk, last)
                if first < last:
                    missing.setdefault(piece, []).append(model)
    return standing, missing


def _standing(model: str, out: Path, n_tokens: np.ndarray) -> list[Receipt]:
    """The chunks in a folder, in order; those that are damaged or overlap are removed."""
    receipts: list[Receipt] = []
    for path in sorted(out.glob("losses-*.parquet")):
        start, stop = chunk_range(path.name)
        sha256 = file_sha256(path)
        whole = sha256.startswith(path.stem.rpartition("-")[2]) and stop <= len(n_tokens)
        if whole and start >= (receipts[-1].stop if receipts else 0):
            receipts.append(receipt_of(model, path, path.name, sha256, n_tokens[start:stop]))
        else:
            path.unlink()
    return receipts


def chunk_range(name: str) -> Range:
    """The sequences whose losses a chunk of this name holds."""
    _, start, stop, _ = name.split("-")
    return int(start), int(stop)


def receipt_of(model: str, path: Path, name: str, sha256: str, n_tokens: np.ndarray) -> Receipt:
    """The receipt of a file that holds a chunk's losses, of sequences with so many tokens each."""
    scored = pl.scan_parquet(path).select(pl.len()).collect().item()
    n = len(n_tokens)
    start, stop = chunk_range(name)
    return Receipt(model, name, sha256, start, stop, n, n - scored, int(n_tokens.sum()))
