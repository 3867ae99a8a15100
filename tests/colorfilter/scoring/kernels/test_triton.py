"""Tests of the Triton kernels: interpreted on the CPU, compiled on a GPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from colorfilter.scoring.kernels import reference
from colorfilter.scoring.labels import IGNORED

triton = pytest.importorskip("triton")
from colorfilter.scoring.kernels import triton as kernels  # noqa: E402

ROOT = Path(__file__).resolve().parents[4]
DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
TILES = {torch.float16: kernels.WIDE, torch.bfloat16: kernels.NARROW, torch.float32: kernels.EXACT}
DTYPES = list(TILES)
TOLERANCE = 1e-5

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_case(
    B: int, T: int, D: int, V: int, dtype: torch.dtype, ignored: float = 0.2, scale: float = 2.0
) -> Case:
    """Logits of standard deviation `scale`; the first token's label is the last entry."""
    rng = torch.Generator().manual_seed(B + 10 * T + 100 * D + 1000 * V)
    hidden = torch.randn(B, T, D, generator=rng) * scale
    weight = torch.randn(V, D, generator=rng) / math.sqrt(D)
    labels = torch.randint(V, (B, T), generator=rng)
    labels[torch.rand(B, T, generator=rng) < ignored] = IGNORED
    labels[0, 0] = V - 1
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


def by(case: Case, splits: int, tile: kernels.Tile | None = None) -> torch.Tensor:
    hidden, weight, labels = case
    tile = tile or TILES[hidden.dtype]
    columns = math.ceil(math.ceil(len(weight) / tile.columns) / splits) * tile.columns
    nll, n = kernels.sequence_nll_by(hidden, weight, labels, tile, columns)
    torch.testing.assert_close(n, (labels != IGNORED).sum(1, dtype=torch.int32))
    assert nll.dtype == torch.float32
    return nll


def assert_agrees(nll: torch.Tensor, case: Case) -> None:
    expected, _ = reference.sequence_nll(*case)
    torch.testing.assert_close(nll, expected, rtol=0, atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "D", "V"),
    [(1, 1, 8, 1), (3, 50, 40, 300), (2, 130, 72, 513), (5, 7, 101, 256), (1, 600, 16, 100)],
)
def test_losses_agree_with_float64_at_ragged_shapes(
    B: int, T: int, D: int, V: int, dtype: torch.dtype
) -> None:
    case = make_case(B, T, D, V, dtype)
    nll, n = kernels.sequence_nll(*case)
    assert_agrees(nll, case)
    torch.testing.assert_close(n, reference.sequence_nll(*case)[1])
    assert_agrees(by(case, splits=1), case)


