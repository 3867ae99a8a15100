"""The one way from an asset to torch, on whatever devices there are.

Its verbs hold alike locally and on a cluster. Locally the work is done in worker processes, one per
CUDA device, or one per CPU core: a core each does more than all cores at one small matrix, and does
not stand still when another program takes one of them. Every kernel run leaves lines in
`kernel_runs.jsonl` of the home, with the folder of the artifact that it was for.
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


# Of a sequence's loss in a Parquet chunk, at most.
BYTES_PER_LOSS = 16
# Named and not imported: what they import takes seconds, and this process does not need it.
SCORE, EVALUATE, EVALUATE_TASKS, TOKEN_LOSSES, DEVICES = (
    Call(f"colorfilter.compute.worker_calls:{name}")
    for name in ("score", "evaluate", "evaluate_tasks", "losses_by_token", "devices")
)


@dataclass(frozen=True)
class ScoreJob:
    """A folder of packed tokens to score by models: fingerprint -> checkpoint, and -> folder out.

    `parameters` of the models decide the size of a chunk; `eot_id` as in labels.shifted_labels.
    """

    models: Mapping[str, Path]
    outs: Mapping[str, Path]
    parameters: int
    tokens: Path
    shard: str
    precision: str
    eot_id: int | None = None

    def read_for(self, models: Sequence[str]) -> list[Path]:
        """The folders that are read to score by some of the models."""
        return [*(self.models[m] for m in models), self.tokens]

    def chunk(
        self,
        start: int,
        stop: int,
        models: Sequence[str],
        shared: Callable[[Path], Place],
        staged: Callable[[Path], Place],
    ) -> Chunk:
        """Sequences [start, stop) by some of the models, where those that work have them."""
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

    `backend` and what is beside it are the recipe's (colorfilter.config.recipe.Compute).
    """

    home: str
    backend: str = "local"
    address: str | None = None
    storage: str | None = None
    workers: int | None = None
    devices_per_model: int = 1

    _run_id: str = PrivateAttr(default_factory=lambda: uuid.uuid4().hex)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Records of the kernel's runs name the run of Dagster that they belong to."""
        if context.run:
            self._run_id = context.run.run_id

    def score(
        self,
        jobs: Sequence[ScoreJob],
        progress: Progress = silent,
        standing: Progress = silent,
    ) -> Iterator[tuple[ScoreJob, str, list[Receipt]]]:
        """Score packed tokens chunk by chunk, in one pass by all models that are asked for.

        Gives each job and model with the receipts once all stand; what stood before is not scored
        again: `standing` is called with its tokens, `progress` with those that are scored.
        """
        if not jobs:  # nor is a cluster asked for then
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
                    whole = i, receipt.model
                    places.take(jobs[i].outs[receipt.model], receipt.file)
                    self._record_chunk(jobs[i], receipt)
                    receipts[whole].append(receipt)
                    left[whole] -= 1
                    if not left[whole]:
                        places.clear(jobs[i].outs[receipt.model])
                        yield jobs[i], receipt.model, sorted(receipts[whole], key=lambda r: r.start)

    def train(
        self,
        specs: Sequence[TrainSpec],
        share: int = 1,
        progress: Progress = silent,
        standing: Progress = silent,
    ) -> Iterator[tuple[int, list[Checkpoint]]]:
        """Train as the specs say; gives (index, a checkpoint per end point) as each is done.

        `share` is the number of runs between which the CPU's cores are divided. Count all runs of
        the group, even finished ones: the number of processes affects the last bits.
        `standing` is called with the tokens of the steps that the states in the home have behind
        them, `progress` with those of the steps that are done.
        """
        if not specs:
            return
        alone = any(spec.online for spec in specs)  # what is chosen depends on all of the batch
        pool = self._pool(together=1 if alone else self.devices_per_model)
        places = self._places()
        standing(sum(trained_tokens(spec) for spec in specs))
        calls = [(spec, _lent(places, spec)) for spec in specs]
        if isinstance(pool, Machine):
            trained = pool.train(calls, share, progress)
        else:
            trained = pool.run(TRAIN, [(spec, 1, lent) for spec, lent in calls], progress)
        for i, (checkpoints, took) in trained:
            places.take_all(specs[i].out)
            self._record("train", specs[i].out, took, {"seed": specs[i].seed})
            yield i, checkpoints

    def evaluate(self, checkpoints: Sequence[Path], tokens: Path, folder: Path) -> list["Losses"]:
        """Losses of packed tokens by each checkpoint, for the artifact that is made in `folder`.

        Each is float32 [n] nats per token, int32 [n] number of labels; computed in float32.
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
        """Metrics of the tasks whose test items lie in `items`, by each checkpoint.

        As harness.evaluate gives them; `folder` as in evaluate, `progress` is called with the
        number of choices done.
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
        """Losses of every token of a few sequences [N, T] by each checkpoint.

        Each is float32 [N, T] (colorfilter.scoring.token_losses), computed in float32. `folder` is
        as in `evaluate`.
        """
        losses: list[np.ndarray] = self._evaluated(
            "token_losses", folder, TOKEN_LOSSES, checkpoints, (tokens, eot_id)
        )
        return losses

    def reach(self) -> None:
        """Raise UnreachableError where the storage of a cluster cannot be reached."""
        self._places().check()

    def discard_copies(self, folder: Path) -> None:
        """Remove every copy that a cluster has of a folder of the home, and of what is in it.

        Raises UnreachableError where its storage cannot be reached.
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
        """What `work(checkpoint, *by)` gives of each checkpoint, in their order."""
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
        """Where the folders of the home lie for those that work."""
        if self.backend == "local":
            return LocalStaging()
        home = Home(self.home)
        return RemoteStaging(
            home.root, self.storage and f"{self.storage.rstrip('/')}/{home.identity()}"
        )

    def _pool(self, *, begin_twice: bool = False, together: int = 1) -> "Machine | Cluster":
        """Who works. `begin_twice` where a call that takes long may be begun a second time,
        `together` devices of a cluster on each call.
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
    """Calls that are made up when they are asked for: by then what they read is shared, not all
    that will ever be read.
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
    """Bring in the chunks that workers committed for a run which was killed."""
    staged = places.staged(out)
    if staged == out:
        return
    there = {chunk_range(path.name) for path in out.glob("losses-*.parquet")}
    for name in remote.names(staged):
        if chunk_range(name) not in there:
            places.take(out, name)
            there.add(chunk_range(name))


def _lent(places: LocalStaging, spec: TrainSpec) -> dict[Path, Place]:
    """Where the folders that a training reads and writes lie for those that work."""
    folders = [spec.tokens, spec.tokenizer]
    if spec.held_out:
        folders.append(spec.held_out)
    if spec.online:
        folders.append(spec.online.conditional.parent)
    if isinstance(spec.start, str) and Path(spec.start).is_dir():
        folders.append(Path(spec.start))
    return {**{f: places.share(f) for f in folders}, spec.out: places.begun(spec.out)}


def release() -> None:
    """End the workers of this process, for one that ends without its interpreter's teardown."""
    while _standing:
        with _standing.pop():
            pass
    _connection.close()


def _machine() -> Machine:
    """The workers of this process, which it keeps; one of them says what devices there are."""
    if not _standing or _standing[-1].broken:
        with Workers(1) as one:
            ((_, (kind, count)),) = one.run(DEVICES, [()])
        _standing[:] = [Machine(kind, count)]
    return _standing[-1]


def _connect(address: str | None) -> bool:
    """Be connected to the cluster as long as this process lives; whether it was not before."""
    from colorfilter.compute.ray_pool import connected, is_connected

    if is_connected():
        return False
    _connection.enter_context(connected(address))
    atexit.register(_connection.close)
    return True


_standing: list[Machine] = []
_connection = contextlib.ExitStack()
