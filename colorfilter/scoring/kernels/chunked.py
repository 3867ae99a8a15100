"""The loss by library matrix products over blocks of the vocabulary; full logits are never held.

A block of logits is computed, converted to float32, exponentiated and summed while it is in cache.
A running maximum and sum combine the blocks (an online log-sum-exp). Full rows of logits would pass
through memory four times; with a large vocabulary that costs more than the arithmetic.
"""

import torch

from colorfilter.scoring.labels import mean_over_labels

# Rows and columns of a block by device type. On a CPU, a block's logits in both dtypes and its part
# of the head fit a core's cache.
BLOCKS = {"cpu": (1024, 1024)}
LARGE_BLOCK = (4096, 16384)


def sequence_nll(
    hidden: torch.Tensor, head_weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses specified in colorfilter.scoring.loss.

    Products are in the dtype of the weights, everything else is in float32. The label's logit is a
    separate float32 product, so that rounded logits enter the loss only through their sum.
    """
    rows, targets = hidden.flatten(0, 1).to(head_weight.dtype), labels.flatten().clamp(min=0)
    height, width = BLOCKS.get(hidden.device.type, LARGE_BLOCK)
    height, width = min(height, len(rows)), min(width, len(head_weight))
    # Shared by all blocks: new temporaries of this size for every block would fragment the heap.
    product = head_weight.new_empty(height * width)
    exact = product.float()  # `product` itself if it is float32
    nll = torch.empty(len(rows), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(rows), height):
        block = rows[start : start + height]
        log_sum = _log_sum_exp(block, head_weight, width, product, exact)
        label_weight = head_weight[targets[start : start + height]]
        label_logit = (block.float() * label_weight.float()).sum(dim=1)
        nll[start : start + height] = log_sum - label_logit
    return mean_over_labels(nll.view_as(labels), labels)


def _log_sum_exp(
    rows: torch.Tensor,
    head_weight: torch.Tensor,
    width: int,
    product: torch.Tensor,
    exact: torch.Tensor,
) -> torch.Tensor:
    """Return log sum exp(rows @ head_weight.T) over the vocabulary, float32 [rows]."""
    top = torch.full((len(rows), 1), -torch.inf, device=rows.device)
    total = torch.zeros_like(top)
    for start in range(0, len(head_weight), width):
        weight = head_weight[start : start + width]
        shape = len(rows), len(weight)
        logits = product[: shape[0] * shape[1]].view(shape)
        torch.mm(rows, weight.T, out=logits)
        new_top = torch.maximum(top, logits.amax(dim=1, keepdim=True).float())
        if exact is not product:
            logits = exact[: logits.numel()].view(shape).copy_(logits)
        part = logits.sub_(new_top).exp_().sum(dim=1, keepdim=True)
        total = total * (top - new_top).exp() + part
        top = new_top
    return (total.log() + top)[:, 0]
