"""Stream packed sequences through models and commit their losses chunk by chunk.

A chunk is a Parquet file of consecutive sequences, written under a temporary name, flushed to disk
and renamed, its own sha256 in its name. Chunks need nothing of each other: any process may score
any of them, a killed one loses the chunk it was at, a rerun scores what is missing, and each loss
stands exactly once. Nothing is locked.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from transformers import PreTrainedModel

from colorfilter import loss
from colorfilter.files import file_sha256, write_atomically
from colorfilter.labels import shifted_labels
from colorfilter.models import head_weight
from colorfilter.progress import Progress, silent
from colorfilter.tokens import open_tokens, real_tokens

BATCH_TOKENS = 2_048
# Of the model's arithmetic, a chunk by kind of device; about a minute on one core or one device.
FLOPS_PER_CHUNK = {"cpu": 4e12, "cuda": 1.5e16}

Range = tuple[int, int]


@dataclass(frozen=True)
class Receipt:
    """What a committed chunk holds and what it took; `seconds` is 0 for one found standing.

    `unscored` of the sequences have no label and so no row. `kernel` is the form that was used.
    """

    file: str
    sha256: str
    start: int
    stop: int
    sequences: int
    unscored: int
    tokens: int
    seconds: float
    kernel: str | None = None


class Scorer:
    """A model made ready for scoring: losses of batches of sequences."""

    def __init__(self, model: PreTrainedModel, boundary: int | None = None) -> None:
        """`boundary` as in labels.shifted_labels."""
        self._model = model.eval()
        self._boundary = boundary
        self.kernel: str | None = None  # chosen at the first batch
        self._weight = head_weight(model)

    @torch.inference_mode()
    def losses(self, tokens: np.ndarray, n_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens integer [B, T], n_tokens [B] -> float32 [B] nats per token, int32 [B] labels."""
        device = self._model.device
        tokens_BxT = torch.from_numpy(tokens.astype(np.int64)).to(device)
        n_tokens_B = torch.from_numpy(n_tokens).to(device)
        labels = shifted_labels(tokens_BxT, n_tokens_B, self._boundary)
        if self._weight is None:
            self.kernel = "full logits"
            logits = self._model(input_ids=tokens_BxT, use_cache=False).logits
            nll, n = loss.logits_nll(logits, labels)
        else:
            body = self._model.base_model(input_ids=tokens_BxT, use_cache=False)
            inputs = body.last_hidden_state, self._weight, labels
            if self.kernel is None:
                self.kernel = loss.fastest_kernel(*inputs)
            nll, n = loss.sequence_nll(*inputs, self.kernel)
        return nll.cpu().numpy(), n.cpu().numpy()


