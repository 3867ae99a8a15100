"""Labels of next-token prediction: which tokens a loss is the mean of."""

import torch

IGNORED = -100


def shifted_labels(
    tokens: torch.Tensor, n_tokens: torch.Tensor, eot_id: int | None = None
) -> torch.Tensor:
    """Labels of next-token prediction.

    tokens int64 [B, T], n_tokens int64 [B] real tokens at the front of each row -> int64 [B, T]:
    the token that follows each position, IGNORED where none does or it is padding. With
    `eot_id`, the token that closes a document, also IGNORED behind it: what follows there is
    the beginning of another document, which the context says nothing of.
    """
    labels = tokens.roll(-1, dims=1)
    following = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    ignored = following >= n_tokens[:, None]
    if eot_id is not None:
        ignored |= tokens == eot_id
    return labels.masked_fill(ignored, IGNORED)


def mean_over_labels(nll: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nll [B, T] of each label -> float32 [B] mean over a row's labels, int32 [B] their number.

    What stands at IGNORED labels does not count; a row without labels is NaN.
    """
    counted = labels != IGNORED
    n = counted.sum(dim=1)
    return (nll.where(counted, 0.0).sum(dim=1) / n).float(), n.to(torch.int32)
