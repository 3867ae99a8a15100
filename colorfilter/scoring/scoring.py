"""Stream packed sequences through models and commit their losses chunk by chunk.

Chunks (colorfilter.scoring.chunks) are independent, so any process may score any of them without
locks. A killed process loses only its current chunk. A rerun scores only what is missing, and each
loss is stored exactly once.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from transformers import PreTrainedModel

from colorfilter.data.tokens import read_tokens, real_tokens
from colorfilter.models import attention
from colorfilter.models.checkpoints import head_weight, weights_per_token
from colorfilter.progress import Progress, silent
from colorfilter.scoring import loss
from colorfilter.scoring.chunks import Receipt, batch_sequences, plan_chunks, receipt_of
from colorfilter.scoring.labels import shifted_labels
from colorfilter.storage import remote
from colorfilter.storage.files import file_sha256
from colorfilter.storage.remote import Place

Losses = tuple[np.ndarray, np.ndarray]


class Scorer:
    """A model prepared for scoring batches of sequences.

    `precision` is the dtype that the weights were loaded in; it is recorded, not applied. `kernel`
    is a kernel of loss.sequence_nll, by default the fastest one on the first batch.
    """

    def __init__(
        self, model: PreTrainedModel, precision: str = "float32", kernel: str | None = None
    ) -> None:
        self._model = model.eval()
        self.precision = precision
        self._weight = head_weight(model)
        self.kernel = kernel if self._weight is not None else "full logits"
        self._attention: str | None = None
        self.flops_per_token = 2 * weights_per_token(model)

    @property
    def form(self) -> str:
        """Human-readable name of the code that computes the losses."""
        body = f", {self._attention} attention" if self._attention else ""
        return f"{self.kernel}{body}"

    @property
    def device(self) -> torch.device:
        return torch.device(self._model.device)

    @torch.inference_mode()
    def losses(
        self, tokens: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses of a batch, on the model's device.

        tokens int64 [B, T], labels int64 [B, T] (see labels.shifted_labels) -> float32 [B] nats per
        token, int32 [B] number of labels.
        """
        if self._weight is None:
            logits = self._model(input_ids=tokens, use_cache=False).logits
            return loss.logits_nll(logits, labels)
        if self.kernel is None:
            self._attention = attention.fastest_attention(self._model, tokens)
        with attention.attention(self._attention):
            hidden = self._model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        if self.kernel is None:
            self.kernel = loss.fastest_kernel(hidden, self._weight, labels)
        return loss.sequence_nll(hidden, self._weight, labels, self.kernel)


