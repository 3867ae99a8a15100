"""A training run that is killed and resumed ends bit-identical to an uninterrupted one."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from colorfilter.models import checkpoints
from colorfilter.training import training
from colorfilter.training.spec import TrainSpec, planned_tokens, trained_tokens
from colorfilter.training.training import train
from tests.colorfilter.trained import KilledError, assert_same_result, killed

STEPS = 18  # 10 steps to the first end point, and to the second 4 of the trunk and 4 of decay


@pytest.mark.parametrize("after", [1, 4, 7, 8, 9, 10, 11, 13, 14, 15, 17, STEPS])
def test_a_killed_run_ends_with_the_same_bits(
    spec: TrainSpec,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(training, "SAVING_PAUSE", 0.0)
    run = replace(spec, out=tmp_path)
    assert trained_tokens(run) == 0
    killed(run, after)
    standing = trained_tokens(run)
    done: list[int] = []
    train(run, progress=done.append)
    assert len(done) == STEPS - after + 1
    assert standing + sum(done) == planned_tokens(run)
    assert_same_result(tmp_path, undisturbed)


def test_a_run_killed_again_and_again_ends_with_the_same_bits(
    spec: TrainSpec, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(training, "SAVING_PAUSE", 0.0)
    run = replace(spec, out=tmp_path)
    for _ in range(5):
        killed(run, 4)
    train(run)
    assert_same_result(tmp_path, undisturbed)


@pytest.mark.parametrize(("saved", "after"), [(8, 12), (8, 16), (9, 15), (12, 17)])
def test_a_run_killed_long_after_its_last_state_ends_with_the_same_bits(
    spec: TrainSpec,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved: int,
    after: int,
) -> None:
    """Whose trunk has gone past a fork that the state has still to come to."""
    run = replace(spec, out=tmp_path)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 1e9)
    monkeypatch.setattr(training, "SAVING_PAUSE", 0.0)
    steps = []

    def progress(tokens: int) -> None:
        steps.append(tokens)
        training.CHECKPOINT_SECONDS = -1.0 if len(steps) == saved else 1e9
        if len(steps) == after:
            raise KilledError

    with pytest.raises(KilledError):
        train(run, progress=progress)
    assert (tmp_path / "running.safetensors").exists()
    done: list[int] = []
    train(run, progress=done.append)
    assert len(done) == STEPS - saved
    assert_same_result(tmp_path, undisturbed)


@pytest.mark.parametrize("after", [5, 12])
def test_a_run_killed_before_its_first_state_begins_anew(
    spec: TrainSpec, undisturbed: Path, tmp_path: Path, after: int
) -> None:
    run = replace(spec, out=tmp_path)
    killed(run, after)
    train(run)
    assert_same_result(tmp_path, undisturbed)


@pytest.mark.parametrize("nth", [0, 5, 12])
def test_a_run_killed_while_it_saves_its_state_ends_with_the_same_bits(
    spec: TrainSpec,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nth: int,
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(training, "SAVING_PAUSE", 0.0)
    run = replace(spec, out=tmp_path)
    left = nth

    def torn(tensors: dict[str, torch.Tensor], path: Path, **_: object) -> None:
        nonlocal left
        if left == 0:
            Path(path).write_bytes(b"torn")
            raise KilledError
        left -= 1
        save(tensors, path, **_)

    save = safetensors.torch.save_file
    with monkeypatch.context() as patch:
        patch.setattr(training.safetensors.torch, "save_file", torn)
        with pytest.raises(KilledError):
            train(run)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 1e9)  # what is torn is not replaced
    train(run)
    assert_same_result(tmp_path, undisturbed)


@pytest.mark.parametrize("nth", [0, 1])
def test_a_run_killed_while_it_writes_a_model_ends_with_the_same_bits(
    spec: TrainSpec,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nth: int,
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(training, "SAVING_PAUSE", 0.0)
    run = replace(spec, out=tmp_path)
    left = nth

    def torn(model: object, folder: Path, tokenizer: Path) -> None:
        nonlocal left
        save(model, folder, tokenizer)
        if left == 0:
            (folder / "model.safetensors").write_bytes(b"torn")
            raise KilledError
        left -= 1

    save = checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", torn)
        with pytest.raises(KilledError):
            train(run)
    train(run)
    assert_same_result(tmp_path, undisturbed)


def test_a_cosine_run_killed_in_its_second_half_ends_with_the_same_bits(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(training, "SAVING_PAUSE", 0.0)
    cosine = spec.training.model_copy(update={"schedule": "cosine"})
    run = replace(spec, training=cosine, endpoints=(20, 32), out=tmp_path / "whole")
    train(run)
    for after in (3, 6, 9):
        again = replace(run, out=tmp_path / str(after))
        killed(again, after)
        train(again)
        assert_same_result(again.out, run.out)


def test_a_finished_run_is_not_run_again(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(spec, endpoints=(8, 16), out=tmp_path)
    first = train(run)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    done: list[int] = []
    assert train(run, progress=done.append) == first
    assert done == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_no_pickle_is_written_and_no_state_is_left(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(training, "SAVING_PAUSE", 0.0)
    run = replace(spec, out=tmp_path)
    killed(run, 9)
    assert {p.name for p in tmp_path.iterdir()} == {"running.safetensors", "trunk-0.safetensors"}
    train(run)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".parquet"}
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"curve.parquet"}


def test_saving_states_changes_nothing(
    spec: TrainSpec, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(training, "SAVING_PAUSE", 0.0)
    train(replace(spec, out=tmp_path))
    assert_same_result(tmp_path, undisturbed)


def test_a_run_asks_for_the_room_that_it_takes(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(training, "SAVING_PAUSE", 0.0)
    asked: list[int] = []
    monkeypatch.setattr(training, "require_space", lambda _, size, __: asked.append(size))
    taken: list[int] = []

    def progress(_: int) -> None:
        taken.append(sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()))

    train(replace(spec, out=tmp_path), progress=progress)
    (room,) = asked
    weights = max(f.stat().st_size for f in tmp_path.rglob("model.safetensors"))
    state = 3 * weights  # beside a running state, its successor lies for a moment
    assert max(taken) + state < room < 2 * (max(taken) + state)


def test_a_full_disk_is_told_before_the_first_step(
    spec: TrainSpec, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(spec, out=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(OSError, match="make room"):
            train(run)
    train(run)
    assert_same_result(tmp_path, undisturbed)
