"""Calls made jointly by several devices of a Ray cluster, with Ray Train and torch.distributed."""

import concurrent.futures
import contextlib
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from colorfilter.compute import local_pool
from colorfilter.errors import InputError, one_line
from colorfilter.progress import Progress

POLL_SECONDS = 1.0
SILENT_SECONDS = 60.0  # without progress before a notice
FAILURES = 3  # failures of a group before it is given up


class _Counter:
    """Collects the progress that the first process of each group reports."""

    def __init__(self) -> None:
        self._counted: Counter[int] = Counter()

    def begin(self, call: int) -> None:
        self._counted[call] = 0

    def add(self, call: int, amount: int) -> None:
        self._counted[call] += amount

    def counted(self) -> int:
        return self._counted.total()


class _Process:
    """A process of a group."""

    def __init__(self, call: int, counter: Any) -> None:
        context = ray.train.get_context()
        self.index = context.get_local_rank()
        self.node = f"{ray.util.get_node_ip_address()}, group of {context.get_world_size()}"
        self._call = call
        self._counter = counter if context.get_world_rank() == 0 else None
        if self._counter:
            self._counter.begin.remote(call)

    def report(self, amount: int) -> None:
        if self._counter:
            self._counter.add.remote(self._call, amount)


def _call(config: dict[str, Any]) -> Any:
    local_pool.become(_Process(config["call"], config["counter"]))
    return config["function"](*config["arguments"])


def run(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    groups: int,
    size: int,
    resource: str,
    progress: Progress,
    notice: Callable[[str], None],
) -> Iterator[tuple[int, Any]]:
    """Call `function(*arguments[i])` for all i, each in a group of `size` processes.

    Yields (i, result of the group's first process) as each call finishes; `groups` calls run at a
    time. `resource` is 'GPU' or 'CPU', one per process. A group that loses a process restarts its
    call. `notice` is called when no group reports progress, because Ray waits for devices silently.
    """
    counters: Any = ray.remote(_Counter)
    counter = counters.options(num_cpus=0).remote()
    reported, heard = 0, time.monotonic()
    waiting = deque(range(len(arguments)))
    at_work: dict[concurrent.futures.Future[Any], int] = {}
    pool = concurrent.futures.ThreadPoolExecutor(groups)
    try:
        while waiting or at_work:
            while waiting and len(at_work) < groups:
                call = waiting.popleft()
                config = {"function": function, "arguments": arguments[call]}
                config |= {"call": call, "counter": counter}
                at_work[pool.submit(_fit, config, size, resource)] = call
            done, _ = concurrent.futures.wait(
                at_work, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED
            )
            with contextlib.suppress(RayError):  # a lost counter costs the progress only
                counted: int = ray.get(counter.counted.remote())
                if counted != reported:
                    progress(counted - reported)
                    reported, heard = counted, time.monotonic()
            if time.monotonic() - heard > SILENT_SECONDS:
                heard = time.monotonic()
                notice(
                    f"no progress for {SILENT_SECONDS:.0f} s: {len(at_work)} groups are starting, "
                    f"or waiting for {size} {resource}s each"
                )
            for future in done:
                yield at_work.pop(future), future.result()
    finally:
        if at_work:  # closing the connection is the only way to stop groups
            ray.shutdown()
        pool.shutdown()


def _fit(config: dict[str, Any], size: int, resource: str) -> Any:
    on_gpu = resource == "GPU"
    with tempfile.TemporaryDirectory(prefix="colorfilter-") as records:
        trainer = TorchTrainer(
            _call,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=size, use_gpu=on_gpu, resources_per_worker={resource: 1}
            ),
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            run_config=RunConfig(
                name=Path(records).name,
                storage_path=records,
                failure_config=FailureConfig(max_failures=FAILURES - 1),
            ),
        )
        try:
            result: Any = trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from error
        return result.return_value


def _cause(error: TrainingFailedError) -> Exception:
    """Return the error of the group's process that failed."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    failures = [getattr(f, "_base_exc", f) for f in failures]
    wrong = next((f for f in failures if isinstance(f, InputError)), None)
    return wrong or RuntimeError(f"a group of processes failed: {one_line(failures[0])}")
