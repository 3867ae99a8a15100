"""The loss of every token of a few sequences; their mean is the sequence's loss.

This is the formula of colorfilter.scoring.loss before averaging, computed from full logits, one
sequence at a time, for dozens of sequences in a report. The difference of two models' token losses
shows which tokens a color comes from.
"""

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from colorfilter.scoring.labels import IGNORED, shifted_labels


@torch.inference_mode()
def token_losses(
    model: PreTrainedModel, tokens: np.ndarray, eot_id: int | None = None
) -> np.ndarray:
    """Return the loss of each token in nats, given the tokens before it in its sequence.

    tokens integer [N, T], all of them real -> float32 [N, T], NaN for tokens that are not labels,
    such as the first. The mean over the others is the sequence's loss. `eot_id`: see
    labels.shifted_labels.
    """
    nll_NxT = np.full(tokens.shape, np.nan, dtype=np.float32)
    n_tokens = torch.tensor([tokens.shape[1]], device=model.device)
    for row, nll_T in zip(tokens, nll_NxT, strict=True):
        tokens_1xT = torch.from_numpy(row.astype(np.int64))[None].to(model.device)
        labels_T = shifted_labels(tokens_1xT, n_tokens, eot_id)[0]
        logits_TxV = model(input_ids=tokens_1xT, use_cache=False).logits[0].float()
        nll = functional.cross_entropy(
            logits_TxV, labels_T, ignore_index=IGNORED, reduction="none"
        ).masked_fill(labels_T == IGNORED, torch.nan)
        nll_T[1:] = nll[:-1].cpu().numpy()  # a position's label is the next token
    return nll_NxT
