"""Processes that train one model together, each on its share of every batch.

On a CPU they replace OpenMP's threads, which wait for each other in every small product: if
anything else uses the cores, two threads are slower than one.
"""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from colorfilter.compute import local_pool
from colorfilter.errors import LeftAloneError

# The others wait while the first process saves a state. A process that dies is noticed at once.
LONGEST_WAIT = timedelta(days=1)
POLL_SECONDS = 0.01


class Single:
    """A process that trains alone."""

    rank = 0
    size = 1

    def share(self, n: int) -> tuple[torch.Tensor, int]:
        """Return this process's rows of a batch of n, and the number of rows per process."""
        mine = torch.arange(self.rank, n, self.size)
        return mine, -(-n // self.size)

    def averaging(self, module: torch.nn.Module) -> Callable[..., Any]:
        """Return the module, wrapped to average gradients over the processes."""
        return module

    def not_yet(self, module: Callable[..., Any]) -> AbstractContextManager[None]:  # noqa: ARG002
        """Return a context in which gradients are accumulated only in this process."""
        return contextlib.nullcontext()

    def total(self, numbers: np.ndarray, device: torch.device) -> np.ndarray:  # noqa: ARG002
        """Return the sum of numbers (float64) over the processes, exchanged by way of `device`."""
        return numbers

    def said_by_first(self, value: Any) -> Any:
        """Return the value that the first process passed."""
        return value

    def copied_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors with those of the first process."""


class Group(Single):
    """The processes of torch's default process group. Data parallel: arXiv 2006.15704."""

    def __init__(self) -> None:
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()

    def averaging(self, module: torch.nn.Module) -> Callable[..., Any]:
        with warnings.catch_warnings():  # the suggested successor still copies buffers once
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(module, broadcast_buffers=False)

    def not_yet(self, module: Callable[..., Any]) -> AbstractContextManager[None]:
        assert isinstance(module, DistributedDataParallel)
        pause: AbstractContextManager[None] = module.no_sync()
        return pause

    def total(self, numbers: np.ndarray, device: torch.device) -> np.ndarray:
        summed = torch.tensor(numbers, dtype=torch.float64, device=device)
        distributed.all_reduce(summed)
        return summed.cpu().numpy()

    def said_by_first(self, value: Any) -> Any:
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def copied_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def call_in_group(
    rank: int, size: int, meeting: Path, function: Callable[..., Any], *arguments: Any
) -> Any:
    """Call a function as process `rank` of a group of `size` on this machine.

    The processes connect through the file `meeting`, which must not exist before. Raises what the
    function raises, LeftAloneError if another process of the group has died, and
    local_pool.StoppedError if the call is cancelled before all processes have started.
    """
    _wait_for_all(rank, size, meeting)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    store = distributed.FileStore(str(meeting), size)  # type: ignore[attr-defined]
    try:
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT
        )
        distributed.barrier()  # none may finish before all have joined
        return function(*arguments)
    except RuntimeError as error:
        if "gloo" in str(error):  # torch has no exception type for it
            raise LeftAloneError("another process of this training has exited") from error
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _wait_for_all(rank: int, size: int, meeting: Path) -> None:
    """Wait until all processes have started. Unlike torch's own wait, this can be cancelled."""
    started = [meeting.with_name(f"{meeting.name}-{n}") for n in range(size)]
    started[rank].touch()
    while not all(path.exists() for path in started):
        local_pool.report(0)
        time.sleep(POLL_SECONDS)
