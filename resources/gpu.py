"""The resource with which assets run models, locally or on a Ray cluster.

Its methods behave the same on both. Locally, worker processes do the work, one per CUDA device or
one per CPU core. With small matrices, one core per worker is faster than all cores on one matrix,
and the other workers continue when another program uses a core. Every kernel run appends lines to
`kernel_runs.jsonl` in the home, with the folder of the artifact that it was for.
"""

import atexit
import contextlib
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

from colorfilter.compute.local_pool import Call, Timing, Workers
from colorfilter.compute.machine import TRAIN, Machine
from colorfilter.data.tokens import open_tokens
from colorfilter.progress import Progress, silent
from colorfilter.scoring.chunks import Chunk, Receipt, chunk_range, chunk_sequences, plan_chunks
from colorfilter.storage import manifest, remote
from colorfilter.storage.files import append_line, require_space
from colorfilter.storage.remote import Place
from colorfilter.storage.staging import LocalStaging, RemoteStaging
from colorfilter.training.spec import Checkpoint, TrainSpec, trained_tokens
from resources.home import Home
from resources.tally import Tally

if TYPE_CHECKING:
    import numpy as np

    from colorfilter.compute.ray_pool import Cluster
    from colorfilter.scoring.scoring import Losses


# Upper limit for the size of a sequence's loss in a Parquet chunk.
BYTES_PER_LOSS = 16
# Named, not imported: their imports take seconds and are only needed in workers.
SCORE, EVALUATE, EVALUATE_TASKS, TOKEN_LOSSES, DEVICES = (
    Call(f"colorfilter.compute.worker_calls:{name}")
    for name in ("score", "evaluate", "evaluate_tasks", "losses_by_token", "devices")
)


@dataclass(frozen=True)
class ScoreJob:
    """A folder of packed tokens to score with models.

    `models` and `outs` map fingerprints of models to checkpoints and output folders. `parameters`,
    the number of parameters of the largest model, determines the chunk size. A label after
    `eot_id` is ignored (labels.shifted_labels).
    """

    models: Mapping[str, Path]
    outs: Mapping[str, Path]
    parameters: int
    tokens: Path
    shard: str
    precision: str
    eot_id: int | None = None

    def read_for(self, models: Sequence[str]) -> list[Path]:
        """Return the folders that scoring with these models reads."""
        return [*(self.models[m] for m in models), self.tokens]

    def chunk(
        self,
        start: int,
        stop: int,
        models: Sequence[str],
        shared: Callable[[Path], Place],
        staged: Callable[[Path], Place],
    ) -> Chunk:
        """Return the chunk of sequences [start, stop) and some models, with paths for workers.

        `shared` and `staged` map folders of the home to where workers read and write them.
        """
        return Chunk(
            {m: shared(self.models[m]) for m in models},
            shared(self.tokens),
            self.shard,
            start,
            stop,
            {m: staged(self.outs[m]) for m in models},
            self.precision,
            self.eot_id,
        )


