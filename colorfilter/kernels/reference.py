"""The loss as it is written, in float64: what the other forms are tested against."""

import torch

from colorfilter.labels import mean_over_labels


def sequence_nll(
    hidden: torch.Tensor, head_weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full float64 logits and their log-sum-exp. Contract as in colorfilter.loss."""
    logits = hidden.double() @ head_weight.double().T
    label_logits = logits.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return mean_over_labels(logits.logsumexp(dim=2) - label_logits, labels)
