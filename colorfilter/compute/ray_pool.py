"""Heavy work on a Ray cluster: one worker per device; calls of lost workers are repeated.

Ray places and starts the workers and reports lost ones. This module tracks the calls, so that each
result counts once. A worker has one call at a time, so no queue builds up on it. Workers exit when
all calls are finished, or when the process that started them exits or is killed.
"""

import contextlib
import logging
import os
import signal
import socket
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Ray reads this on import. Without it, a call after the connection has closed starts a cluster.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

import ray
from ray.exceptions import AuthenticationError, RayError, RayTaskError

from colorfilter import WAIT_ASLEEP
from colorfilter.compute import local_pool
from colorfilter.errors import InputError, UnreachableError, one_line
from colorfilter.progress import Progress, silent
from colorfilter.storage.scratch import sweep

POLL_SECONDS = 0.5
REACH_SECONDS = 10.0
HIRE_SECONDS = 5.0  # between two checks of the cluster's devices
WAIT_SECONDS = 30.0  # without any worker before a notice
LOSSES = 4  # lost workers of one call before the call is considered the cause
STRAGGLES = 3.0  # multiple of the median duration after which a call is started a second time
STRAGGLE_SECONDS = 30.0  # minimum duration before a call is started a second time
STORE_BYTES = 100 * 2**20  # Ray's object store of a local cluster

Notice = Callable[[str], None]


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to the cluster at an address or at RAY_ADDRESS; without either, start one here.

    Raises UnreachableError if there is no cluster at the address.
    """
    named = address or os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {"num_cpus": local_pool.cores(), "object_store_memory": STORE_BYTES}
    # Ship this code to the nodes, which then need the libraries only.
    variables = {name: os.environ[name] for name in WAIT_ASLEEP if name in os.environ}
    environment = {"py_modules": [str(Path(__file__).parents[1])], "env_vars": variables}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if named:
        _reach(named)
    handlers = _handlers()
    try:
        ray.init(
            named or "local",  # a local cluster accepts jobs with this user's token only
            runtime_env=environment,
            logging_level=logging.ERROR,
            log_to_driver=False,
            include_dashboard=None if named else False,
            **({} if named else local),
        )
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        where = named or "this machine"
        if _wants_token(error):
            raise UnreachableError(
                f"compute.address: the Ray cluster at {where} requires its token; set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that contains it"
            ) from error
        raise UnreachableError(
            f"compute.address: no Ray cluster at {where} ({one_line(error)}); correct it or start "
            "one"
        ) from error
    finally:
        _restore(handlers)
    try:
        yield
    finally:
        ray.shutdown()


def _wants_token(error: BaseException | None) -> bool:
    while error:
        # Ray wraps the original error; its name may appear in the message only.
        if AuthenticationError.__name__ in f"{type(error)} {error}":
            return True
        error = error.__cause__ or error.__context__
    return False


def _reach(address: str) -> None:
    """Raise UnreachableError if nothing listens at an address; Ray itself retries for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isdigit()):  # for example auto
        return
    try:
        socket.create_connection((host, int(port)), REACH_SECONDS).close()
    except OSError as error:
        raise UnreachableError(
            f"compute.address: no Ray cluster at {address} ({error}); correct it or start one"
        ) from error


def is_connected() -> bool:
    """Return whether this process is connected to a cluster."""
    return bool(ray.is_initialized())


