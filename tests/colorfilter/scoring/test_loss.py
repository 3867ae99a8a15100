import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from colorfilter.scoring.kernels import chunked
from colorfilter.scoring.labels import IGNORED
from colorfilter.scoring.loss import logits_nll, sequence_nll


def reference(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    wanted = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    counted = labels != IGNORED
    n = counted.sum(1)
    with np.errstate(invalid="ignore"):
        return np.where(counted, log_z - wanted, 0).sum(1) / n, n


def make_case(
    B: int, T: int, D: int, V: int, scale: float, ignored: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    hidden = torch.from_numpy(rng.normal(size=(B, T, D)).astype(np.float32) * scale)
    weight = torch.from_numpy(rng.normal(size=(V, D)).astype(np.float32))
    labels = rng.integers(0, V, size=(B, T))
    labels[rng.random((B, T)) < ignored] = IGNORED
    return hidden, weight, torch.from_numpy(labels)


cases = st.builds(
    make_case,
    B=st.integers(1, 4),
    T=st.integers(1, 9),
    D=st.integers(1, 6),
    V=st.integers(1, 30),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@given(case=cases, block=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_losses_agree_with_float64_however_they_are_cut_into_blocks(
    kernel: str, case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], block: tuple[int, int]
) -> None:
    hidden, weight, labels = case
    expected, n_expected = reference(
        hidden.double().numpy() @ weight.double().numpy().T, labels.numpy()
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(chunked.BLOCKS, "cpu", block)
        nll, n = sequence_nll(hidden, weight, labels, kernel)
    assert nll.dtype == torch.float32
    assert n.dtype == torch.int32
    np.testing.assert_allclose(nll.numpy(), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(n.numpy(), n_expected)


@given(cases)
def test_losses_from_full_logits_agree_with_float64(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    hidden, weight, labels = case
    logits = hidden @ weight.T
    nll, n = logits_nll(logits, labels)
    expected, n_expected = reference(logits.numpy(), labels.numpy())
    np.testing.assert_allclose(nll.numpy(), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(n.numpy(), n_expected)


def test_even_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    nll, n = sequence_nll(torch.zeros(1, 5, 3), torch.ones(50, 3), torch.arange(5)[None])
    assert nll.item() == pytest.approx(math.log(50), abs=1e-6)
    assert n.item() == 5


def test_a_row_without_labels_is_nan_and_the_others_stand() -> None:
    hidden, weight, labels = make_case(3, 6, 4, 10, 1.0, 0.0, 0)
    alone, _ = sequence_nll(hidden[:1], weight, labels[:1])
    labels[1] = IGNORED
    nll, n = sequence_nll(hidden, weight, labels)
    assert n.tolist() == [6, 0, 6]
    assert nll[1].isnan()
    assert nll[0].item() == pytest.approx(alone.item(), abs=1e-6)
    assert nll[2].isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_hidden_state_that_is_not_finite_surfaces_in_its_row_alone(bad: float) -> None:
    hidden, weight, labels = make_case(3, 6, 4, 10, 1.0, 0.0, 0)
    hidden[1, 2, 0] = bad
    nll, _ = sequence_nll(hidden, weight, labels)
    assert nll.isfinite().tolist() == [True, False, True]
    nll, _ = logits_nll(hidden @ weight.T, labels)
    assert nll.isfinite().tolist() == [True, False, True]


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.full((1, 2, 1), 1000.0)
    nll, _ = sequence_nll(hidden, torch.tensor([[1.0], [0.5]]), torch.tensor([[0, 1]]))
    assert nll.item() == pytest.approx(250.0)


@given(cases)
def test_a_sequences_loss_does_not_depend_on_its_batch_or_place(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    hidden, weight, labels = case
    together, _ = sequence_nll(hidden, weight, labels)
    backwards, _ = sequence_nll(hidden.flip(0), weight, labels.flip(0))
    for b in range(len(hidden)):
        alone, _ = sequence_nll(hidden[b : b + 1], weight, labels[b : b + 1])
        torch.testing.assert_close(alone[0], together[b], rtol=0, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(
            backwards[-1 - b], together[b], rtol=0, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_losses_keep_their_tolerance(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    hidden = torch.from_numpy(rng.normal(size=(16, 64, 32))).to(dtype)
    weight = torch.from_numpy(rng.normal(size=(300, 32)) * 0.7).to(dtype)
    labels = torch.from_numpy(rng.integers(0, 300, size=(16, 64)))
    logits = hidden.double().numpy() @ weight.double().numpy().T
    expected, _ = reference(logits, labels.numpy())
    nll, _ = sequence_nll(hidden, weight, labels)
    assert nll.dtype == torch.float32
    np.testing.assert_allclose(nll.numpy(), expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_half_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(4, 64, 300)) * 4).to(dtype)
    labels = torch.from_numpy(rng.integers(0, 300, size=(4, 64)))
    expected, _ = reference(logits.double().numpy(), labels.numpy())
    nll, _ = logits_nll(logits, labels)
    np.testing.assert_allclose(nll.numpy(), expected, rtol=0, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def test_the_full_logits_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = make_case(4, 128, 6, 1000, 1.0, 0.0, 0)
    monkeypatch.setitem(chunked.BLOCKS, "cpu", (64, 250))
    with LargestTensor() as largest:
        sequence_nll(hidden, weight, labels)
    assert largest.numel == 64 * 250
