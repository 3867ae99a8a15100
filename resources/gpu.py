"""The one way from an asset to torch: four verbs on whatever devices there are.

`score`, `train`, `evaluate` and `token_losses` hold alike locally and on a cluster. Locally the
work is done in worker processes, one per CUDA device, or one per CPU core: a core each does more
than all cores at one small matrix, and does not stand still when another program takes one of
them. Every kernel run leaves lines in `kernel_runs.jsonl` of the home.
"""

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
from colorfilter.workers import Workers, cores
from resources.artifacts import append_line
from resources.home import Home

if TYPE_CHECKING:
    import numpy as np

    from colorfilter.scoring import Losses, Receipt
    from colorfilter.training import Checkpoint, TrainSpec


@dataclass(frozen=True)
class ScoreJob:
    """A folder of packed tokens to score by models: fingerprint -> checkpoint, and -> folder out.

    `parameters` of the models decide the size of a chunk; `boundary` as in labels.shifted_labels.
    """

    models: Mapping[str, Path]
    outs: Mapping[str, Path]
    parameters: int
    tokens: Path
    shard: str
    precision: str
    boundary: int | None = None


class Gpu(dg.ConfigurableResource):
    """The devices that run the loss kernel: CUDA, else MPS, else CPU."""

    home: str

    _run_id: str = PrivateAttr(default_factory=lambda: uuid.uuid4().hex)

    def score(
        self, jobs: Sequence[ScoreJob], progress: Progress = silent
    ) -> Iterator[tuple[ScoreJob, str, list["Receipt"]]]:
        """Score packed tokens chunk by chunk, in one pass by all models that are asked for.

        Gives each job and model with the receipts once all stand; what stood before is not scored
        again.
        """
        from colorfilter import device
        from colorfilter.scoring import chunk_sequences, plan_chunks
        from colorfilter.tokens import open_tokens

        receipts: dict[tuple[int, str], list[Receipt]] = {}
        calls: list[tuple[Any, ...]] = []
        jobs_of_calls: list[int] = []
        left: Counter[tuple[int, str]] = Counter()
        for i, job in enumerate(jobs):
            length = int(open_tokens(job.tokens).shape[1])
            chunk = chunk_sequences(job.parameters, length, device.kind())
            standing, missing = plan_chunks(job.tokens, job.outs, chunk)
            for model, found in standing.items():
                receipts[i, model] = found
                progress(sum(r.tokens for r in found))
            for (start, stop), names in missing.items():
                models = {m: job.models[m] for m in names}
                outs = {m: job.outs[m] for m in names}
                place = (job.tokens, job.shard, start, stop)
                calls.append((models, *place, outs, job.precision, job.boundary))
                jobs_of_calls.append(i)
                left.update((i, m) for m in names)
        for (i, model), found in receipts.items():
            if not left[i, model]:
                yield jobs[i], model, found
        for call, done in _workers().run(device.score, calls, progress):
            i = jobs_of_calls[call]
            for receipt in done:
                whole = i, receipt.model
                self._record_chunk(jobs[i], receipt)
                receipts[whole].append(receipt)
                left[whole] -= 1
                if not left[whole]:
                    yield jobs[i], receipt.model, sorted(receipts[whole], key=lambda r: r.start)

    def train(
        self, specs: Sequence["TrainSpec"], share: int = 1, progress: Progress = silent
    ) -> Iterator[tuple[int, list["Checkpoint"]]]:
        """Train as the specs say; gives (index, a checkpoint per end point) as each is done.

        `share` is the number of runs between which the CPU's cores are divided. It is that of all
        that belong together and not of those still missing, for the last bits depend on it.
        """
        from colorfilter import device

        threads = max(1, cores() // share)
        calls = [(spec, threads) for spec in specs]
        for i, (checkpoints, tokens, seconds) in _workers().run(device.train, calls, progress):
            facts = {"precision": "float32", "seed": specs[i].seed}
            self._record("train", str(specs[i].out), tokens, seconds, facts)
            yield i, checkpoints

    def evaluate(self, checkpoints: Sequence[Path], tokens: Path) -> list["Losses"]:
        """Losses of packed tokens by each checkpoint.

        Each is float32 [n] nats per token, int32 [n] number of labels; computed in float32.
        """
        from colorfilter import device

        calls = [(checkpoint, tokens) for checkpoint in checkpoints]
        done = dict(_workers().run(device.evaluate, calls))
        return [done[i] for i in range(len(checkpoints))]

    def evaluate_tasks(
        self, checkpoints: Sequence[Path], items: Path, progress: Progress = silent
    ) -> list[dict[str, float]]:
        """Metrics of the tasks whose test items lie in a folder, by each checkpoint.

        As harness.evaluate gives them; `progress` is called with the number of choices done.
        """
        from colorfilter import device

        calls = [(checkpoint, items) for checkpoint in checkpoints]
        done = dict(_workers().run(device.evaluate_tasks, calls, progress))
        return [done[i] for i in range(len(checkpoints))]

    def token_losses(
        self, checkpoints: Sequence[Path], tokens: "np.ndarray", boundary: int | None = None
    ) -> list["np.ndarray"]:
        """Losses of every token of a few sequences [N, T] by each checkpoint.

        Each is float32 [N, T], as of colorfilter.token_losses; computed in float32.
        """
        from colorfilter import device

        calls = [(checkpoint, tokens, boundary) for checkpoint in checkpoints]
        done = dict(_workers().run(device.losses_by_token, calls))
        return [done[i] for i in range(len(checkpoints))]

    def _record_chunk(self, job: ScoreJob, receipt: "Receipt") -> None:
        facts = {
            "shard": job.shard,
            "chunk": receipt.file,
            "sequences": receipt.sequences,
            "precision": receipt.precision,
            "kernel": receipt.kernel,
            "matrix_share": receipt.matrix_share,
        }
        self._record("score", receipt.model, receipt.tokens, receipt.seconds, facts)

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
            "matrix_share": None,
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
        counts = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": cores()}
        _standing[:] = [Workers(counts[device.kind()])]
    return _standing[-1]