def sequence_losses(
    scorer: Scorer,
    tokens: np.ndarray,
    n_tokens: np.ndarray,
    progress: Progress = silent,
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of many sequences, in small batches. Shapes and units as in Scorer.losses."""
    nll = np.full(len(tokens), np.nan, dtype=np.float32)
    n = np.zeros(len(tokens), dtype=np.int32)
    step = max(1, BATCH_TOKENS // tokens.shape[1])
    for start in range(0, len(tokens), step):
        rows = slice(start, start + step)
        nll[rows], n[rows] = scorer.losses(tokens[rows], n_tokens[rows])
        progress(int(n_tokens[rows].sum()))
    return nll, n


def score_shard(
    models: Mapping[str, Scorer],
    tokens: Path,
    shard: str,
    out: Path,
    precision: str,
    chunk: int,
    progress: Progress = silent,
) -> list[Receipt]:
    """Score a folder of packed tokens by every model, into chunks of so many sequences in `out`.

    What stands there is not scored again. `progress` as in score_chunk.
    """
    standing, missing = plan_chunks(tokens, out, chunk)
    progress(len(models) * sum(r.tokens for r in standing))
    done = [
        score_chunk(models, tokens, shard, start, stop, out, precision, progress)
        for start, stop in missing
    ]
    return sorted([*standing, *done], key=lambda r: r.start)


def chunk_sequences(parameters: int, length: int, device: str) -> int:
    """Sequences in a chunk, so that one takes about a minute on a device of its kind.

    Decided from the sizes alone and not from the clock, so that chunks of the same scores are the
    same files everywhere.
    """
    return max(1, int(FLOPS_PER_CHUNK.get(device, 1e14) / (2 * parameters * length)))


def plan_chunks(tokens: Path, out: Path, chunk: int) -> tuple[list[Receipt], list[Range]]:
    """The receipts of the chunks that stand in `out`, and the ranges of those that are missing.

    What a killed run left half-written, and chunks that were damaged since, are removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob("*.tmp"):
        leftover.unlink()
    n_tokens = real_tokens(tokens)
    standing, missing = [], []
    for start in range(0, len(n_tokens), chunk):
        stop = min(start + chunk, len(n_tokens))
        receipt = _standing(out, start, stop, n_tokens[start:stop])
        if receipt:
            standing.append(receipt)
        else:
            missing.append((start, stop))
    return standing, missing


def _standing(out: Path, start: int, stop: int, n_tokens: np.ndarray) -> Receipt | None:
    for path in sorted(out.glob(f"{_stem(start, stop)}-*.parquet")):
        sha256 = file_sha256(path)
        if sha256.startswith(path.stem.rpartition("-")[2]):
            return _receipt(path, sha256, start, stop, n_tokens, 0.0)
        path.unlink()
    return None


def score_chunk(
    models: Mapping[str, Scorer],
    tokens: Path,
    shard: str,
    start: int,
    stop: int,
    out: Path,
    precision: str,
    progress: Progress = silent,
) -> Receipt:
    """Score sequences [start, stop) by every model and commit their losses to a file in `out`.

    It holds `model, shard, position, loss, n_tokens, precision`; `loss` is float32 nats per token,
    `n_tokens` the labels it is the mean of. A sequence without labels, such as one of a single
    token, gets no row. `progress` is called with sequence tokens done, per model.
    """
    begun = time.perf_counter()
    rows = open_tokens(tokens)[start:stop]
    n_tokens = real_tokens(tokens)[start:stop]
    tables = []
    for name, scorer in models.items():
        nll, n = sequence_losses(scorer, rows, n_tokens, progress)
        tables.append(
            pl.DataFrame(
                {
                    "model": pl.repeat(name, stop - start, eager=True),
                    "shard": pl.repeat(shard, stop - start, eager=True),
                    "position": np.arange(start, stop, dtype=np.int64),
                    "loss": nll,
                    "n_tokens": n,
                    "precision": pl.repeat(precision, stop - start, eager=True),
                }
            ).filter(pl.col("n_tokens") > 0)
        )
    seconds = time.perf_counter() - begun
    temporary = out / f"{_stem(start, stop)}.tmp"
    pl.concat(tables).write_parquet(temporary, compression="zstd")
    sha256 = file_sha256(temporary)
    path = out / f"{_stem(start, stop)}-{sha256[:16]}.parquet"
    write_atomically(temporary, path)
    kernels = {str(scorer.kernel) for scorer in models.values()}
    receipt = _receipt(path, sha256, start, stop, n_tokens, seconds)
    return replace(receipt, kernel=", ".join(sorted(kernels)))


def _receipt(
    path: Path, sha256: str, start: int, stop: int, n_tokens: np.ndarray, seconds: float
) -> Receipt:
    scored = pl.scan_parquet(path).select(pl.col("position").n_unique()).collect().item()
    unscored = stop - start - scored
    tokens = int(n_tokens.sum())
    return Receipt(path.name, sha256, start, stop, stop - start, unscored, tokens, seconds)


def _stem(start: int, stop: int) -> str:
    return f"losses-{start:010d}-{stop:010d}"
