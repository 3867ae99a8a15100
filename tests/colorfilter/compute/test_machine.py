"""How trainings are divided among the cores of a machine; no worker is started."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from colorfilter.compute import machine as module
from colorfilter.compute.machine import BYTES_PER_PARAMETER, IN_GROUP, PARAMETERS, TRAIN, Machine
from colorfilter.training.spec import Online, TrainSpec
from tests.colorfilter.conftest import LENGTH

PARAMETERS_OF_ALL = 1_000_000


class Recorded(Machine):
    """A machine of eight cores that notes calls and makes none."""

    def __init__(self, kind: str = "cpu") -> None:
        self.kind = kind
        self.members: list[tuple[Any, ...]] = []

    def run(self, _: Any, arguments: Any, *__: Any) -> Iterator[tuple[int, Any]]:
        if any(call[0] == PARAMETERS for call in arguments):
            yield from ((i, PARAMETERS_OF_ALL) for i in range(len(arguments)))
        else:
            self.members = list(arguments)
            yield from ((i, f"result {i}") for i in range(len(arguments)))


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 8)


def of_step(spec: TrainSpec, sequences: int) -> TrainSpec:
    return replace(spec, training=spec.training.model_copy(update={"batch_sequences": sequences}))


@pytest.mark.parametrize(
    ("tokens", "runs", "share", "processes"),
    [
        (1_024, 1, 1, 2),
        (4_096, 1, 1, 8),
        (65_536, 1, 1, 8),
        (4_096, 3, 3, 2),
        (4_096, 1, 9, 1),
        (512, 1, 1, 1),
        (256, 1, 1, 1),
    ],
)
def test_the_cores_are_divided_between_runs_and_a_run_between_processes(
    spec: TrainSpec, tokens: int, runs: int, share: int, processes: int
) -> None:
    own = of_step(spec, tokens // LENGTH)
    machine = Recorded()
    done = list(machine.train([(own, {})] * runs, share, lambda _: None))
    assert len(machine.members) == runs * processes
    if processes > 1:
        assert done == [(i, f"result {i * processes}") for i in range(runs)]
        assert [m[:3] for m in machine.members[:processes]] == [
            (IN_GROUP, rank, processes) for rank in range(processes)
        ]
        assert len({m[3] for m in machine.members}) == runs  # a meeting each
        assert all(m[4:] == (TRAIN, own, 1, {}) for m in machine.members)
    else:
        assert machine.members == [(TRAIN, own, 1, {})] * runs


def test_where_memory_or_sequences_are_too_few_for_processes_they_have_threads(
    spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Recorded()
    monkeypatch.setattr(module, "step_tokens", lambda _: 4_096)
    list(machine.train([(of_step(spec, 2), {})], 1, lambda _: None))
    assert [(m[2], m[6]) for m in machine.members] == [(2, 4)] * 2
    own = of_step(spec, 4_096 // LENGTH)
    monkeypatch.setattr(module, "memory", lambda: 2 * 3 * PARAMETERS_OF_ALL * BYTES_PER_PARAMETER)
    list(machine.train([(own, {})], 1, lambda _: None))
    assert [(m[2], m[6]) for m in machine.members] == [(3, 2)] * 3
    monkeypatch.setattr(module, "memory", lambda: PARAMETERS_OF_ALL)
    list(machine.train([(own, {})], 1, lambda _: None))
    assert machine.members == [(TRAIN, own, 8, {})]


def test_what_chooses_online_is_one_process_and_on_a_gpu_all_are(spec: TrainSpec) -> None:
    online = replace(spec, online=Online(Path("conditional.npy"), 2.0))
    machine = Recorded()
    list(machine.train([(online, {})], 1, lambda _: None))
    assert machine.members == [(TRAIN, online, 8, {})]
    machine = Recorded("cuda")
    list(machine.train([(spec, {})], 1, lambda _: None))
    assert machine.members == [(TRAIN, spec, 1, {})]
