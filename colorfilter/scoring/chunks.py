"""Chunks of scoring: which sequences form a chunk, which chunks exist and which are missing.

A chunk is a Parquet file with the losses of consecutive sequences. It is written under a temporary
name, flushed to disk and renamed; its final name contains its sha256. This module does not load
torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from colorfilter.data.tokens import real_tokens
from colorfilter.storage.files import file_sha256
from colorfilter.storage.remote import Place

# Tokens per batch by device type: what fits a CPU core's cache, or fills a GPU.
BATCH_TOKENS = {"cpu": 2_048, "cuda": 65_536}
# Model FLOPs per chunk by device type: about a minute on one core or one GPU.
FLOPS_PER_CHUNK = {"cpu": 4e12, "cuda": 1.5e16}

Range = tuple[int, int]


@dataclass(frozen=True)
class Chunk:
    """Sequences [start, stop) of packed tokens, to be scored with one or more models.

    `models` maps a model's fingerprint to its checkpoint, `outs` to the folder of its losses.
    `eot_id`: see labels.shifted_labels.
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
    """What a committed chunk of one model's losses holds, and how it was computed.

    `unscored` sequences have no label and therefore no row. `seconds` is this model's share of the
    time, 0 for a chunk that already existed. `kernel` names what computed the losses.
    `matrix_share` is the rate of the products with the model's weights, as a share of the rate of
    one large product. `device` and `node` are where the chunk was computed.
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
    """Return the number of sequences per batch, by their length and the device type."""
    return max(1, BATCH_TOKENS.get(device, 16_384) // length)


def chunk_sequences(parameters: int, length: int, device: str) -> int:
    """Return the number of sequences per chunk: full batches that take about a minute.

    Depends only on sizes and the device type, not on measured time, so that equal scores are stored
    in equal files everywhere.
    """
    batch = batch_sequences(length, device)
    minute = FLOPS_PER_CHUNK.get(device, 1e14) / (2 * parameters * length)
    return max(1, int(minute / batch)) * batch


def plan_chunks(
    tokens: Path, outs: Mapping[str, Path], chunk: int
) -> tuple[dict[str, list[Receipt]], dict[Range, list[str]]]:
    """Return the receipts of existing chunks by model, and the models that lack each missing range.

    `outs` is the folder of losses by model. Existing chunks may have any size, such as that of
    another device type. Partially written files of a killed run and damaged chunks are removed.
    """
    n_tokens = real_tokens(tokens)
    existing: dict[str, list[Receipt]] = {}
    missing: dict[Range, list[str]] = {}
    for model, out in outs.items():
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob("*.tmp"):
            leftover.unlink()
        existing[model] = _existing_chunks(model, out, n_tokens)
        stops = [0, *(r.stop for r in existing[model])]
        starts = [*(r.start for r in existing[model]), len(n_tokens)]
        for first, last in zip(stops, starts, strict=True):
            for start in range(first - first % chunk, last, chunk):
                piece = max(first, start), min(start + chunk, last)
                if first < last:
                    missing.setdefault(piece, []).append(model)
    return existing, missing


def _existing_chunks(model: str, out: Path, n_tokens: np.ndarray) -> list[Receipt]:
    """Return the receipts of a folder's chunks in order; remove damaged and overlapping chunks."""
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
    """Return the range of sequences whose losses a chunk holds, from its file name."""
    _, start, stop, _ = name.split("-")
    return int(start), int(stop)


def receipt_of(model: str, path: Path, name: str, sha256: str, n_tokens: np.ndarray) -> Receipt:
    """Return the receipt of a file of losses; `n_tokens` are the real tokens of its sequences."""
    scored = pl.scan_parquet(path).select(pl.len()).collect().item()
    n = len(n_tokens)
    start, stop = chunk_range(name)
    return Receipt(model, name, sha256, start, stop, n, n - scored, int(n_tokens.sum()))
