"""Progress of scoring, in the log of a run."""

import time
from collections import Counter
from collections.abc import Sequence

import dagster as dg

TALLY_SECONDS = 10.0
SHOWN = 8


class Tally:
    """Log every TALLY_SECONDS how many chunks of each shard are scored, and by which nodes."""

    def __init__(self, shards: Sequence[str]) -> None:
        self._size = Counter(shards)
        self._done: Counter[str] = Counter()
        self._nodes: Counter[str] = Counter()
        self._logged = -TALLY_SECONDS

    def add(self, shard: str, node: str | None) -> None:
        self._done[shard] += 1
        self._nodes[str(node)] += 1
        done, size = self._done.total(), self._size.total()
        if done == size or time.monotonic() - self._logged >= TALLY_SECONDS:
            self._logged = time.monotonic()
            begun = [s for s, n in self._done.items() if n < self._size[s]]
            complete = len(self._done) - len(begun)
            at_work = "".join(f", {s} {self._done[s]} of {self._size[s]}" for s in begun[:SHOWN])
            nodes = ", ".join(f"{node} {n:,}" for node, n in self._nodes.most_common(SHOWN))
            dg.get_dagster_logger().info(
                f"chunks: {done:,} of {size:,}; shards: {complete:,} of {len(self._size):,} "
                f"complete{at_work}; by node: {nodes}"
            )