def _handlers() -> dict[int, Any]:
    """Return the current handlers of SIGTERM and SIGINT: Ray replaces those that Dagster set."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


class _Worker:
    """An actor: one process on one device."""

    def __init__(self) -> None:
        self.index = 0
        found = ray.get_runtime_context()
        self.node = f"{ray.util.get_node_ip_address()}/{found.get_node_id()[:8]}"
        self._counted: tuple[int | None, int] = None, 0
        sweep()
        local_pool.become(self)

    def where(self) -> str:
        return self.node

    def report(self, amount: int) -> None:
        call, counted = self._counted
        self._counted = call, counted + amount

    def counted(self) -> tuple[int | None, int]:
        return self._counted

    def do(
        self, call: int, function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> tuple[Any, int]:
        self._counted = call, 0
        return function(*arguments), self._counted[1]


_Actor: Any = ray.remote(_Worker)
AT_ONCE = 2  # concurrent methods of an actor: the work, and queries of its progress


@dataclass
class _Member:
    """A worker as the driver sees it: its current call and the progress reported for the call.

    A worker that is `left_out` gets no more calls but keeps its device, so that no other worker
    starts there.
    """

    actor: Any
    ready: Any
    node: str | None = None
    call: int | None = None
    work: Any = None
    begun: float = 0.0
    reported: int = 0
    watch: Any = None
    left_out: bool = False


@dataclass
class Cluster:
    """The devices of a Ray cluster that this process is connected to.

    `most`: maximum workers to request, even beyond current capacity (for autoscaling); by default
    one per available device. `begin_twice`: whether an idle worker starts a call a second time if
    the call takes several times as long as the others did; the first result counts. `together`:
    number of devices per call, as the processes of one group. `notice` receives messages about
    lost workers and repeated calls.
    """

    most: int | None = None
    begin_twice: bool = False
    together: int = 1
    notice: Notice = field(default=lambda _: None)

    @property
    def kind(self) -> str:
        """The kind of device: cuda if the cluster has GPUs, else cpu."""
        return "cuda" if self.resource == "GPU" else "cpu"

    @property
    def resource(self) -> str:
        """Ray's name of the kind of device: GPU or CPU."""
        return "GPU" if ray.cluster_resources().get("GPU") else "CPU"

    def run(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        progress: Progress = silent,
    ) -> Iterator[tuple[int, Any]]:
        """Call `function(*arguments[i])` for all i; yield (i, result) as each call finishes.

        Like local_pool.Workers.run. A call whose worker is lost is repeated on another worker. A
        call that fails is repeated once, and the device that it failed on gets no more calls. If it
        fails again, its exception is raised. Raises RuntimeError if a call loses LOSSES workers.
        """
        if not arguments:
            return
        if self.together > 1:
            from colorfilter.compute import ray_train  # slow: Ray Train loads torch

            groups = self._groups()
            yield from ray_train.run(
                function, arguments, groups, self.together, self.resource, progress, self.notice
            )
        else:
            yield from _Run(self, function, arguments, progress).results()

    def _groups(self) -> int:
        """Return how many groups fit on the devices."""
        available = self.most or int(ray.cluster_resources().get(self.resource, 0))
        if available < self.together:
            raise UnreachableError(
                f"compute.devices_per_model: {self.together} are requested, but only {available} "
                "are available; lower it, or add devices to the cluster"
            )
        return available // self.together


