"""Shards as Dagster's partitions, and runs over some of them."""

from collections.abc import Collection, Sequence

import dagster as dg

from assets.common import SHARDS

RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"


def make_partitions(instance: dg.DagsterInstance, shards: Sequence[str]) -> list[str]:
    """Have exactly these shards as Dagster's partitions; returns them in its order."""
    name = str(SHARDS.name)
    standing = set(instance.get_dynamic_partitions(name))
    for retired in standing - set(shards):
        instance.delete_dynamic_partition(name, retired)
    instance.add_dynamic_partitions(name, [s for s in shards if s not in standing])
    return list(instance.get_dynamic_partitions(name))


def over(shards: Sequence[str], wanted: Collection[str]) -> dict[str, str]:
    """Tags of a run over the wanted shards and what lies between them, in Dagster's order."""
    places = [i for i, shard in enumerate(shards) if shard in wanted]
    return {RANGE_START: shards[places[0]], RANGE_END: shards[places[-1]]}
