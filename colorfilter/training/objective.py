"""What training minimizes: the summed negative log-likelihood of a batch's labels.

With a z-loss (arXiv 2204.02311, section 5), the squared log-sum-exp of the logits is added, which
keeps the logits from drifting.
"""

import torch
from torch.nn import LinearCrossEntropyOptions, functional
from transformers import PreTrainedModel

from colorfilter.scoring.labels import IGNORED

# For the sample's models torch would choose 16 rows; calls that small make a step 10 to 30% slower.
# 256 rows of logits take 2 MB for a vocabulary of 2,048 and 51 MB for one of 50,304.
CHUNK = LinearCrossEntropyOptions(batch_chunk_size=256)


class Objective(torch.nn.Module):
    """Module that maps a batch's tokens and labels to its summed loss and the value to minimize.

    `head_weight`: see summed_nll. `z_loss` is the weight of the squared log-sum-exp.
    """

    def __init__(
        self, model: PreTrainedModel, head_weight: torch.Tensor | None, z_loss: float
    ) -> None:
        super().__init__()
        self.model = model
        self._head_weight = (head_weight,)  # in a tuple, so that it is not registered twice
        self._z_loss = z_loss

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._z_loss:
            nll, z = summed_z(self.model, tokens, labels)
            return nll, nll + self._z_loss * z
        nll = summed_nll(self.model, self._head_weight[0], tokens, labels)
        return nll, nll


def summed_nll(
    model: PreTrainedModel,
    head_weight: torch.Tensor | None,
    tokens: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Return the loss in nats summed over the labels, a scalar.

    tokens and labels are int64 [B, T]; IGNORED labels do not count. With `head_weight` [V, D] (see
    checkpoints.head_weight), only the logits of CHUNK rows are held at a time, in the dtype of the
    weights. Do not use this under autocast: torch would sum the loss and the weight's gradient over
    chunks in the dtype of the hidden states. With None, full logits are computed, and the loss is
    computed from them in float32.
    """
    if head_weight is None:
        logits = model(input_ids=tokens, use_cache=False).logits
        return functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return functional.linear_cross_entropy(
        hidden.flatten(0, 1),
        head_weight,
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        options=CHUNK,
    )


def summed_z(
    model: PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss and the summed squared log-sum-exp of the labels, from full logits."""
    logits = model(input_ids=tokens, use_cache=False).logits.float().flatten(0, 1)
    counted = labels.flatten() != IGNORED
    log_sum = logits.logsumexp(dim=1)
    chosen = logits.gather(1, labels.flatten().clamp(min=0)[:, None])[:, 0]
    return (log_sum - chosen)[counted].sum(), (log_sum[counted] ** 2).sum()
