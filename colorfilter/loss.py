"""The loss kernel: mean negative log-likelihood of every sequence, in nats per token.

`loss(x) = -1/n sum_t log p(x_t | x_<t)` over the n labels of a sequence. CoLoR-Filter's score is
the difference of two such losses (arXiv 2406.10670, equation 8 and algorithm 1), so an error here
of a hundredth of the scores' spread moves about a hundredth of the selection: the log-sum-exp of
the logits, the label's logit and the sum over tokens are float32 whatever the model's dtype.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from colorfilter.kernels import chunked, reference
from colorfilter.labels import IGNORED, mean_over_labels

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
KERNELS: dict[str, Kernel] = {
    "reference": reference.sequence_nll,
    "chunked": chunked.sequence_nll,
}


def sequence_nll(
    hidden: torch.Tensor, head_weight: torch.Tensor, labels: torch.Tensor, kernel: str = "chunked"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean negative log-likelihood of each sequence under logits `hidden @ head_weight.T`.

    hidden [B, T, D], head_weight [V, D], labels int64 [B, T] with IGNORED left out
    -> (float32 [B] nats per token, int32 [B] number of labels). A row without labels is NaN; what
    is not finite in `hidden` makes the loss of its own sequence not finite.

    The forms of the kernel: `reference`, float64 as it is written; `chunked`, library products on
    any device.
    """
    return KERNELS[kernel](hidden, head_weight, labels)


def logits_nll(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from full logits [B, T, V], for heads that are more than one matrix product."""
    nll = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return mean_over_labels(nll.view_as(labels), labels)
