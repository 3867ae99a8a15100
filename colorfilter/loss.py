"""The loss kernel: mean negative log-likelihood of every sequence, in nats per token.

`loss(x) = -1/n sum_t log p(x_t | x_<t)` over the n labels of a sequence. CoLoR-Filter's score is
the difference of two such losses (arXiv 2406.10670, equation 8 and algorithm 1), so an error here
of a hundredth of the scores' spread moves about a hundredth of the selection: logits, their
log-sum-exp and the sum over tokens are float32 whatever the model's dtype.
"""

import torch
from torch.nn import functional

IGNORED = -100
CHUNK_LOGITS = 2**20


def shifted_labels(tokens: torch.Tensor, n_tokens: torch.Tensor) -> torch.Tensor:
    """Labels of next-token prediction.

    tokens int64 [B, T], n_tokens int64 [B] real tokens at the front of each row -> int64 [B, T]:
    the token that follows each position, IGNORED where none does or it is padding.
    """
    labels = tokens.roll(-1, dims=1)
    following = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return labels.masked_fill(following >= n_tokens[:, None], IGNORED)


def sequence_nll(
    hidden: torch.Tensor, head_weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean negative log-likelihood of each sequence under logits `hidden @ head_weight.T`.

    hidden [B, T, D], head_weight float32 [V, D], labels int64 [B, T] with IGNORED left out
    -> (float32 [B] nats per token, int32 [B] number of labels). A row without labels is NaN.

    The logits are made for some rows at a time in one buffer that is used again: full logits
    would be V/D times the hidden states, and fresh temporaries of that size in every batch
    fragment the heap until the process is killed.
    """
    rows, targets = hidden.flatten(0, 1), labels.flatten()
    weight = head_weight.T
    step = max(1, CHUNK_LOGITS // head_weight.shape[0])
    buffer = weight.new_empty(min(step, len(rows)), head_weight.shape[0])
    nll = torch.zeros(len(rows), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step].to(weight.dtype)
        logits = torch.mm(chunk, weight, out=buffer[: len(chunk)])
        nll[start : start + step] = _token_nll(logits, targets[start : start + step])
    return _mean(nll.view_as(labels), labels)


def logits_nll(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from full logits [B, T, V], for heads that are more than one matrix product."""
    nll = _token_nll(logits.flatten(0, 1), labels.flatten())
    return _mean(nll.view_as(labels), labels)


def _token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")


def _mean(nll: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n = (labels != IGNORED).sum(dim=1)
    return nll.sum(dim=1) / n, n.to(torch.int32)
