"""The devices of this machine, and how trainings are divided among them."""

import operator
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from colorfilter.compute.local_pool import Call, Workers, cores, memory
from colorfilter.progress import Progress
from colorfilter.training.spec import TrainSpec, step_tokens

# Named and not imported: what they import takes seconds, and this process does not need it.
TRAIN = Call("colorfilter.compute.worker_calls:train")
PARAMETERS = Call("colorfilter.compute.worker_calls:parameters")
IN_GROUP = Call("colorfilter.training.process_group:call_in_group")
# Of fewer tokens in a step a process, or a thread, waits for the others more than it works.
TOKENS_PER_CORE = 512
# A parameter's weight, gradient and two moments in float32, and as much again for a step's work.
BYTES_PER_PARAMETER = 32


class Machine(Workers):
    """The devices of this machine: a worker on each, kept from call to call."""

    def __init__(self, kind: str, devices: int) -> None:
        super().__init__(devices)
        self.kind = kind

    def train(
        self, calls: Sequence[tuple[Any, ...]], share: int, progress: Progress
    ) -> Iterator[tuple[int, Any]]:
        """Call device.train for all (spec, places); give (i, result) as each is done.

        On a CPU each of `share` runs has its part of the cores: a process on each, which train the
        model together, as far as memory goes, and else threads. A run that chooses online is one
        process.
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
        """How many processes each run has, and how many threads each of them."""
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
