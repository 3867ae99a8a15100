"""The devices of this machine, and how training runs share them."""

import operator
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from colorfilter.compute.local_pool import Call, Workers, cores, memory
from colorfilter.progress import Progress
from colorfilter.training.spec import TrainSpec, step_tokens

# Given by name: importing these modules takes seconds, and only workers need them.
TRAIN = Call("colorfilter.compute.worker_calls:train")
PARAMETERS = Call("colorfilter.compute.worker_calls:parameters")
IN_GROUP = Call("colorfilter.training.process_group:call_in_group")
# With fewer tokens per step, a process or thread waits for the others longer than it works.
TOKENS_PER_CORE = 512
# Weight, gradient and two moments of a parameter in float32, plus the same for working memory.
BYTES_PER_PARAMETER = 32


class Machine(Workers):
    """The devices of this machine, with one worker on each that is kept between calls."""

    def __init__(self, kind: str, devices: int) -> None:
        super().__init__(devices)
        self.kind = kind

    def train(
        self, calls: Sequence[tuple[Any, ...]], share: int, progress: Progress
    ) -> Iterator[tuple[int, Any]]:
        """Call worker_calls.train for all (spec, places); yield (i, result) as each finishes.

        On a CPU, each of `share` concurrent runs gets an equal part of the cores. Its model is
        trained jointly by one process per core or, if memory is short, by fewer processes with
        several threads each. A run that selects online uses one process.
        """
        divided = self._divided([spec for spec, _ in calls], share)
        with tempfile.TemporaryDirectory(prefix="colorfilter-") as meetings:
            members: list[tuple[Any, ...]] = []
            firsts = {}
            for i, ((spec, places), (size, threads)) in enumerate(zip(calls, divided, strict=True)):
                firsts[len(members)] = i
                train = TRAIN, spec, threads, places
                if size == 1:
                    members.append(train)
                else:
                    meeting = Path(meetings, str(i))
                    members += [(IN_GROUP, rank, size, meeting, *train) for rank in range(size)]
            for number, result in self.run(operator.call, members, progress):
                if number in firsts:
                    yield firsts[number], result

    def _divided(self, specs: Sequence[TrainSpec], share: int) -> list[tuple[int, int]]:
        """Return (processes, threads per process) of each run."""
        if self.kind != "cpu":
            return [(1, 1)] * len(specs)
        part = max(1, cores() // share)
        used = [part if s.online else min(part, step_tokens(s) // TOKENS_PER_CORE) for s in specs]
        grouped = [i for i, s in enumerate(specs) if used[i] > 1 and not s.online]
        counted = self.run(operator.call, [(PARAMETERS, specs[i]) for i in grouped])
        parameters = {grouped[number]: n for number, n in counted}
        room = memory() // 2 // share
        divided = []
        for i, spec in enumerate(specs):
            size = 1
            if i in parameters:
                held = room // (parameters[i] * BYTES_PER_PARAMETER)
                size = max(1, min(used[i], spec.training.batch_sequences, held))
            divided.append((size, max(1, used[i] // size)))
        return divided