class _Run:
    def __init__(
        self,
        cluster: Cluster,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        progress: Progress,
    ) -> None:
        self.cluster = cluster
        self.function = ray.put(function)
        self.arguments = arguments
        self.progress = progress
        self.waiting = deque(range(len(arguments)))
        self.done: set[int] = set()
        self.pool: list[_Member] = []
        self.lost: Counter[int] = Counter()
        self.failed: set[int] = set()
        self.failures = 0  # consecutive workers that failed to start
        self.seconds: list[float] = []
        self.looked = -HIRE_SECONDS
        self.waited = time.monotonic()
        self.resource = cluster.resource

    def results(self) -> Iterator[tuple[int, Any]]:
        try:
            while len(self.done) < len(self.arguments):
                self._scale_up()
                self._hand_out()
                yield from self._collect()
                self._watch()
        finally:
            for member in self.pool:
                ray.kill(member.actor)

    def _scale_up(self) -> None:
        """Request workers, up to the number of devices and of unfinished calls."""
        if time.monotonic() - self.looked < HIRE_SECONDS:
            return
        self.looked = time.monotonic()
        available = self._devices()
        left_out = sum(member.left_out for member in self.pool)
        wanted = self.cluster.most or available - left_out
        wanted = min(wanted, len(self.arguments) - len(self.done)) + left_out
        on_gpu = self.resource == "GPU"
        device = {"num_gpus": 1, "num_cpus": 0} if on_gpu else {"num_cpus": 1}
        for _ in range(wanted - len(self.pool)):
            actor = _Actor.options(max_concurrency=AT_ONCE, **device).remote()
            self.pool.append(_Member(actor, actor.where.remote()))
        if any(member.node for member in self.pool):
            self.waited = time.monotonic()
        elif time.monotonic() - self.waited > WAIT_SECONDS:
            self.waited = time.monotonic()
            self.cluster.notice(
                f"still waiting for one of the cluster's {available} {self.resource}s"
            )

    def _devices(self) -> int:
        return int(ray.cluster_resources().get(self.resource, 0))

    def _hand_out(self) -> None:
        """Give every idle worker a call."""
        for member in self.pool:
            if member.node and member.call is None and not member.left_out:
                call = self.waiting.popleft() if self.waiting else self._straggling()
                if call is None:
                    return
                arguments = self.arguments[call]
                member.call, member.begun, member.reported = call, time.monotonic(), 0
                member.work = member.actor.do.remote(call, self.function, arguments)

    def _straggling(self) -> int | None:
        """Return a running call that takes far longer than the others and was started only once."""
        if not self.seconds or not self.cluster.begin_twice:
            return None
        limit = max(STRAGGLE_SECONDS, STRAGGLES * statistics.median(self.seconds))
        at_work = Counter(m.call for m in self.pool if m.call is not None)
        for member in sorted(self.pool, key=lambda m: m.begun):
            taken = time.monotonic() - member.begun
            call = member.call
            if call is None or call in self.done or at_work[call] > 1:
                continue
            if taken > limit:
                self._say(
                    call, f"running for {taken:.0f} s on {member.node}; also started elsewhere"
                )
                return call
        return None

    def _collect(self) -> Iterator[tuple[int, Any]]:
        """Handle running calls and starting workers that finished or failed; yield results."""
        refs = {m.work: m for m in self.pool if m.call is not None}
        refs |= {m.ready: m for m in self.pool if m.node is None}
        if not refs:
            time.sleep(POLL_SECONDS)
            return
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(refs), num_returns=1, timeout=POLL_SECONDS)
        for ref in ready:
            member = refs[ref]
            try:
                found = ray.get(ref)
            except RayTaskError as error:
                self._leave_out(member, error)
                continue
            except RayError as error:  # the worker, its node or its result is lost
                self._on_lost(member, error)
                continue
            if member.node is None:
                self._welcome(member, found)
            else:
                yield from self._finish(member, *found)

    def _welcome(self, member: _Member, node: str) -> None:
        member.node = node
        self.failures = 0

    def _finish(self, member: _Member, result: Any, counted: int) -> Iterator[tuple[int, Any]]:
        call, member.call = member.call, None
        assert call is not None
        if call in self.done:  # the same call has finished on another worker
            self.progress(-member.reported)
            return
        self.progress(counted - member.reported)
        self.done.add(call)
        self.seconds.append(time.monotonic() - member.begun)
        yield call, result

    def _leave_out(self, member: _Member, error: RayTaskError) -> None:
        """Handle a failed call: repeat it on another device to see whether the device is at fault.

        The device gets no more calls. Raises the exception of a call that has failed before.
        """
        call, member.call, member.left_out = member.call, None, True
        if call is None:  # the worker could not start
            raise error
        self.progress(-member.reported)
        what = f"failed on {member.node} ({one_line(error.cause)}), which gets no more calls"
        if call in self.done:  # the same call has finished on another worker
            self._say(call, what)
            return
        if call in self.failed or self._devices() <= sum(m.left_out for m in self.pool):
            raise error.cause from (None if isinstance(error.cause, InputError) else error)
        self.failed.add(call)
        self.looked = -HIRE_SECONDS
        if all(m.call != call for m in self.pool):
            self.waiting.appendleft(call)
        self._say(call, f"{what}; retrying elsewhere")

    def _on_lost(self, member: _Member, error: RayError) -> None:
        """Handle a lost worker: queue its call again."""
        self.pool.remove(member)
        ray.kill(member.actor)
        if member.node is None:
            self.failures += 1
            if self.failures >= LOSSES and not any(m.node for m in self.pool):
                raise RuntimeError(f"no worker can start on the cluster: {one_line(error)}")
            self.cluster.notice(f"a worker did not start: {one_line(error)}")
            return
        self.looked = -HIRE_SECONDS
        call = member.call
        if call is None or call in self.done:
            return
        self.progress(-member.reported)
        self.lost[call] += 1
        if self.lost[call] >= LOSSES:
            raise RuntimeError(
                f"{self.arguments[call][0]}: its worker was lost {LOSSES} times, perhaps because "
                "memory ran out; run again to resume"
            )
        if all(m.call != call for m in self.pool):
            self.waiting.appendleft(call)
            self._say(call, f"lost with its worker on {member.node}; retrying")

    def _say(self, call: int, what: str) -> None:
        self.cluster.notice(f"{self.arguments[call][0]}: {what}")

    def _watch(self) -> None:
        """Report the progress of running calls, and detect lost workers that have no call."""
        for member in list(self.pool):
            if member.node is None:
                continue
            if member.watch is None:
                member.watch = member.actor.counted.remote()
            elif ray.wait([member.watch], timeout=0)[0]:
                answer, member.watch = member.watch, None
                try:
                    call, counted = ray.get(answer)
                except RayError as error:
                    if member.call is None:
                        self._on_lost(member, error)
                    continue  # a lost worker with a call is found by _collect
                if member.call is not None and call == member.call and counted > member.reported:
                    self.progress(counted - member.reported)
                    member.reported = counted
