"""The one way from an asset to torch: three verbs on whatever devices there are.

`score`, `train` and `evaluate` hold alike locally and on a cluster. Locally the work is done in
worker processes, one per CUDA device, or one per CPU core: a core each does more than all cores at
one small matrix, and does not stand still when another program takes one of them. Every kernel
run leaves lines in `kernel_runs.jsonl` of the home.
"""

import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import PrivateAttr

from colorfilter import provenance
from colorfilter.progress import Progress, silent
from colorfilter.workers import Workers
from resources.artifacts import append_line
from resources.home import Home

if TYPE_CHECKING:
    from colorfilter.device import Losses
    from colorfilter.scoring import Receipt
    from colorfilter.training import Checkpoint, TrainSpec


@dataclass(frozen=True)
class ScoreJob:
    """A shard to score: its packed tokens, by models (fingerprint -> checkpoint), into `out`.

    `parameters` of the models decide the size of a chunk; `boundary` as in labels.shifted_labels.
    """

    models: Mapping[str, Path]
    parameters: int
    tokens: Path
    shard: str
    out: Path
    boundary: int | None = None


class Gpu(dg.ConfigurableResource):
    """The devices that run the loss kernel: CUDA, else MPS, else CPU."""

    home: str
    precision: str = "float32"

    _run_id: str = PrivateAttr(default_factory=lambda: uuid.uuid4().hex)

    def score(
        self, jobs: Sequence[ScoreJob], progress: Progress = silent
    ) -> Iterator[tuple[ScoreJob, list["Receipt"]]]:
        """Score shards chunk by chunk; gives each shard with its receipts once all stand."""
        from colorfilter import device
        from colorfilter.scoring import chunk_sequences, plan_chunks
        from colorfilter.tokens import open_tokens

        receipts: list[list[Receipt]] = []
        missing: list[tuple[int, tuple[int, int]]] = []
        for i, job in enumerate(jobs):
            length = int(open_tokens(job.tokens).shape[1])
            chunk = chunk_sequences(job.parameters, length, device.kind())
            standing, ranges = plan_chunks(job.tokens, job.out, chunk)
            progress(len(job.models) * sum(r.tokens for r in standing))
            receipts.append(standing)
            missing += [(i, r) for r in ranges]
        left = Counter(i for i, _ in missing)
        yield from ((job, receipts[i]) for i, job in enumerate(jobs) if not left[i])
        calls = [
            (job.models, job.tokens, job.shard, *r, job.out, self.precision, job.boundary)
            for job, r in ((jobs[i], r) for i, r in missing)
        ]
        for task, receipt in _workers().run(device.score, calls, progress):
            i = missing[task][0]
            receipts[i].append(receipt)
            self._record_chunk(jobs[i], receipt)
            left[i] -= 1
            if not left[i]:
                yield jobs[i], sorted(receipts[i], key=lambda r: r.start)

    def train(
        self, specs: Sequence["TrainSpec"], share: int = 1, progress: Progress = silent
    ) -> Iterator[tuple[int, list["Checkpoint"]]]:
        """Train as the specs say; gives (index, a checkpoint per end point) as each is done.

        `share` is the number of runs between which the CPU's cores are divided. It is that of all
        that belong together and not of those still missing, for the last bits depend on it.
        """
        from colorfilter import device

        threads = max(1, (os.cpu_count() or 1) // share)
        calls = [(spec, threads) for spec in specs]
        for i, (checkpoints, tokens, seconds) in _workers().run(device.train, calls, progress):
            facts = {"precision": "float32", "seed": specs[i].seed}
            self._record("train", str(specs[i].out), tokens, seconds, facts)
            yield i, checkpoints

    def evaluate(self, checkpoints: Sequence[Path], tokens: Path) -> list["Losses"]:
        """Losses of packed tokens by each checkpoint.

        Each is float32 [n] nats per token, int32 [n] number of labels.
        """
        from colorfilter import device

        calls = [(checkpoint, tokens, self.precision) for checkpoint in checkpoints]
        done = dict(_workers().run(device.evaluate, calls))
        return [done[i] for i in range(len(checkpoints))]

    def _record_chunk(self, job: ScoreJob, receipt: "Receipt") -> None:
        facts = {
            "shard": job.shard,
            "chunk": receipt.file,
            "sequences": receipt.sequences,
            "precision": self.precision,
            "kernel": receipt.kernel,
        }
        self._record("score", ",".join(job.models), receipt.tokens, receipt.seconds, facts)

    def _record(
        self, verb: str, model: str, tokens: int, seconds: float, facts: Mapping[str, Any]
    ) -> None:
        from colorfilter import device

        line = {
            "run_id": self._run_id,
            "verb": verb,
            "model": model,
            "shard": None,
            "chunk": None,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "device": device.kind(),
            "kernel": None,
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": provenance.environment(),
            **facts,
        }
        append_line(Home(self.home).kernel_runs, line)


_standing: list[Workers] = []


def _workers() -> Workers:
    """The workers of this process, kept from call to call: to load torch takes seconds."""
    import torch

    from colorfilter import device

    if not _standing or _standing[-1].broken:
        counts = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": os.cpu_count() or 1}
        _standing[:] = [Workers(counts[device.kind()])]
    return _standing[-1]
