"""Labels of next-token prediction: the tokens over which a loss is averaged."""

import torch

IGNORED = -100


def shifted_labels(
    tokens: torch.Tensor, n_tokens: torch.Tensor, eot_id: int | None = None
) -> torch.Tensor:
    """Return the labels of next-token prediction.

    tokens int64 [B, T], n_tokens int64 [B] real tokens at the front of each row -> int64 [B, T]:
    the token that follows each position, or IGNORED if there is none or it is padding. With
    `eot_id`, the end-of-text id, a label that follows that token is IGNORED too: it begins another
    document, which the context cannot predict.
    """
    labels = tokens.roll(-1, dims=1)
    following = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    ignored = following >= n_tokens[:, None]
    if eot_id is not None:
        ignored |= tokens == eot_id
    return labels.masked_fill(ignored, IGNORED)


def mean_over_labels(nll: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Average nll [B, T] over each row's labels: float32 [B] mean, int32 [B] number of labels.

    Values at IGNORED labels do not count; the mean of a row without labels is NaN.
    """
    counted = labels != IGNORED
    n = counted.sum(dim=1)
    return (nll.where(counted, 0.0).sum(dim=1) / n).float(), n.to(torch.int32)
