"""The loss as the formula is written, in float64: the reference in tests of other kernels."""

import torch

from colorfilter.scoring.labels import mean_over_labels


def sequence_nll(
    hidden: torch.Tensor, head_weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses specified in colorfilter.scoring.loss, from full float64 logits."""
    weight = head_weight.double()
    nll = torch.empty(labels.shape, dtype=torch.float64, device=labels.device)
    for i, states in enumerate(hidden):
        logits = states.double() @ weight.T
        label_logits = logits.gather(1, labels[i].clamp(min=0)[:, None])[:, 0]
        nll[i] = logits.logsumexp(dim=1) - label_logits
    return mean_over_labels(nll, labels)
