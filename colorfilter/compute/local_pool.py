"""Local worker processes that report progress and exit when their parent exits."""

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
# Maximum length in bytes of a socket path on Linux, and what multiprocessing appends to the path of
# the temporary folder.
SOCKET_PATH, ADDED_TO_PATH = 107, 32
# Loaded once by the server that workers are forked from. Must not start threads, as polars and
# pyarrow do: a fork could inherit a lock that such a thread holds.
PRELOADED = ["colorfilter", "torch", "transformers.modeling_utils"]


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int:
    """Return the memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class StoppedError(Exception):
    """The process that requested the work has cancelled it."""


def process_context() -> BaseContext:
    """Return the start method of worker processes: on Linux, forks of a server with torch loaded.

    Loading torch and transformers takes 4 to 12 s per process. The server itself is a fresh
    process, so its forks inherit no threads and no CUDA context from this one. On other platforms,
    or if the path of the temporary folder is too long for the server's socket, every worker is a
    fresh process.
    """
    path = len(os.fsencode(tempfile.gettempdir())) + ADDED_TO_PATH
    if sys.platform != "linux" or path > SOCKET_PATH:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@dataclass(frozen=True)
class Call:
    """A function given by name, `module:function`; only the worker imports its module."""

    name: str

    def __call__(self, *arguments: Any) -> Any:
        return pkgutil.resolve_name(self.name)(*arguments)


class Timing(NamedTuple):
    """Cost of a piece of work: tokens, seconds, kind of device, machine."""

    tokens: int
    seconds: float
    device: str
    node: str


class Workers:
    """A pool of processes, started when first needed and kept until closed.

    Workers get the environment variables that this process has when it creates the pool.
    """

    def __init__(self, count: int) -> None:
        context = process_context()
        self._done: Synchronized[int] = context.Value("q", 0)
        self._stop = context.Event()
        begun = context.Value("q", 0)
        arguments = self._done, self._stop, begun, dict(os.environ)
        self._pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=arguments)
        self.broken = False
        # A process started by multiprocessing joins its children at exit before the pool stops
        # them, and would block. This finalizer runs earlier, also before the queues close (10).
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
        """Call `function(*arguments[i])` for all i; yield (i, result) as each call finishes.

        Amounts that the function passes to `report` reach `progress` here. An exception of a call
        is raised here (LeftAloneError only after all other calls). After an exception, or when the
        caller stops iterating, the remaining calls are stopped and awaited. Raises RuntimeError if
        a process was killed or none could be started.
        """
        reported = self._done.value
        try:
            pending = {self._submitted(function, *a): i for i, a in enumerate(arguments)}
            yield from self._collect(pending, reported, progress)
        except BrokenProcessPool as error:
            self.broken = True
            raise RuntimeError(
                "a worker process was killed, perhaps because memory ran out; run again to resume"
            ) from error

    def _submitted(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        try:
            return self._pool.submit(function, *arguments)
        except (EOFError, ConnectionError) as error:  # raised if the fork server has exited
            self.broken = True
            raise RuntimeError(
                f"no worker process could be started: loading {' or '.join(PRELOADED)} failed "
                "with the error above"
            ) from error

    def _collect(
        self, pending: dict[Future[Any], int], reported: int, progress: Progress
    ) -> Iterator[tuple[int, Any]]:
        alone: LeftAloneError | None = None
        try:
            while pending:
                finished, _ = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                done = self._done.value  # read once, since workers increment it
                if done > reported:
                    progress(done - reported)
                    reported = done
                for future in finished:
                    number = pending.pop(future)
                    try:
                        result = future.result()
                    except LeftAloneError as error:
                        alone = error  # the other process raises the actual cause
                    else:
                        yield number, result
            if alone:
                raise alone
        finally:
            if pending:
                self._stop.set()
                # Skip cancelled calls: a broken pool never marks them as finished.
                wait([future for future in pending if not future.cancel()])
                self._stop.clear()


class Inside(Protocol):
    """The context of a worker: its index on its machine, the machine, and a progress receiver."""

    index: int
    node: str

    def report(self, amount: int) -> None: ...


@dataclass
class _Inside:
    """The context of a worker of a local pool."""

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
    """Report the amount of work just done; has no effect outside a worker.

    Raises StoppedError if the work was cancelled.
    """
    for inside in _inside:
        inside.report(amount)


def index() -> int:
    """Return the index of this worker on its machine, from 0. Call in a worker only."""
    return _inside[0].index


def node() -> str:
    """Return the machine that this process or worker runs on."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets the signal too and decides
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Exit this worker when its parent process is gone, even if the parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
