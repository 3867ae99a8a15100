import copy
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import PreTrainedModel

from colorfilter.config.recipe import Model
from colorfilter.models import checkpoints
from colorfilter.scoring import chunks
from colorfilter.scoring.scoring import (
    Scorer,
    score_chunk,
    sequence_losses,
)
from tests.colorfilter.packed import (
    MODELS,
    SMALL,
    Counting,
    lively,
    read_chunks,
    reference,
    score,
    write_packed,
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return lively(MODELS["gpt_neox"], 0)


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_each_sequence_alone_in_float64(name: str, tmp_path: Path) -> None:
    n_tokens = [16] * 20 + [9, 2]
    folder, rows = write_packed(tmp_path / "tokens", n_tokens)
    model = lively(MODELS[name], 0)
    plain = checkpoints.head_weight(model) is not None
    assert plain == (name in {"gpt_neox", "llama"})
    score(Scorer(model), folder, tmp_path / "out")
    table = read_chunks(tmp_path / "out")
    assert table["position"].to_list() == list(range(22))
    assert table["n_tokens"].to_list() == [n - 1 for n in n_tokens]
    expected = reference(model, rows, np.array(n_tokens))
    assert expected.std() > 0.05
    np.testing.assert_allclose(table["loss"].to_numpy(), expected, rtol=0, atol=1e-5)


def test_losses_agree_with_those_of_transformers(model: PreTrainedModel, packed: Path) -> None:
    rows = np.load(packed / "tokens.npy")[:10].astype(np.int64)
    ((nll, _),) = sequence_losses([Scorer(model)], rows, np.full(10, 16))
    with torch.no_grad():
        for row, value in zip(torch.from_numpy(rows)[:, None], nll, strict=True):
            assert model(input_ids=row, labels=row).loss.item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_losses_keep_their_tolerance(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    _, rows = write_packed(tmp_path, [64] * 12, length=64)
    model = checkpoints.build(MODELS[name], 280, 64, seed=0).eval().to(dtype)
    ((nll, _),) = sequence_losses([Scorer(model)], rows, np.full(12, 64))
    assert nll.dtype == np.float32
    expected = reference(model, rows, np.full(12, 64))
    np.testing.assert_allclose(nll, expected, rtol=0, atol=5e-3)


WIDE = {**SMALL, "hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 128}


# Without products in bf16 a processor takes a minute.
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_a_loss_has_the_same_bits_in_any_company_order_and_number_of_threads(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    n_tokens = np.array([128, 128, 60, 128, 2, 128, 128, 11, 128, 128, 128])
    _, rows = write_packed(tmp_path, n_tokens.tolist(), length=128)
    model = checkpoints.build(Model(type="gpt_neox", config=WIDE), 3000, 128, seed=0).to(dtype)
    scorers = [Scorer(model)]
    ((expected, _),) = sequence_losses(scorers, rows, n_tokens)
    assert len(set(expected)) == len(rows)
    try:
        for threads, size, step in ((1, 1, 1), (2, 1, -1), (1, 8, -1), (2, 8, 1), (2, 2, 1)):
            torch.set_num_threads(threads)
            order = np.arange(len(rows))[::step]
            for start in range(0, len(rows), size):
                part = order[start : start + size]
                ((found, _),) = sequence_losses(scorers, rows[part], n_tokens[part])
                assert (found == expected[part]).all(), (threads, size)
    finally:
        torch.set_num_threads(1)


def test_a_loss_hardly_depends_on_the_shape_of_batches(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_tokens = np.array([16, 16, 5, 16, 2, 16, 16, 11, 16])
    _, rows = write_packed(tmp_path, n_tokens.tolist())
    found = []
    for batch in (1, 48, 10_000):
        monkeypatch.setattr(chunks, "BATCH_TOKENS", {"cpu": batch})
        found += [nll for nll, _ in sequence_losses([Scorer(model)], rows, n_tokens)]
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=0, atol=1e-5)


class Overflowing(Scorer):
    """Some sequences come out infinite, as in fp16."""

    def losses(
        self, tokens: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nll, n = super().losses(tokens, labels)
        return nll.where(tokens[:, 0] % 2 == 0, torch.inf), n


def test_what_is_not_finite_is_scored_again_in_float32(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    folder, rows = write_packed(tmp_path / "tokens", [16] * 12)
    odd = rows[:, 0] % 2 == 1
    assert 0 < odd.sum() < 12
    scorers, outs = {"m": Overflowing(model, "fp16")}, {"m": tmp_path / "out"}
    outs["m"].mkdir()
    exact = Counting(model)
    score_chunk(scorers, folder, "s", 0, 12, outs, exact=lambda _: exact)
    table = read_chunks(outs["m"])
    assert exact.scored == odd.sum()
    assert table["precision"].to_list() == ["float32" if o else "fp16" for o in odd]
    expected = reference(model, rows, np.full(12, 16))
    np.testing.assert_allclose(table["loss"].to_numpy(), expected, rtol=0, atol=1e-5)


def test_what_stands_in_the_padding_does_not_count(model: PreTrainedModel, tmp_path: Path) -> None:
    n_tokens = np.array([9])
    _, rows = write_packed(tmp_path, [9])
    ((nll, n),) = sequence_losses([Scorer(model)], rows, n_tokens)
    rows[0, 9:] = 77
    ((padded, _),) = sequence_losses([Scorer(model)], rows, n_tokens)
    assert n.tolist() == [8]
    assert padded[0] == pytest.approx(nll[0], abs=1e-6)


def test_a_model_that_was_training_is_scored_without_dropout(tmp_path: Path) -> None:
    dropping = Model(type="gpt_neox", config={**SMALL, "hidden_dropout": 0.5})
    model = checkpoints.build(dropping, 280, 16, seed=0).train()
    _, rows = write_packed(tmp_path, [16] * 4)
    scorer = Scorer(model)
    (one, _), (two, _) = sequence_losses([scorer, scorer], rows, np.full(4, 16))
    assert (one == two).all()


def test_labels_across_documents_can_be_left_out(tmp_path: Path) -> None:
    end = 3
    model = lively(MODELS["gpt_neox"], 0)
    folder, rows = write_packed(tmp_path / "tokens", [16, 16, 2])
    rows[0, 4], rows[2, 0] = end, end
    np.save(folder / "tokens.npy", rows)
    (receipt,) = score(Scorer(model), folder, tmp_path / "out", end)
    table = read_chunks(tmp_path / "out")
    within = (rows[:2, :-1] != end).sum(1)
    assert within[0] < 15
    assert table["n_tokens"].to_list() == within.tolist()
    assert (receipt.sequences, receipt.unscored) == (3, 1)
    exact = copy.deepcopy(model).double()
    ids = torch.from_numpy(rows[:2].astype(np.int64))
    with torch.no_grad():
        nll = -exact(input_ids=ids).logits[:, :-1].log_softmax(-1)
    nll = nll.gather(2, ids[:, 1:, None])[..., 0].numpy()
    expected = [nll[i][rows[i, :-1] != end].mean() for i in (0, 1)]
    np.testing.assert_allclose(table["loss"].to_numpy(), expected, rtol=0, atol=1e-5)


GROWTH_LIMIT = 16 * 2**20


@pytest.mark.slow
def test_memory_stays_flat_over_thousands_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "BATCH_TOKENS", {"cpu": 256})
    vocab_size = 4096
    wide = Model(type="gpt_neox", config={**SMALL, "hidden_size": 64})
    scorer = Scorer(lively(wide, 0, vocab_size))
    rng = np.random.default_rng(0)
    process = psutil.Process(os.getpid())

    def batches(n: int) -> None:
        for _ in range(n):
            size, length = rng.integers(1, 9), rng.integers(2, 49)
            rows = rng.integers(0, vocab_size, size=(size, length))
            sequence_losses([scorer], rows, np.full(size, length))

    batches(500)
    before = process.memory_info().rss
    batches(2000)
    assert process.memory_info().rss - before < GROWTH_LIMIT
