"""Shared by all stages: partitions, names, progress, and metadata of results."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import dagster as dg

from colorfilter.compute.local_pool import Workers, cores
from colorfilter.config.recipe import Recipe
from colorfilter.errors import InputError
from colorfilter.stages import ShardKind
from colorfilter.storage.files import require_space
from resources.artifacts import Artifact, ArtifactStore, Work

SHARDS = dg.DynamicPartitionsDefinition(name="shards")
ONE_RUN = dg.BackfillPolicy.single_run()
OWNERS = ["team:pretraining-data"]
Context = dg.AssetExecutionContext
INPUTS_SHOWN = 12
AnyContext = dg.AssetExecutionContext | dg.OpExecutionContext


def shard_names(store: ArtifactStore, recipe: Recipe) -> list[str]:
    """Return the names of all shards, reserved ones last. Raises InputError if none are planned."""
    planned = [s.name for s in store.at.shards()]
    if not planned:
        raise InputError(
            "no shards are planned yet; wait a minute for the sensor `arrivals` to plan them, or "
            "use `colorfilter run`"
        )
    return planned + [ShardKind.PROBE.named(d.name) for d in recipe.domains]


def result(artifacts: Sequence[Artifact], metadata: Mapping[str, Any]) -> dg.MaterializeResult:
    """Return an unsharded asset's result; its data version is the hash of its fingerprints."""
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in metadata.items()}
    if len(artifacts) == 1:
        shown |= identity(artifacts[0])
    else:
        shown["fingerprints"] = dg.MetadataValue.json({a.name: a.fingerprint for a in artifacts})
    reused = sum(a.reused for a in artifacts)
    shown["computed"] = len(artifacts) - reused
    shown["reused"] = reused
    return dg.MaterializeResult(metadata=shown, data_version=data_version(artifacts))


def identity(artifact: Artifact) -> dict[str, Any]:
    """Return an artifact's fingerprint, inputs and folder as metadata."""
    return {
        "fingerprint": artifact.fingerprint,
        "inputs": dg.MetadataValue.json(_inputs(artifact)),
        "folder": dg.MetadataValue.path(str(artifact.path)),
    }


def _inputs(artifact: Artifact) -> dict[str, str]:
    """Return fingerprints of inputs by name, at most INPUTS_SHOWN; the ledger has them all."""
    names = list(artifact.inputs)
    shown = {name: artifact.inputs[name][:16] for name in names[:INPUTS_SHOWN]}
    more = len(names) - len(shown)
    return {**shown, **({"others": f"{more:,}, see the ledger"} if more else {})}


def sharded_result(
    context: Context,
    store: ArtifactStore,
    made: Sequence[Artifact],
    facts: Sequence[str],
    rows: str,
) -> dg.MaterializeResult:
    """Return a sharded asset's result; add each shard's facts as metadata and log the totals.

    Dagster gives all partitions of a run the same data version. The version is the hash over all
    shards of the asset, in this run or not, so that it changes only when a shard changes. `rows`
    names the fact that counts rows.
    """
    asset = made[0].asset
    key = dg.AssetKey(asset.split("/"))
    for artifact in made:
        shown = {name: artifact.facts[name] for name in facts}
        shown["dagster/row_count"] = artifact.facts[rows]
        shown |= identity(artifact)
        shown["computed"] = 0 if artifact.reused else 1
        context.add_asset_metadata(shown, asset_key=key, partition_key=artifact.partition)
    summed = [name for name in facts if not name.endswith("_per_second")]
    totals = ", ".join(f"{total(made, name):,} {name}" for name in summed)
    reused = sum(a.reused for a in made)
    context.log.info(f"{asset}: {len(made)} shards, {reused} of them reused: {totals}")
    wanted = {s.name for s in store.at.shards()} | {str(a.partition) for a in made}
    others = [
        store.current(asset, partition)
        for (name, partition) in store.entries()
        if name == asset and partition in wanted
    ]
    return dg.MaterializeResult(asset_key=key, data_version=data_version(others))


def data_version(artifacts: Sequence[Artifact]) -> dg.DataVersion:
    """Return Dagster's data version: the hash of the artifacts' names and fingerprints."""
    fingerprints = sorted(f"{a.name}={a.fingerprint}" for a in artifacts)
    return dg.DataVersion(hashlib.sha256("\n".join(fingerprints).encode()).hexdigest())


def total(artifacts: Sequence[Artifact], fact: str) -> int:
    """Return the sum of a fact over artifacts."""
    return sum(a.facts[fact] for a in artifacts)


# Called with step, done, total, unit and units per second.
Listener = Callable[[str, int, int, str, float], None]
# Set by the command line, which draws progress bars for the steps that it runs in its process.
LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


class Progress:
    """Count completed work, log the rate and the time left, and call `LISTENER`."""

    log_seconds = 10.0

    def __init__(self, context: AnyContext, size: int, unit: str) -> None:
        self._context = context
        self._listener = LISTENER.get()
        self._name = context.op.name.replace("__", "/")
        self._size, self._unit = size, unit
        self._done = self._stood = 0
        self._begun = self._logged = time.monotonic()
        self(0)

    def __call__(self, amount: int) -> None:
        self._done += amount
        if self._listener:
            self._listener(self._name, self._done, self._size, self._unit, self.rate)
        now = time.monotonic()
        if now - self._logged >= self.log_seconds:
            self._logged = now
            rate = self.rate
            left = (self._size - self._done) / rate if rate else float("inf")
            self._context.log.info(
                f"{self._done:,} of {self._size:,} {self._unit}, {rate:,.0f}/s, {left:,.0f} s left"
            )

    def stands(self, amount: int) -> None:
        """Count work that an earlier run completed, without including it in the rate."""
        self._stood += amount
        self(amount)

    @property
    def rate(self) -> float:
        return (self._done - self._stood) / max(1e-9, time.monotonic() - self._begun)


def make_in_processes(
    store: ArtifactStore,
    works: Sequence[Work],
    build: Callable[..., Mapping[str, Any]],
    arguments: Callable[[Work], tuple[Any, ...]],
    progress: Progress,
    size: Callable[[str], int],
) -> list[Artifact]:
    """Build artifacts in worker processes by `build(folder, *arguments(work)) -> facts`.

    A build reports its progress with `workers.report`. `size(partition)` is the total that it
    reports, and is counted at once for an artifact that exists. It is also the upper limit, in
    bytes, of what a build is expected to write. Raises the errors of builds, and OSError if the
    disk has too little free space. After an InputError the unfinished folders are removed.
    """
    with store.attempts(works) as attempts:
        missing = [a for a in attempts if not a.standing]
        progress.stands(sum(size(str(a.work.partition)) for a in attempts if a.standing))
        if missing:
            written = sum(size(str(a.work.partition)) for a in missing)
            require_space(store.at.root, written, missing[0].work.asset)
            with Workers(min(len(missing), cores())) as workers:
                calls = [(a.folder, *arguments(a.work)) for a in missing]
                for i, facts in workers.run(build, calls, progress):
                    missing[i].commit(facts)
        return [a.artifact for a in attempts]