@pytest.mark.parametrize("tile", [kernels.WIDE, kernels.NARROW])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_splits_moves_no_loss(dtype: torch.dtype, tile: kernels.Tile) -> None:
    case = make_case(2, 40, 64, 1000, dtype)
    tile = kernels.EXACT if dtype == torch.float32 else tile
    whole = by(case, 1, tile)
    assert_agrees(whole, case)
    for splits in (2, 3, 4):
        split = by(case, splits, tile)
        assert_agrees(split, case)
        torch.testing.assert_close(split, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_without_labels_is_nan_and_the_others_stand(dtype: torch.dtype) -> None:
    hidden, weight, labels = make_case(3, 20, 16, 300, dtype)
    labels[1] = IGNORED
    nll, n = kernels.sequence_nll(hidden, weight, labels)
    assert_agrees(nll, (hidden, weight, labels))
    assert nll.isnan().tolist() == [False, True, False]
    assert n[1] == 0


def test_no_tokens_give_no_losses() -> None:
    _, weight, _ = make_case(1, 1, 16, 30, torch.float32)
    for B, T in [(0, 4), (2, 0)]:
        labels = torch.zeros(B, T, dtype=torch.int64, device=DEVICE)
        nll, n = kernels.sequence_nll(torch.zeros(B, T, 16, device=DEVICE), weight, labels)
        assert nll.dtype == torch.float32
        assert nll.shape == n.shape == (B,)
        assert nll.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_extreme_logits_do_not_overflow(dtype: torch.dtype, splits: int) -> None:
    hidden, weight, labels = make_case(2, 30, 16, 600, dtype)
    weight[:, 0] = torch.where(torch.arange(600, device=DEVICE) % 2 == 0, 1.0, -1.0)
    hidden[..., 0] = 200.0
    hidden[:, ::2, 0] = -200.0
    case = hidden, weight, labels
    expected, _ = reference.sequence_nll(*case)
    assert expected.min() > 100
    torch.testing.assert_close(by(case, splits), expected, rtol=1e-6, atol=0)


def test_even_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    hidden, weight, labels = make_case(1, 5, 16, 300, torch.float16, ignored=0)
    nll, n = kernels.sequence_nll(torch.zeros_like(hidden), weight, labels)
    assert nll.item() == pytest.approx(math.log(300), abs=1e-6)
    assert n.item() == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("splits", [1, 2])
def test_a_hidden_state_that_is_not_finite_surfaces_in_its_sequence_alone(
    dtype: torch.dtype, bad: float, splits: int
) -> None:
    case = make_case(3, 20, 16, 600, dtype, ignored=0)
    clean = by(case, splits)
    case[0][1, 4, 3] = bad
    nll = by(case, splits)
    assert nll.isfinite().tolist() == [True, False, True]
    assert torch.equal(nll[[0, 2]], clean[[0, 2]])


def test_a_hidden_state_without_a_label_counts_for_nothing() -> None:
    hidden, weight, labels = make_case(3, 20, 16, 300, torch.float16)
    clean, _ = kernels.sequence_nll(hidden, weight, labels)
    hidden[labels == IGNORED] = math.nan
    nll, _ = kernels.sequence_nll(hidden, weight, labels)
    assert torch.equal(nll, clean)


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_weight_that_is_not_a_number_surfaces_in_every_sequence(place: str) -> None:
    case = make_case(3, 20, 16, 600, torch.float16, ignored=0)
    case[1][0 if place == "first" else -1, 0] = math.nan
    assert by(case, 2).isnan().all()


@pytest.mark.parametrize("label", [-1, 300, 301, 2**40])
def test_a_label_outside_the_vocabulary_is_no_loss(label: int) -> None:
    hidden, weight, labels = make_case(3, 20, 16, 300, torch.float16)
    labels[1, 5] = label
    nll, _ = kernels.sequence_nll(hidden, weight, labels)
    assert nll.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_read_was_written(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(3, 50, 40, 300, dtype)
    case[2][1] = IGNORED
    clean = by(case, 2), kernels.sequence_nll(*case)[1]

    def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        value = math.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        return torch.full(shape, value, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", poisoned)
    again = by(case, 2), kernels.sequence_nll(*case)[1]
    for a, b in zip(again, clean, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_run_nor_batch_nor_place(dtype: torch.dtype) -> None:
    hidden, weight, labels = make_case(5, 50, 72, 700, dtype)
    together = by((hidden, weight, labels), 2)
    assert torch.equal(by((hidden, weight, labels), 2), together)
    order = torch.tensor([3, 0, 4, 2, 1], device=DEVICE)
    assert torch.equal(by((hidden[order], weight, labels[order]), 2), together[order])
    for n in (1, 2, 3):
        assert torch.equal(by((hidden[-n:], weight, labels[-n:]), 2), together[-n:])


def test_bits_of_single_tokens_do_not_depend_on_how_many_are_scored() -> None:
    hidden, weight, labels = make_case(400, 1, 16, 9000, torch.float16, ignored=0)
    together, _ = kernels.sequence_nll(hidden, weight, labels)
    # The interpreter multiplies by numpy, whose library may treat a tile's rows unlike each other.
    place = kernels.NARROW.rows if kernels.INTERPRETED else 150
    for part in (slice(0, 100), slice(place, 400)):
        nll, _ = kernels.sequence_nll(hidden[part], weight, labels[part])
        assert torch.equal(nll, together[part])


def test_tensors_need_not_lie_in_order() -> None:
    hidden, weight, labels = make_case(3, 21, 17, 300, torch.float16)
    part = hidden[:, :-1, 1:], weight[:, 1:], labels[:, :-1]
    assert_agrees(kernels.sequence_nll(*part)[0], part)
    turned = (
        hidden.transpose(0, 1).contiguous().transpose(0, 1),
        weight.T.contiguous().T,
        labels.T.contiguous().T,
    )
    assert_agrees(kernels.sequence_nll(*turned)[0], turned)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Figures of the kernels as compiled for sm_90."""
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this Triton brings no cuobjdump")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
    }
    program = Path(__file__).with_name("compile_ahead.py")
    done = subprocess.run(
        [sys.executable, program],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["wide fp16", "wide bf16", "narrow fp16", "narrow bf16"])
def test_compiled_half_precision_stays_in_registers_and_uses_tensor_cores(
    compiled: dict[str, dict[str, int]], name: str
) -> None:
    found = compiled[name]
    assert found["spills"] == 0
    assert found["registers"] <= 255
    assert found["tensor_core"] > 0
    assert found["bulk_loads"] > 0
    if name.startswith("narrow"):  # two programs on a multiprocessor
        assert found["registers"] <= 128
        assert found["shared"] <= 113 * 1024


def test_compiled_float32_is_not_rounded_for_tensor_cores(
    compiled: dict[str, dict[str, int]],
) -> None:
    assert compiled["exact fp32"]["spills"] == 0
    assert compiled["exact fp32"]["tensor_core"] == 0
    assert compiled["join"]["spills"] == 0