class Gpu(dg.ConfigurableResource):
    """The devices that run the loss kernel: CUDA, else MPS, else CPU.

    All fields but `home` are the recipe's settings (colorfilter.config.recipe.Compute).
    """

    home: str
    backend: str = "local"
    address: str | None = None
    storage: str | None = None
    workers: int | None = None
    devices_per_model: int = 1

    _run_id: str = PrivateAttr(default_factory=lambda: uuid.uuid4().hex)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Use the Dagster run's id in records of kernel runs."""
        if context.run:
            self._run_id = context.run.run_id

    def score(
        self,
        jobs: Sequence[ScoreJob],
        progress: Progress = silent,
        standing: Progress = silent,
    ) -> Iterator[tuple[ScoreJob, str, list[Receipt]]]:
        """Score packed tokens chunk by chunk, with all models of a job in one pass.

        Yields each job and model with its receipts once all its chunks exist. Existing chunks are
        not scored again: `standing` is called with their tokens, `progress` with the tokens that
        are scored now.
        """
        if not jobs:  # return before connecting to a cluster
            return
        places, pool = self._places(), self._pool(begin_twice=True)
        receipts: dict[tuple[int, str], list[Receipt]] = {}
        ranges: list[tuple[int, int, int, list[str]]] = []
        left: Counter[tuple[int, str]] = Counter()
        for i, job in enumerate(jobs):
            length = int(open_tokens(job.tokens).shape[1])
            chunk = chunk_sequences(job.parameters, length, pool.kind)
            for out in job.outs.values():
                _take_over(places, out)
            there, missing = plan_chunks(job.tokens, job.outs, chunk)
            for model, found in there.items():
                receipts[i, model] = found
                standing(sum(r.tokens for r in found))
            for (start, stop), models in missing.items():
                ranges.append((i, start, stop, models))
                left.update((i, m) for m in models)
        unscored = sum((stop - start) * len(models) for _, start, stop, models in ranges)
        require_space(Home(self.home).root, BYTES_PER_LOSS * unscored, "scoring")
        for (i, model), found in receipts.items():
            if not left[i, model]:
                yield jobs[i], model, found
        read = (folder for i, _, _, models in ranges for folder in jobs[i].read_for(models))
        tally = Tally([jobs[i].shard for i, *_ in ranges])
        with places.sharing(dict.fromkeys(read)) as shared:

            def call(n: int) -> tuple[Chunk]:
                i, start, stop, models = ranges[n]
                return (jobs[i].chunk(start, stop, models, shared, places.staged),)

            for n, done in pool.run(SCORE, _Calls(call, len(ranges)), progress):
                i = ranges[n][0]
                tally.add(jobs[i].shard, done[0].node)
                for receipt in done:
                    key = i, receipt.model
                    places.take(jobs[i].outs[receipt.model], receipt.file)
                    self._record_chunk(jobs[i], receipt)
                    receipts[key].append(receipt)
                    left[key] -= 1
                    if not left[key]:
                        places.clear(jobs[i].outs[receipt.model])
                        yield jobs[i], receipt.model, sorted(receipts[key], key=lambda r: r.start)

    def train(
        self,
        specs: Sequence[TrainSpec],
        share: int = 1,
        progress: Progress = silent,
        standing: Progress = silent,
    ) -> Iterator[tuple[int, list[Checkpoint]]]:
        """Train each spec; yield (index, a checkpoint per end point) as each finishes.

        `share` is the number of runs between which the CPU's cores are divided. Count all runs of
        the group, even finished ones: the number of processes affects the last bits.
        `standing` is called with the tokens that saved states have already trained on, `progress`
        with the tokens of new steps.
        """
        if not specs:
            return
        alone = any(spec.online for spec in specs)  # selecting needs the whole batch on one device
        pool = self._pool(together=1 if alone else self.devices_per_model)
        places = self._places()
        standing(sum(trained_tokens(spec) for spec in specs))
        calls = [(spec, _shared_folders(places, spec)) for spec in specs]
        if isinstance(pool, Machine):
            trained = pool.train(calls, share, progress)
        else:
            trained = pool.run(TRAIN, [(spec, 1, shared) for spec, shared in calls], progress)
        for i, (checkpoints, took) in trained:
            places.take_all(specs[i].out)
            self._record("train", specs[i].out, took, {"seed": specs[i].seed})
            yield i, checkpoints

    def evaluate(self, checkpoints: Sequence[Path], tokens: Path, folder: Path) -> list["Losses"]:
        """Return the losses of packed tokens with each checkpoint, computed in float32.

        Each is a float32 [n] array of nats per token and an int32 [n] array of numbers of labels.
        `folder` is the folder of the artifact they are for; the records of kernel runs name it.
        """
        losses: list[Losses] = self._evaluated(
            "evaluate", folder, EVALUATE, checkpoints, by=(tokens,)
        )
        return losses

    def evaluate_tasks(
        self,
        checkpoints: Sequence[Path],
        items: Path,
        folder: Path,
        progress: Progress = silent,
    ) -> list[dict[str, float]]:
        """Return the metrics of each checkpoint on the tasks with test items in `items`.

        The metrics are those of `harness.evaluate`. `folder` is the folder of the artifact they
        are for. `progress` is called with the number of choices evaluated.
        """
        metrics: list[dict[str, float]] = self._evaluated(
            "evaluate_tasks", folder, EVALUATE_TASKS, checkpoints, (items,), progress
        )
        return metrics

    def token_losses(
        self,
        checkpoints: Sequence[Path],
        tokens: "np.ndarray",
        folder: Path,
        eot_id: int | None = None,
    ) -> list["np.ndarray"]:
        """Return the losses of every token of a few sequences [N, T] with each checkpoint.

        Each is a float32 [N, T] array (colorfilter.scoring.token_losses), computed in float32.
        `folder` is the folder of the artifact they are for.
        """
        losses: list[np.ndarray] = self._evaluated(
            "token_losses", folder, TOKEN_LOSSES, checkpoints, (tokens, eot_id)
        )
        return losses

    def reach(self) -> None:
        """Raise UnreachableError if a cluster's storage cannot be reached."""
        self._places().check()

    def discard_copies(self, folder: Path) -> None:
        """Remove all copies of a folder of the home, and of its subfolders, from a cluster.

        Raises UnreachableError if the cluster's storage cannot be reached.
        """
        self.reach()
        self._places().discard(folder)

    def _evaluated(
        self,
        verb: str,
        folder: Path,
        work: Callable[..., Any],
        checkpoints: Sequence[Path],
        by: tuple[Any, ...],
        progress: Progress = silent,
    ) -> list[Any]:
        """Return the result of `work(checkpoint, *by)` for each checkpoint, in order."""
        if not checkpoints:
            return []
        pool, places = self._pool(), self._places()
        results: dict[int, Any] = {}
        shared = [places.share(b) if isinstance(b, Path) else b for b in by]
        calls = [(places.share(checkpoint), *shared) for checkpoint in checkpoints]
        for i, (found, took) in pool.run(work, calls, progress):
            model = checkpoints[i].relative_to(Home(self.home).root)
            self._record(verb, folder, took, {"model": str(model)})
            results[i] = found
        return [results[i] for i in range(len(calls))]

    def _places(self) -> LocalStaging:
        """Return the mapping from folders of the home to where workers read and write them."""
        if self.backend == "local":
            return LocalStaging()
        home = Home(self.home)
        return RemoteStaging(
            home.root, self.storage and f"{self.storage.rstrip('/')}/{home.identity()}"
        )

    def _pool(self, *, begin_twice: bool = False, together: int = 1) -> "Machine | Cluster":
        """Return the workers: this machine or a Ray cluster.

        On a cluster, `begin_twice` allows an idle worker to start a slow call a second time, and
        each call uses `together` devices.
        """
        if self.backend == "local":
            return _machine()
        from colorfilter.compute.ray_pool import Cluster

        if _connect(self.address):
            self._places().check()
        return Cluster(self.workers, begin_twice, together, dg.get_dagster_logger().warning)

    def _record_chunk(self, job: ScoreJob, receipt: Receipt) -> None:
        facts = {
            "model": receipt.model,
            "shard": job.shard,
            "chunk": receipt.file,
            "sequences": receipt.sequences,
            "precision": receipt.precision,
            "kernel": receipt.kernel,
            "matrix_share": receipt.matrix_share,
        }
        took = Timing(receipt.tokens, receipt.seconds, str(receipt.device), str(receipt.node))
        self._record("score", job.outs[receipt.model], took, facts)

    def _record(self, verb: str, folder: Path, took: Timing, facts: Mapping[str, Any]) -> None:
        home = Home(self.home)
        line = {
            "run_id": self._run_id,
            "verb": verb,
            "folder": str(folder.relative_to(home.root)),
            "model": None,
            "shard": None,
            "chunk": None,
            **took._asdict(),
            "seconds": round(took.seconds, 3),
            "precision": "float32",
            "kernel": None,
            "matrix_share": None,
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": manifest.environment(),
            **facts,
        }
        text = json.dumps(line, ensure_ascii=False, default=str)
        append_line(home.kernel_runs, lambda _last: text)


