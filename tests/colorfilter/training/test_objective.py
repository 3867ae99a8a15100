from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from colorfilter.config.recipe import Model
from colorfilter.models import checkpoints
from colorfilter.scoring.labels import IGNORED
from colorfilter.training import objective
from colorfilter.training.objective import summed_nll, summed_z

LENGTH, VOCAB = 16, 280
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {**SMALL, "intermediate_size": 32, "max_position_embeddings": LENGTH}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH}
PLAIN = {
    "gpt_neox": Model(type="gpt_neox", config={**SMALL, "intermediate_size": 32}),
    "llama": Model(type="llama", config=LLAMA),
    "tied llama": Model(type="llama", config={**LLAMA, "tie_word_embeddings": True}),
    "gpt2 with dropout": Model(type="gpt2", config=GPT2),
}


def build(model: Model) -> PreTrainedModel:
    return checkpoints.build(model, VOCAB, LENGTH, seed=0).train()


def make_batch(sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last of several sequences has no label at all."""
    generator = torch.Generator().manual_seed(sequences)
    tokens, labels = torch.randint(0, VOCAB, (2, sequences, LENGTH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED
    if sequences > 1:
        labels[-1] = IGNORED
    return tokens, labels


def from_full_logits(
    model: PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    logits = model(input_ids=tokens).logits
    chosen = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return -chosen[labels != IGNORED].sum()


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (loss / 100).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sequences", [1, 5, 16, 20, 33])
@pytest.mark.parametrize("name", PLAIN)
def test_loss_and_gradients_are_those_of_full_logits_in_float64(name: str, sequences: int) -> None:
    model = build(PLAIN[name]).double()
    tokens, labels = make_batch(sequences)
    head_weight = checkpoints.head_weight(model)
    assert head_weight is not None
    torch.manual_seed(1)
    loss = summed_nll(model, head_weight, tokens, labels)
    mine = gradients(model, loss)
    torch.manual_seed(1)
    exact = from_full_logits(model, tokens, labels)
    expected = gradients(model, exact)
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    assert mine.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(mine[parameter], gradient, rtol=1e-9, atol=1e-14)


def test_a_batch_without_labels_has_no_loss_and_no_gradient() -> None:
    model = build(PLAIN["llama"])
    tokens, labels = make_batch(3)
    loss = summed_nll(model, checkpoints.head_weight(model), tokens, labels.fill_(IGNORED))
    assert loss.item() == 0
    assert all((g == 0).all() for g in gradients(model, loss).values())


def test_logits_are_never_held_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    exp = torch.Tensor.exp_

    def watching(self: torch.Tensor) -> torch.Tensor:
        rows.append(len(self))
        assert self.shape[1] == VOCAB
        return exp(self)

    def forbidden(*_: Any) -> None:
        raise AssertionError("the head was run")

    model = build(PLAIN["gpt_neox"])
    head_weight = checkpoints.head_weight(model)
    model.get_output_embeddings().register_forward_hook(forbidden)
    monkeypatch.setattr(torch.Tensor, "exp_", watching)
    summed_nll(model, head_weight, *make_batch(40)).backward()
    assert rows == [256, 256, 128]
    assert objective.CHUNK.batch_chunk_size == 256


@pytest.mark.parametrize("autocast", [True, False])
def test_the_loss_of_bf16_logits_is_summed_in_float32(autocast: bool) -> None:
    model = build(PLAIN["llama"]).to(torch.float32 if autocast else torch.bfloat16)
    tokens, labels = make_batch(20)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = summed_nll(model, None, tokens, labels)
        logits = model(input_ids=tokens).logits
    assert logits.dtype == torch.bfloat16
    exact = functional.cross_entropy(
        logits.double().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("sequences", [1, 5])
def test_the_z_loss_is_the_squared_log_sum_exp_of_the_labels_logits(sequences: int) -> None:
    model = build(PLAIN["llama"])
    tokens, labels = make_batch(sequences)
    nll, z = summed_z(model, tokens, labels)
    exact = build(PLAIN["llama"]).double()
    logits = exact(input_ids=tokens).logits[labels != IGNORED]
    assert z.item() == pytest.approx((logits.exp().sum(-1).log() ** 2).sum().item(), rel=1e-5)
    assert nll.item() == pytest.approx(from_full_logits(exact, tokens, labels).item(), rel=1e-5)
    z.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in grads)
