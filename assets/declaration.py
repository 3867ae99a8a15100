"""What an asset reads and what determines its content, declared once for Dagster and the ledger."""

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
    """Which shards of a sharded input an asset reads."""

    SAME = "same"
    ALL = "all"


MAPPINGS: dict[Shards, dg.PartitionMapping] = {
    Shards.SAME: dg.IdentityPartitionMapping(),
    Shards.ALL: dg.AllPartitionMapping(),
}


@dataclass(frozen=True)
class Read:
    """An asset that another asset reads and, if it is sharded, which of its shards."""

    asset: str
    shards: Shards | None = None

    @property
    def dependency(self) -> dg.AssetDep:
        """The read as a Dagster dependency."""
        mapping = MAPPINGS[self.shards] if self.shards else None
        return dg.AssetDep(self.asset.split("/"), partition_mapping=mapping)


@dataclass(frozen=True)
class Declaration:
    """What an asset reads, and which settings of the recipe determine its content.

    `inputs` are part of the ledger's key. Assets in `consults` are not: they only affect how the
    result is published or shown, or their content follows from that of the inputs. `settings` are
    the settings of the recipe that determine the content. Increase `code` by hand when the code
    computes a different result from the same inputs.
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
        """Everything that the asset reads: inputs and consulted assets."""
        return [*self.inputs, *self.consults]

    @property
    def code_version(self) -> str:
        """Dagster's code version: `code` and a hash of input names, settings, seed, precision."""
        names = [read.asset for read in self.inputs]
        text = manifest.canonical_json([names, self.settings, self.seed, self.precision])
        return f"{self.code}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    @property
    def for_dagster(self) -> dict[str, Any]:
        """The arguments that `dagster.asset` and `dagster.AssetSpec` share."""
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
        """The asset's spec, for use in a multi-asset."""
        return dg.AssetSpec(self.name.split("/"), **self.for_dagster)

    def current(
        self,
        artifacts: ArtifactStore,
        asset: str,
        partition: str | None = None,
        made_from: Sequence[Artifact] = (),
    ) -> Artifact:
        """Return the current artifact of a declared read.

        Raises InputError if it does not exist or was built from other versions of the artifacts
        in `made_from`, and ValueError if the read is not declared.
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
        """Return the work that builds an artifact; the ledger identifies it by its key.

        `settings` and `seed` replace the declared ones in the key: use them for settings that
        depend on what is read and for a seed that differs by partition. Raises ValueError for an
        input that is not declared.
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
        """Return the tombstones of forgotten documents, an input of every asset that selects."""
        return exclusions(artifacts)

    def _require(self, asset: str) -> None:
        # A part of an artifact is named by its asset and a folder. An exclusion is not an asset.
        declared = {read.asset for read in self.reads} | {EXCLUSION, self.name}
        if asset not in declared and asset.rpartition("/")[0] not in declared:
            raise ValueError(f"{self.name} reads {asset}, which is not in its declaration")


def asset(declared: Declaration) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """Decorate the function that materializes a declared asset, like `dagster.asset`.

    If the declaration has no description, the docstring of the function is the description.
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
