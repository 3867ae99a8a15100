from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from colorfilter.config.recipe import Model, Training
from colorfilter.models import checkpoints
from colorfilter.training import training
from colorfilter.training.rho_down import chosen_rows
from colorfilter.training.spec import Online, TrainSpec, planned_tokens, trained_tokens
from colorfilter.training.training import train
from tests.colorfilter.trained import assert_same_result, killed

N, T, TAU, BATCH = 96, 16, 4.0, 5
NEEDED = 23  # so that the last batch is short


@pytest.fixture
def spec(tiny: Model, tokenizer_folder: Path, tmp_path: Path) -> TrainSpec:
    import polars as pl

    rng = np.random.default_rng(0)
    pool = tmp_path / "pool"
    pool.mkdir()
    np.save(pool / "tokens.npy", rng.integers(1, 280, size=(N, T), dtype=np.uint16))
    pl.DataFrame(
        {"position": range(N), "n_tokens": [T] * N},
        schema={"position": pl.Int64, "n_tokens": pl.Int32},
    ).write_parquet(pool / "sequences.parquet")
    np.save(tmp_path / "conditional.npy", rng.normal(5.0, 0.05, N).astype(np.float32))
    return TrainSpec(
        start=tiny,
        tokens=pool,
        tokenizer=tokenizer_folder,
        training=Training(learning_rate=1e-30, batch_sequences=BATCH, weight_decay=0),
        seed=3,
        endpoints=(NEEDED,),
        out=tmp_path / "out",
        online=Online(tmp_path / "conditional.npy", TAU),
    )


def current_losses(spec: TrainSpec) -> np.ndarray:
    """Of the fresh model, in float64, by transformers' own logits."""
    assert isinstance(spec.start, Model)
    model = checkpoints.build(spec.start, 280, T, spec.seed).eval().double()
    rows = torch.from_numpy(np.load(spec.tokens / "tokens.npy").astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, :-1]
    nll = functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    return nll.mean(dim=1).numpy()


def test_of_each_batch_of_candidates_the_lowest_are_chosen(spec: TrainSpec) -> None:
    train(spec)
    assert spec.online is not None
    scores = np.load(spec.online.conditional).astype(np.float64) - current_losses(spec)
    expected: list[int] = []
    for first in range(0, NEEDED, BATCH):
        seen = np.arange(int(TAU * first), int(TAU * min(first + BATCH, NEEDED)))
        ranked = sorted(seen, key=lambda row: scores[row])
        expected += ranked[: min(BATCH, NEEDED - first)]
    chosen = chosen_rows(spec.out)
    assert chosen["row"].tolist() == expected
    np.testing.assert_allclose(chosen["score"], scores[expected], rtol=0, atol=1e-5)


def test_current_losses_are_over_the_labels_of_the_conditional(spec: TrainSpec) -> None:
    """Behind the token that ends a document no label counts, for either."""
    assert spec.online is not None
    tokens = np.load(spec.tokens / "tokens.npy")
    eot_id = int(np.bincount(tokens.ravel().astype(np.int64)).argmax())
    spec = replace(spec, online=replace(spec.online, eot_id=eot_id))
    train(spec)
    assert isinstance(spec.start, Model)
    model = checkpoints.build(spec.start, 280, T, spec.seed).eval().double()
    rows = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, :-1]
    nll = functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    counts = rows[:, :-1] != eot_id
    current = ((nll * counts).sum(1) / counts.sum(1)).numpy()
    chosen = chosen_rows(spec.out)
    assert not counts.all()
    assert spec.online is not None
    scores = np.load(spec.online.conditional).astype(np.float64) - current
    np.testing.assert_allclose(chosen["score"], scores[chosen["row"]], rtol=0, atol=1e-5)


def test_what_is_chosen_depends_on_what_was_learnt(spec: TrainSpec, tmp_path: Path) -> None:
    train(spec)
    fast = replace(
        spec,
        out=tmp_path / "fast",
        training=spec.training.model_copy(update={"learning_rate": 0.05}),
    )
    train(fast)
    slow_rows, fast_rows = chosen_rows(spec.out)["row"], chosen_rows(fast.out)["row"]
    assert slow_rows[:BATCH].tolist() == fast_rows[:BATCH].tolist()
    assert set(slow_rows.tolist()) != set(fast_rows.tolist())


def test_the_model_is_trained_on_what_was_chosen(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    step = training.Run.step

    def look(self: training.Run, rows: np.ndarray, rate: float, number: int) -> float:
        seen.extend(rows.tolist())
        return step(self, rows, rate, number)

    monkeypatch.setattr(training.Run, "step", look)
    train(spec)
    assert seen == chosen_rows(spec.out)["row"].tolist()


@pytest.mark.parametrize("after", [3, 8])
def test_a_killed_run_chooses_the_same(
    spec: TrainSpec, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = replace(spec, training=spec.training.model_copy(update={"learning_rate": 0.05}))
    train(replace(fast, out=tmp_path / "undisturbed"))
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(training, "SAVING_PAUSE", 0.0)
    killed(fast, after)
    standing, reported = trained_tokens(fast), []
    train(fast, progress=reported.append)
    assert standing + sum(reported) == planned_tokens(fast)
    assert_same_result(fast.out, tmp_path / "undisturbed")
    assert chosen_rows(fast.out).tolist() == chosen_rows(tmp_path / "undisturbed").tolist()


def test_planned_tokens_are_those_that_are_reported(spec: TrainSpec) -> None:
    reported: list[int] = []
    train(spec, progress=reported.append)
    assert sum(reported) == planned_tokens(spec) == T * (NEEDED + int(TAU * NEEDED))