def sequence_losses(
    scorers: Sequence[Scorer],
    tokens: np.ndarray,
    n_tokens: np.ndarray,
    eot_id: int | None = None,
    progress: Progress = silent,
) -> list[Losses]:
    """Return the losses of many sequences under several models on one device, in one pass.

    tokens integer [N, T], n_tokens int64 [N] real tokens per row -> for each model: float32 [N]
    nats per token (NaN for a sequence without labels), int32 [N] number of labels. `eot_id`: see
    labels.shifted_labels. `progress` is called with the tokens scored since the last call; each
    counts once for every model.
    """
    device = scorers[0].device
    step = batch_sequences(tokens.shape[1], device.type)
    # The order in which a matrix product is summed depends on its shape. Empty sequences fill the
    # last batch, so that all batches have one shape and a loss has the same bits in any batch.
    size = -(-len(tokens) // step) * step
    tokens_NxT = torch.zeros(size, tokens.shape[1], dtype=torch.int32)
    tokens_NxT[: len(tokens)] = torch.from_numpy(tokens.astype(np.int32))
    n_tokens_N = torch.zeros(size, dtype=torch.int64)
    n_tokens_N[: len(tokens)] = torch.from_numpy(n_tokens)
    tokens_NxT, n_tokens_N = tokens_NxT.to(device), n_tokens_N.to(device)
    # Copied to the host at the end, so that the host never waits for the device between batches.
    nll = torch.empty(len(scorers), size, device=device)
    n = torch.empty(len(scorers), size, dtype=torch.int32, device=device)
    for start in range(0, size, step):
        rows = slice(start, start + step)
        batch = tokens_NxT[rows].long()
        labels = shifted_labels(batch, n_tokens_N[rows], eot_id)
        for i, scorer in enumerate(scorers):
            nll[i, rows], n[i, rows] = scorer.losses(batch, labels)
        progress(len(scorers) * int(n_tokens[rows].sum()))
    by_model = zip(nll.cpu().numpy(), n.cpu().numpy(), strict=True)
    return [(losses[: len(tokens)], counts[: len(tokens)]) for losses, counts in by_model]


def score_shard(
    scorers: Mapping[str, Scorer],
    tokens: Path,
    shard: str,
    outs: Mapping[str, Path],
    chunk: int,
    eot_id: int | None = None,
    progress: Progress = silent,
) -> dict[str, list[Receipt]]:
    """Score a folder of packed tokens, in chunks of `chunk` sequences, into a folder per model.

    Return the receipts by model, in order. Existing chunks are not scored again; `progress` is
    called with their tokens first. `eot_id`: see sequence_losses.
    """
    receipts, missing = plan_chunks(tokens, outs, chunk)
    progress(sum(r.tokens for existing in receipts.values() for r in existing))
    for (start, stop), models in missing.items():
        lacking = {m: scorers[m] for m in models}
        for receipt in score_chunk(
            lacking, tokens, shard, start, stop, outs, eot_id, progress=progress
        ):
            receipts[receipt.model].append(receipt)
    return {m: sorted(done, key=lambda r: r.start) for m, done in receipts.items()}


def score_chunk(
    scorers: Mapping[str, Scorer],
    tokens: Place,
    shard: str,
    start: int,
    stop: int,
    outs: Mapping[str, Place],
    eot_id: int | None = None,
    exact: Callable[[str], Scorer] | None = None,
    progress: Progress = silent,
) -> list[Receipt]:
    """Score sequences [start, stop) with every model and commit each model's losses to a file.

    The file is in the model's folder of `outs`, with columns `model, shard, position, loss,
    n_tokens, precision`; `loss` is float32 nats per token, `n_tokens` the number of labels it
    averages. A sequence without labels, such as one of a single token, has no row. If `exact` is
    given, a loss in 16 bits that is not finite is computed again with `exact(model)`, the same
    model in float32, and its `precision` is float32. `eot_id` and `progress`: see sequence_losses.
    """
    begun = time.perf_counter()
    rows = read_tokens(tokens, start, stop)
    n_tokens = real_tokens(tokens)[start:stop]
    tables = []
    losses = sequence_losses(list(scorers.values()), rows, n_tokens, eot_id, progress)
    for model, (nll, n) in zip(scorers, losses, strict=True):
        precision = np.full(len(rows), scorers[model].precision, dtype=object)
        bad = np.flatnonzero((n > 0) & ~np.isfinite(nll))
        if len(bad) and exact and scorers[model].precision != "float32":
            ((nll[bad], _),) = sequence_losses([exact(model)], rows[bad], n_tokens[bad], eot_id)
            precision[bad] = "float32"
        table = pl.DataFrame(
            {
                "model": pl.repeat(model, len(rows), eager=True),
                "shard": pl.repeat(shard, len(rows), eager=True),
                "position": np.arange(start, stop, dtype=np.int64),
                "loss": nll,
                "n_tokens": n,
                "precision": pl.Series(precision, dtype=pl.String),
            }
        )
        tables.append((model, table.filter(pl.col("n_tokens") > 0)))
    seconds = (time.perf_counter() - begun) / len(scorers)
    receipts = []
    for model, table in tables:
        out, scorer = outs[model], scorers[model]
        with remote.temporary_file(out) as temporary:
            table.write_parquet(temporary, compression="zstd")
            sha256 = file_sha256(temporary)
            name = f"losses-{start:010d}-{stop:010d}-{sha256[:16]}.parquet"
            receipt = receipt_of(model, temporary, name, sha256, n_tokens)
            remote.commit(temporary, out, name)
        receipts.append(
            replace(
                receipt,
                seconds=seconds,
                kernel=scorer.form,
                precision=scorer.precision,
                device=scorer.device.type,
            )
        )
    return receipts
