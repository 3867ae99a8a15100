"""Processes that do heavy work for this one, with its progress, and end when it ends."""

import multiprocessing
import os
import pkgutil
import platform
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, Protocol

from colorfilter.errors import LeftAloneError
from colorfilter.progress import Progress, silent

POLL_SECONDS = 0.2
# Bytes of a path to a socket on Linux, and of what multiprocessing adds to the temporary folder's.
SOCKET_PATH, ADDED_TO_PATH = 107, 32
# Loaded once, by the server that workers are forked from. Only what starts no threads of its own:
# polars and pyarrow do, and a fork may inherit a lock that such a thread holds.
PRELOADED = ["colorfilter", "torch", "transformers.modeling_utils"]


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class StoppedError(Exception):
    """The work was called off by the process that wanted it."""


def process_context() -> BaseContext:
    """How worker processes start: on Linux as forks of a server that has loaded torch.

    Loading torch and transformers takes a process 4 to 12 s. The server is itself a fresh process,
    so a fork of it has no thread and no CUDA context of this one. Elsewhere, and where the path of
    the temporary folder is too long for the server's socket, every worker is a fresh process.
    """
    path = len(os.fsencode(tempfile.gettempdir())) + ADDED_TO_PATH
    if sys.platform != "linux" or path > SOCKET_PATH:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@dataclass(frozen=True)
class Call:
    """A function by its name, `module:function`, whose module only the worker imports."""

    name: str

    def __call__(self, *arguments: Any) -> Any:
        return pkgutil.resolve_name(self.name)(*arguments)


class Timing(NamedTuple):
    """What a piece of work took: tokens, seconds, on which kind of device, on which machine."""

    tokens: int
    seconds: float
    device: str
    node: str


class Workers:
    """Some processes, started when first needed and kept until closed.

    A worker has the environment variables that this process had when it made the pool.
    """

    def __init__(self, count: int) -> None:
        context = process_context()
        self._done: Synchronized[int] = context.Value("q", 0)
        self._stop = context.Event()
        begun = context.Value("q", 0)
        arguments = self._done, self._stop, begun, dict(os.environ)
        self._pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=arguments)
        self.broken = False
        # A process that multiprocessing started waits for its own children before it lets the
        # pool end them. This comes before that, and before the queues close (10).
        Finalize(self, self._pool.shutdown, exitpriority=100)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        progress: Progress = silent,
    ) -> Iterator[tuple[int, Any]]:
        """Call `function(*arguments[i])` for all i; give (i, result) as each is done.

        What the function passes to `report` comes to `progress` here. Raises what a call raises
        (LeftAloneError only after all others); then, or where the caller leaves early, the other
        calls are stopped and waited for. Raises RuntimeError where a process was killed, or none
        could be started.
        """
        reported = self._done.value
        try:
            pending = {self._submitted(function, *a): i for i, a in enumerate(arguments)}
            yield from self._collect(pending, reported, progress)
        except BrokenProcessPool as error:
            self.broken = True
            raise RuntimeError(
                "a worker process was killed, for want of memory perhaps; run again to go on"
            ) from error

    def _submitted(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        try:
            return self._pool.submit(function, *arguments)
        except (EOFError, ConnectionError) as error:  # of the server that workers are forks of
            self.broken = True
            raise RuntimeError(
                f"no worker process could be started: loading {' or '.join(PRELOADED)} failed, "
                "with the error above"
            ) from error

    def _collect(
        self, pending: dict[Future[Any], int], reported: int, progress: Progress
    ) -> Iterator[tuple[int, Any]]:
        alone: LeftAloneError | None = None
        try:
            while pending:
                finished, _ = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                done = self._done.value  # read once: it grows meanwhile
                if done > reported:
                    progress(done - reported)
                    reported = done
                for future in finished:
                    number = pending.pop(future)
                    try:
                        result = future.result()
                    except LeftAloneError as error:
                        alone = error  # what the other process raises says more
                    else:
                        yield number, result
            if alone:
                raise alone
        finally:
            if pending:
                self._stop.set()
                # Not for those that could be cancelled: a pool that breaks never says so of them.
                wait([future for future in pending if not future.cancel()])
                self._stop.clear()


class Inside(Protocol):
    """What a worker knows: which one of its machine's it is, on which, and who listens to it."""

    index: int
    node: str

    def report(self, amount: int) -> None: ...


@dataclass
class _Inside:
    """What a worker knows of its pool."""

    index: int
    done: "Synchronized[int]"
    stop: Event
    node: str = platform.node()

    def report(self, amount: int) -> None:
        if self.stop.is_set():
            raise StoppedError
        with self.done.get_lock():
            self.done.value += amount


_inside: list[Inside] = []


def become(inside: Inside) -> None:
    """Make this process a worker."""
    _inside[:] = [inside]


def report(amount: int) -> None:
    """In a worker: say how much was done just now. Elsewhere nobody listens.

    Raises StoppedError if the work is no longer wanted.
    """
    for inside in _inside:
        inside.report(amount)


def index() -> int:
    """In a worker: which one of its machine's it is, counted from 0."""
    return _inside[0].index


def node() -> str:
    """In a worker: the machine that it is on."""
    return _inside[0].node if _inside else platform.node()


def _begin(
    done: "Synchronized[int]",
    stop: Event,
    begun: "Synchronized[int]",
    environment: Mapping[str, str],
) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    with begun.get_lock():
        become(_Inside(begun.value, done, stop))
        begun.value += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and decides
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End this worker when the process that started it is gone, be it killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
