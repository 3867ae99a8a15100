"""The loss kernel: mean negative log-likelihood of every sequence, in nats per token.

`loss(x) = -1/n sum_t log p(x_t | x_<t)` over the n labels of a sequence. CoLoR-Filter's score is
the difference of two such losses (arXiv 2406.10670, equation 8 and algorithm 1), so an error here
of a hundredth of the scores' spread moves about a hundredth of the selection: the log-sum-exp of
the logits, the label's logit and the sum over tokens are float32 whatever the model's dtype.
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
    """Mean negative log-likelihood of each sequence under logits `hidden @ head_weight.T`.

    hidden [B, T, D] and head_weight [V, D] of one dtype, labels int64 [B, T] with IGNORED left out
    -> (float32 [B] nats per token, int32 [B] number of labels). A row without labels is NaN; what
    is not finite in `hidden` at a label makes the loss of its own sequence not finite.

    The forms of the kernel, each a module of `colorfilter.scoring.kernels`: `reference`, float64 as
    it is written; `chunked`, library products on any device; `triton`, fused, on CUDA.
    """
    form: Any = importlib.import_module(f"colorfilter.scoring.kernels.{kernel}")
    nll, n = form.sequence_nll(hidden, head_weight, labels)
    return nll, n


def fastest_kernel(hidden: torch.Tensor, head_weight: torch.Tensor, labels: torch.Tensor) -> str:
    """The form to use for tensors such as these: on CUDA the faster of two, by measurement."""
    if hidden.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return "chunked"
    seconds = {}
    for kernel in ("triton", "chunked"):
        for _ in range(3):  # the first compiles, the last counts
            torch.cuda.synchronize()
            begun = time.perf_counter()
            sequence_nll(hidden, head_weight, labels, kernel)
            torch.cuda.synchronize()
            seconds[kernel] = time.perf_counter() - begun
    return min(seconds, key=lambda kernel: seconds[kernel])


def logits_nll(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from full logits [B, T, V], for heads that are more than one matrix product."""
    nll = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return mean_over_labels(nll.view_as(labels), labels)
