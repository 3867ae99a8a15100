from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from colorfilter.config.recipe import Model
from colorfilter.models import attention, checkpoints
from colorfilter.scoring.scoring import Scorer, sequence_losses

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
CPU = torch.device("cpu")
FAMILIES = {
    "gpt_neox": {},
    "llama": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 4},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 32},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 20},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16},
}


def counting(function: Callable[..., Any], calls: list[None]) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        return function(*arguments, **named)

    return counted


def hidden(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 5, 130, 512])
def test_the_body_computes_what_it_did(
    family: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LEAST_ROWS", 16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    config = {**SMALL, **FAMILIES[family]}
    model = checkpoints.build(Model(type=family, config=config), 100, 512, 0).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    tokens = torch.randint(0, 100, (3, length), generator=torch.Generator().manual_seed(length))
    before = hidden(model, tokens)
    ours: list[None] = []
    monkeypatch.setattr(torch, "bmm", counting(torch.bmm, ours))
    after = hidden(attention.prepare(model, CPU), tokens)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    plain = family not in {"mistral", "gemma2"} or (family == "mistral" and length <= 20)
    assert bool(ours) == plain


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen3"])
def test_attention_by_blocks_has_the_gradients_of_the_librarys(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LEAST_ROWS", 16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    model = checkpoints.build(Model(type=family, config={**SMALL, **FAMILIES[family]}), 100, 512, 0)
    model.train().double()
    tokens = torch.randint(0, 100, (3, 130), generator=torch.Generator().manual_seed(0))
    ours: list[None] = []
    monkeypatch.setattr(torch, "bmm", counting(torch.bmm, ours))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    assert not ours
    attention.attend_by_blocks(model)
    after = gradients()
    assert ours
    assert len(after) == len(list(model.parameters()))
    for one, other in zip(after, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_later_token_changes_nothing_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LEAST_ROWS", 4)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    model = attention.prepare(
        checkpoints.build(Model(type="llama", config=SMALL), 100, 32, 0).eval(), CPU
    )
    tokens = torch.randint(0, 100, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 100
    one, other = hidden(model, tokens), hidden(model, changed)
    assert (one[:, :20] == other[:, :20]).all()
    assert (one[:, 20:] != other[:, 20:]).any(dim=-1).all()


def test_float32_stays_float32_whatever_onednn_does() -> None:
    attention.prefer_onednn()
    left, right = torch.randn(300, 400), torch.randn(400, 200)
    exact = left.double() @ right.double()
    assert ((left @ right) - exact).abs().max() / exact.abs().max() < 1e-5


def test_a_compiled_body_is_compiled_once_and_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Traced as ever, and run without a C++ compiler's minutes.
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m, **how: compile_module(m, backend="eager", **how)
    )
    model = checkpoints.build(Model(type="gpt_neox", config=SMALL), 100, 32, 0).eval()
    rows = np.random.default_rng(0).integers(0, 100, size=(100, 32))
    n_tokens = np.full(100, 32)
    ((before, _),) = sequence_losses([Scorer(model)], rows, n_tokens)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    attention.compile_body(model)
    scorer = Scorer(model)
    ((after, _),) = sequence_losses([scorer], rows, n_tokens)
    ((alone, _),) = sequence_losses([scorer], rows[7:8], n_tokens[7:8])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)
    assert alone[0] == after[7]
