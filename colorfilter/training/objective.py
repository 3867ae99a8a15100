"""What training minimizes: the summed negative log-likelihood of a batch's labels.

With a z-loss (arXiv 2204.02311, section 5) also the squared log-sum-exp of their logits, which
keeps logits from drifting.
"""

import torch
from torch.nn import LinearCrossEntropyOptions, functional
from transformers import PreTrainedModel

from colorfilter.scoring.labels import IGNORED

# Torch would choose 16 rows for the sample's models: calls of so little each that a step takes 10
# to 30 % longer. 256 rows of logits are 2 MB for a vocabulary of 2,048, 51 MB for one of 50,304.
CHUNK = LinearCrossEntropyOptions(batch_chunk_size=256)


class Objective(torch.nn.Module):
    """Tokens and labels of a batch -> its summed loss, and what is minimized.

    `head_weight` as in summed_nll, `z_loss` the weight of the squared log-sum-exp.
    """

    def __init__(
        self, model: PreTrainedModel, head_weight: torch.Tensor | None, z_loss: float
    ) -> None:
        super().__init__()
        self.model = model
        self._head_weight = (head_weight,)  # a parameter of the model, and not another one of this
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
    """Tokens and labels int64 [B, T], IGNORED left out -> scalar, nats summed over the labels.

    With `head_weight` [V, D], as models.head_weight gives it, no more logits are held at a time
    than those of CHUNK rows, in the dtype of the weights. Not for autocast: torch sums the loss and
    the weight's gradient over chunks in the dtype of the hidden states. With None, of full logits
    and in float32 from there on.
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
    """The same from full logits, and the sum over the labels of their squared log-sum-exp."""
    logits = model(input_ids=tokens, use_cache=False).logits.float().flatten(0, 1)
    counted = labels.flatten() != IGNORED
    log_sum = logits.logsumexp(dim=1)
    chosen = logits.gather(1, labels.flatten().clamp(min=0)[:, None])[:, 0]
    return (log_sum - chosen)[counted].sum(), (log_sum[counted] ** 2).sum()
