from pathlib import Path

import numpy as np
import pytest
import torch

from colorfilter.config.recipe import Model
from colorfilter.data.tokens import Encoder, open_tokens
from colorfilter.models import checkpoints
from colorfilter.scoring.scoring import Scorer, sequence_losses
from colorfilter.scoring.token_losses import token_losses
from tests.colorfilter.conftest import LENGTH


@pytest.fixture
def tokens(packed: Path) -> np.ndarray:
    return open_tokens(packed)[:6]


@pytest.fixture
def model(tiny: Model, encoder: Encoder) -> torch.nn.Module:
    fresh = checkpoints.build(tiny, encoder.vocab_size, LENGTH, seed=3).eval()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(8)  # or every token costs much the same
    return fresh


def test_a_token_costs_minus_the_logarithm_of_its_probability(
    model: torch.nn.Module, tokens: np.ndarray
) -> None:
    """Token by token, each from the tokens before it alone, in float64."""
    losses = token_losses(model, tokens)
    exact = model.double()
    for row, mine in zip(tokens.astype(np.int64), losses, strict=True):
        assert np.isnan(mine[0])
        for t in range(1, LENGTH):
            before = torch.from_numpy(row[:t])[None]
            with torch.inference_mode():
                chances = exact(input_ids=before).logits[0, -1].softmax(dim=-1)
            assert mine[t] == pytest.approx(-chances[row[t]].log().item(), abs=1e-4)
    assert losses.dtype == np.float32
    assert np.nanstd(losses) > 0.5


@pytest.mark.parametrize("masked", [False, True])
def test_their_mean_is_the_sequences_loss(
    model: torch.nn.Module, tokens: np.ndarray, encoder: Encoder, masked: bool
) -> None:
    eot_id = encoder.end_of_text if masked else None
    n_tokens = np.full(len(tokens), LENGTH)
    ((expected, n),) = sequence_losses([Scorer(model)], tokens, n_tokens, eot_id)
    losses = token_losses(model, tokens, eot_id)
    assert np.nanmean(losses, axis=1) == pytest.approx(expected, abs=1e-5)
    assert (~np.isnan(losses)).sum(axis=1).tolist() == n.tolist()
    behind = np.zeros(tokens.shape, dtype=bool)
    behind[:, 1:] = tokens[:, :-1] == encoder.end_of_text
    assert behind.any()
    assert np.isnan(losses[behind]).all() == masked
