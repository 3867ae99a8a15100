"""Two processes train one model with gloo on the CPU; compared with a single process."""

import operator
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
import safetensors.torch

from colorfilter.compute.local_pool import Call, Workers, process_context
from colorfilter.compute.machine import IN_GROUP
from colorfilter.errors import InputError
from colorfilter.training import training
from colorfilter.training.spec import TrainSpec
from colorfilter.training.training import train

# Gradients are added up in another order: the last bits of a float32, each step.
TOLERANCE = 2e-5  # nats per token


def train_as(rank: int, size: int, meeting: Path, spec: TrainSpec, steps: int | None) -> None:
    """One process of a group; killed after so many steps, if any."""
    from torch import distributed

    from colorfilter.training.process_group import Group

    where = f"file://{meeting}"
    distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    training.MICRO_BATCH_TOKENS["cpu"] = 32  # two sequences: several parts to a batch
    training.CHECKPOINT_SECONDS = training.SAVING_PAUSE = 0.0
    done = 0

    def count(_amount: int) -> None:
        nonlocal done
        done += 1
        if done == steps:
            os._exit(9)

    train(spec, progress=count, group=Group())
    distributed.destroy_process_group()


def together(spec: TrainSpec, meeting: Path, size: int = 2, steps: int | None = None) -> list[int]:
    """Exit codes of a group's processes."""
    context = process_context()
    group = [
        context.Process(target=train_as, args=(rank, size, meeting, spec, steps))
        for rank in range(size)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join()
    return [process.exitcode or 0 for process in group]


def without_dropout(spec: TrainSpec, out: Path) -> TrainSpec:
    assert not isinstance(spec.start, str)
    config = {**spec.start.config, "hidden_dropout": 0.0}
    return replace(spec, out=out, start=spec.start.model_copy(update={"config": config}))


def curve(spec: TrainSpec) -> pl.DataFrame:
    return pl.read_parquet(spec.out / "curve.parquet")


def weights(spec: TrainSpec) -> np.ndarray:
    (*_, last) = sorted(spec.out.glob("tokens-*"), key=lambda p: int(p.name.split("-")[1]))
    tensors = safetensors.torch.load_file(last / "model.safetensors")
    return np.concatenate([tensors[name].flatten().numpy() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def alone(spec: TrainSpec, tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    own = without_dropout(spec, tmp_path_factory.mktemp("alone"))
    train(own)
    return own


@pytest.mark.parametrize("size", [2, 3])
def test_a_group_gives_the_loss_curve_of_one_process(
    alone: TrainSpec, size: int, tmp_path: Path
) -> None:
    """Of three one has a row less, and of the last batch, of four, two have."""
    spec = replace(alone, out=tmp_path / "out")
    assert together(spec, tmp_path / "meeting", size) == [0] * size
    ours, theirs = curve(spec), curve(alone)
    exact = ["endpoint", "step", "tokens", "learning_rate"]
    assert ours.select(exact).equals(theirs.select(exact))
    for column in ("loss", "held_out_loss"):
        assert (ours[column].is_null() == theirs[column].is_null()).all()
        assert (ours[column] - theirs[column]).abs().max() < TOLERANCE
    assert np.abs(weights(spec) - weights(alone)).max() < 1e-3
    assert {p.name for p in spec.out.iterdir()} == {p.name for p in alone.out.iterdir()}


def first_fails() -> None:
    """What one process of a group does."""
    import torch
    from torch import distributed

    if distributed.get_rank() == 0:
        raise InputError("what is wrong, in a line")
    distributed.all_reduce(torch.zeros(1))


def test_what_one_process_raises_is_told_and_not_that_the_others_are_alone(tmp_path: Path) -> None:
    """Which of them ends first is left to chance, so it is tried some times."""
    first = Call(f"{__name__}:first_fails")
    with Workers(2) as pool:
        for i in range(6):
            meeting = tmp_path / f"a meeting, {i}"
            calls = [(IN_GROUP, rank, 2, meeting, first) for rank in range(2)]
            with pytest.raises(InputError, match="what is wrong"):
                list(pool.run(operator.call, calls))


def fails_at_once() -> None:
    raise InputError("what is wrong, in a line")


def test_one_that_never_comes_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    """As where a run is stopped before all processes of a group have begun."""
    fails = Call(f"{__name__}:fails_at_once")
    calls = [(IN_GROUP, 0, 2, tmp_path / "meeting", fails), (fails,)]
    with Workers(2) as pool, ThreadPoolExecutor(1) as thread:
        asked = thread.submit(lambda: list(pool.run(operator.call, calls)))
        try:
            with pytest.raises(InputError, match="what is wrong"):
                asked.result(60)
        except TimeoutError:
            for process in psutil.Process().children(recursive=True):
                process.kill()
            pytest.fail("the first process waits for ever")


@pytest.mark.slow
def test_a_group_that_was_killed_goes_on_from_its_state(alone: TrainSpec, tmp_path: Path) -> None:
    spec = replace(alone, out=tmp_path / "out")
    assert together(spec, tmp_path / "first", steps=6) == [9, 9]
    assert (spec.out / "running.safetensors").exists()
    assert together(spec, tmp_path / "second") == [0, 0]
    undisturbed = replace(alone, out=tmp_path / "undisturbed")
    together(undisturbed, tmp_path / "third")
    assert curve(spec).equals(curve(undisturbed))
    assert (weights(spec) == weights(undisturbed)).all()
