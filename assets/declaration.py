"""What an asset reads and what decides its content, stated once for Dagster and the ledger."""

import hashlib
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import dagster as dg

from assets.common import ONE_RUN, OWNERS, SHARDS
from colorfilter.storage import manifest
from resources.artifacts import Artifact, ArtifactStore, Work
from resources.exclusions import EXCLUSION, exclusions


class Shards(Enum):
    """Which shards of a sharded asset another asset reads."""

    SAME = "same"
    ALL = "all"


MAPPINGS: dict[Shards, dg.PartitionMapping] = {
    Shards.SAME: dg.IdentityPartitionMapping(),
    Shards.ALL: dg.AllPartitionMapping(),
}


@dataclass(frozen=True)
class Read:
    """An asset that another one reads; of a sharded one, which of its shards."""

    asset: str
    shards: Shards | None = None

    @property
    def dependency(self) -> dg.AssetDep:
        """Dagster's form of it."""
        mapping = MAPPINGS[self.shards] if self.shards else None
        return dg.AssetDep(self.asset.split("/"), partition_mapping=mapping)


@dataclass(frozen=True)
class Declaration:
    """What an asset reads, and what of the recipe decides its content.

    `inputs` enter the ledger's key. What the asset `consults` does not: it decides how the result
    is published or shown, or its content follows from that of the inputs. `settings` are the facts
    of the recipe that decide the content. Raise `code` by hand when the code makes something else
    of the same inputs.
    """

    name: str
    group: str
    kinds: Set[str]
    inputs: Sequence[Read] = ()
    consults: Sequence[Read] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    code: int = 1
    seed: int | None = None
    precision: str | None = None
    description: str | None = None
    sharded: bool = False
    pool: str | None = None
    arm: str | None = None
    freshness: dg.FreshnessPolicy | None = None

    @property
    def reads(self) -> list[Read]:
        """All that the asset reads."""
        return [*self.inputs, *self.consults]

    @property
    def code_version(self) -> str:
        """Dagster's code version: `code`, and a hash of what else decides the content."""
        names = [read.asset for read in self.inputs]
        decides = manifest.canonical_json([names, self.settings, self.seed, self.precision])
        return f"{self.code}-{hashlib.sha256(decides.encode()).hexdigest()[:10]}"

    @property
    def for_dagster(self) -> dict[str, Any]:
        """Arguments that `dagster.asset` and `dagster.AssetSpec` have in common."""
        return {
            "deps": [read.dependency for read in self.reads],
            "description": self.description,
            "group_name": self.group,
            "kinds": set(self.kinds),
            "tags": {"arm": self.arm} if self.arm else None,
            "owners": OWNERS,
            "code_version": self.code_version,
            "freshness_policy": self.freshness,
        }

    @property
    def spec(self) -> dg.AssetSpec:
        """The asset as one of a multi-asset."""
        return dg.AssetSpec(self.name.split("/"), **self.for_dagster)

    def current(
        self,
        artifacts: ArtifactStore,
        asset: str,
        partition: str | None = None,
        made_from: Sequence[Artifact] = (),
    ) -> Artifact:
        """The current artifact of a declared read.

        Raises InputError where it has not been made, or from something older than `made_from`;
        ValueError where it is not declared.
        """
        self._require(asset)
        return artifacts.current_from(asset, partition, made_from)

    def work(
        self,
        inputs: Sequence[Artifact],
        partition: str | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        seed: int | None = None,
        sources: Sequence[Artifact] = (),
    ) -> Work:
        """The piece of work that the ledger identifies by its key.

        `settings` and `seed` replace the declared ones in the key: settings that depend on what is
        read, a seed that differs by partition. Raises ValueError for an input that is not declared.
        """
        for artifact in (*inputs, *sources):
            self._require(artifact.asset)
        return Work(
            self.name,
            partition,
            inputs=inputs,
            recipe=self.settings if settings is None else settings,
            code=self.code,
            seed=self.seed if seed is None else seed,
            precision=self.precision,
            sources=sources,
        )

    def exclusions(self, artifacts: ArtifactStore) -> list[Artifact]:
        """What must never be selected: an input of every asset that selects."""
        return exclusions(artifacts)

    def _require(self, asset: str) -> None:
        # Part of an artifact is named by its asset and a folder; an exclusion is no asset.
        declared = {read.asset for read in self.reads} | {EXCLUSION, self.name}
        if asset not in declared and asset.rpartition("/")[0] not in declared:
            raise ValueError(f"{self.name} reads {asset}, which its declaration does not name")


def asset(declared: Declaration) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """Decorate the function that makes a declared asset, as `dagster.asset` does.

    Without a description in the declaration the function's docstring is the asset's.
    """
    *prefix, name = declared.name.split("/")
    decorate: Callable[[Callable[..., Any]], dg.AssetsDefinition] = dg.asset(
        name=name,
        key_prefix=prefix or None,
        partitions_def=SHARDS if declared.sharded else None,
        backfill_policy=ONE_RUN if declared.sharded else None,
        pool=declared.pool,
        **declared.for_dagster,
    )
    return decorate
