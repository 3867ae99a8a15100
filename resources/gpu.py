"""The one way from an asset to torch, on whatever devices there are.

Its verbs hold alike locally and on a cluster. Locally the work is done in worker processes, one per
CUDA device, or one per CPU core: a core each does more than all cores at one small matrix, and does
not stand still when another program takes one of them. Every kernel run leaves lines in
`kernel_runs.jsonl` of the home, with the folder of the artefact that it was for.
"""

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import PrivateAttr

from colorfilter import provenance
from colorfilter.files import append_line, require_space
from colorfilter.progress import Progress, silent
from colorfilter.workers import Workers, cores
from resources.home import Home

if TYPE_CHECKING:
    import numpy as np

    from colorfilter.scoring import Losses, Receipt
    from colorfilter.training import Checkpoint, TrainSpec


# Of a sequence's loss in a Parquet chunk, at most.
BYTES_PER_LOSS = 16


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

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Records of the kernel's runs name the run of Dagster that they belong to."""
        if context.run:
            self._run_id = context.run.run_id

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
        unscored = sum((stop - start) * len(models) for models, _, _, start, stop, *_ in calls)
        require_space(Home(self.home).root, BYTES_PER_LOSS * unscored, "scoring")
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
            self._record("train", specs[i].out, tokens, seconds, {"seed": specs[i].seed})
            yield i, checkpoints

    def evaluate(self, checkpoints: Sequence[Path], tokens: Path, folder: Path) -> list["Losses"]:
        """Losses of packed tokens by each checkpoint, for the artefact that is made in `folder`.

        Each is float32 [n] nats per token, int32 [n] number of labels; computed in float32.
        """
        from colorfilter import device

        calls = [(checkpoint, tokens) for checkpoint in checkpoints]
        losses: list[Losses] = self._evaluated("evaluate", folder, device.evaluate, calls)
        return losses

    def evaluate_tasks(
        self,
        checkpoints: Sequence[Path],
        items: Path,
        folder: Path,
        progress: Progress = silent,
    ) -> list[dict[str, float]]:
        """Metrics of the tasks whose test items lie in `items`, by each checkpoint.

        As harness.evaluate gives them; `folder` as in evaluate, `progress` is called with the
        number of choices done.
        """
        from colorfilter import device

        calls = [(checkpoint, items) for checkpoint in checkpoints]
        metrics: list[dict[str, float]] = self._evaluated(
            "evaluate_tasks", folder, device.evaluate_tasks, calls, progress
        )
        return metrics

    def token_losses(
        self,
        checkpoints: Sequence[Path],
        tokens: "np.ndarray",
        folder: Path,
        boundary: int | None = None,
    ) -> list["np.ndarray"]:
        """Losses of every token of a few sequences [N, T] by each checkpoint.

        Each is float32 [N, T], as of colorfilter.token_losses; computed in float32. `folder` as in
        evaluate.
        """
        from colorfilter import device

        calls = [(checkpoint, tokens, boundary) for checkpoint in checkpoints]
        losses: list[np.ndarray] = self._evaluated(
            "token_losses", folder, device.losses_by_token, calls
        )
        return losses

    def _evaluated(
        self,
        verb: str,
        folder: Path,
        work: Callable[..., Any],
        calls: Sequence[tuple[Any, ...]],
        progress: Progress = silent,
    ) -> list[Any]:
        """What `work(checkpoint, ...)` gives of each call, in their order."""
        results: dict[int, Any] = {}
        for i, (found, tokens, seconds) in _workers().run(work, calls, progress):
            checkpoint = calls[i][0].relative_to(Home(self.home).root)
            self._record(verb, folder, tokens, seconds, {"model": str(checkpoint)})
            results[i] = found
        return [results[i] for i in range(len(calls))]

    def _record_chunk(self, job: ScoreJob, receipt: "Receipt") -> None:
        facts = {
            "model": receipt.model,
            "shard": job.shard,
            "chunk": receipt.file,
            "sequences": receipt.sequences,
            "precision": receipt.precision,
            "kernel": receipt.kernel,
            "matrix_share": receipt.matrix_share,
        }
        folder = job.outs[receipt.model]
        self._record("score", folder, receipt.tokens, receipt.seconds, facts)

    def _record(
        self, verb: str, folder: Path, tokens: int, seconds: float, facts: Mapping[str, Any]
    ) -> None:
        from colorfilter import device

        home = Home(self.home)
        line = {
            "run_id": self._run_id,
            "verb": verb,
            "folder": str(folder.relative_to(home.root)),
            "model": None,
            "shard": None,
            "chunk": None,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "device": device.kind(),
            "precision": "float32",
            "kernel": None,
            "matrix_share": None,
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": provenance.environment(),
            **facts,
        }
        append_line(home.kernel_runs, json.dumps(line, ensure_ascii=False, default=str))


def release() -> None:
    """End the workers of this process, for one that ends without its interpreter's teardown."""
    while _standing:
        with _standing.pop():
            pass


_standing: list[Workers] = []


def _workers() -> Workers:
    """The workers of this process, kept from call to call: to load torch takes seconds."""
    import torch

    from colorfilter import device

    if not _standing or _standing[-1].broken:
        counts = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": cores()}
        _standing[:] = [Workers(counts[device.kind()])]
    return _standing[-1]
