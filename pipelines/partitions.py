"""Shards as Dagster partitions, and tags for runs over a range of them."""

from collections.abc import Collection, Sequence

import dagster as dg

from assets.common import SHARDS

RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"


def make_partitions(instance: dg.DagsterInstance, shards: Sequence[str]) -> list[str]:
    """Make these shards Dagster's only dynamic partitions; return them in Dagster's order."""
    name = str(SHARDS.name)
    existing = set(instance.get_dynamic_partitions(name))
    for retired in existing - set(shards):
        instance.delete_dynamic_partition(name, retired)
    instance.add_dynamic_partitions(name, [s for s in shards if s not in existing])
    return list(instance.get_dynamic_partitions(name))


def over(shards: Sequence[str], wanted: Collection[str]) -> dict[str, str]:
    """Return tags for a run over the wanted shards and all shards between them.

    `shards` are all shards in Dagster's order.
    """
    positions = [i for i, shard in enumerate(shards) if shard in wanted]
    return {RANGE_START: shards[positions[0]], RANGE_END: shards[positions[-1]]}
