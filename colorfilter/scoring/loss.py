"""The loss kernel: mean negative log-likelihood of every sequence, in nats per token.

`loss(x) = -1/n sum_t log p(x_t | x_<t)` over the n labels of a sequence. CoLoR-Filter's score is
the difference of two losses (arXiv 2406.10670, equation 8 and algorithm 1), so an error of 1% of
the scores' spread changes about 1% of the selection. Therefore the log-sum-exp of the logits, the
label's logit and the sum over tokens are float32, whatever the model's dtype.
"""

import importlib
import importlib.util
import time
from typing import Any

import torch
from torch.nn import functional

from colorfilter.scoring.labels import IGNORED, mean_over_labels


def sequence_nll(
    hidden: torch.Tensor, head_weight: torch.Tensor, labels: torch.Tensor, kernel: str = "chunked"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean negative log-likelihood of each sequence for logits hidden @ head_weight.T.

    hidden [B, T, D] and head_weight [V, D] of one dtype, labels int64 [B, T], where IGNORED does
    not count -> (float32 [B] nats per token, int32 [B] number of labels). A row without labels is
    NaN. A non-finite value in `hidden` at a label makes the loss of its own sequence non-finite.

    `kernel` is a module of `colorfilter.scoring.kernels`: `reference` (float64, as the formula is
    written), `chunked` (library products, on any device) or `triton` (fused, on CUDA).
    """
    form: Any = importlib.import_module(f"colorfilter.scoring.kernels.{kernel}")
    nll, n = form.sequence_nll(hidden, head_weight, labels)
    return nll, n


def fastest_kernel(hidden: torch.Tensor, head_weight: torch.Tensor, labels: torch.Tensor) -> str:
    """Return the kernel to use for tensors of these shapes: on CUDA the faster of two, measured."""
    if hidden.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return "chunked"
    seconds = {}
    for kernel in ("triton", "chunked"):
        for _ in range(3):  # the first run compiles, only the last is timed
            torch.cuda.synchronize()
            begun = time.perf_counter()
            sequence_nll(hidden, head_weight, labels, kernel)
            torch.cuda.synchronize()
            seconds[kernel] = time.perf_counter() - begun
    return min(seconds, key=lambda kernel: seconds[kernel])


def logits_nll(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Like sequence_nll, from logits [B, T, V]: for heads that are more than one matrix product."""
    nll = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return mean_over_labels(nll.view_as(labels), labels)