class _Calls(Sequence[Any]):
    """A sequence of calls that are created on access.

    Creating a call waits until the folders that it reads are shared. Created one by one, the first
    calls do not wait for the folders of later ones.
    """

    def __init__(self, call: Callable[[int], Any], size: int) -> None:
        self._call = call
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, n: Any) -> Any:
        if n >= self._size:
            raise IndexError(n)
        return self._call(n)


def _take_over(places: LocalStaging, out: Path) -> None:
    """Move chunks that workers committed for a killed run into the home."""
    staged = places.staged(out)
    if staged == out:
        return
    there = {chunk_range(path.name) for path in out.glob("losses-*.parquet")}
    for name in remote.names(staged):
        if chunk_range(name) not in there:
            places.take(out, name)
            there.add(chunk_range(name))


def _shared_folders(places: LocalStaging, spec: TrainSpec) -> dict[Path, Place]:
    """Return where workers read and write each folder that a training uses."""
    folders = [spec.tokens, spec.tokenizer]
    if spec.held_out:
        folders.append(spec.held_out)
    if spec.online:
        folders.append(spec.online.conditional.parent)
    if isinstance(spec.start, str) and Path(spec.start).is_dir():
        folders.append(Path(spec.start))
    return {**{f: places.share(f) for f in folders}, spec.out: places.begun(spec.out)}


def release() -> None:
    """Stop the workers of this process, for use when interpreter shutdown will not stop them."""
    while _machines:
        with _machines.pop():
            pass
    _connection.close()


def _machine() -> Machine:
    """Return the workers of this process, created on first use; a worker detects the devices."""
    if not _machines or _machines[-1].broken:
        with Workers(1) as one:
            ((_, (kind, count)),) = one.run(DEVICES, [()])
        _machines[:] = [Machine(kind, count)]
    return _machines[-1]


def _connect(address: str | None) -> bool:
    """Connect to the cluster until this process exits; return False if it was already connected."""
    from colorfilter.compute.ray_pool import connected, is_connected

    if is_connected():
        return False
    _connection.enter_context(connected(address))
    atexit.register(_connection.close)
    return True


_machines: list[Machine] = []
_connection = contextlib.ExitStack()
