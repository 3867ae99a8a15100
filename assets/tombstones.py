"""What is left of a document that was forgotten: where it was, and what learned from it."""

from typing import Any

import polars as pl

from resources.artifacts import Artifact, ArtifactStore
from resources.ledger import FORGOTTEN

SEQUENCES = "sequences.parquet"


def tombstones(artifacts: ArtifactStore) -> list[Artifact]:
    """Every document that was forgotten, as the artefact that says so."""
    partitions = [p for asset, p in artifacts.entries() if asset == FORGOTTEN]
    return [artifacts.current(FORGOTTEN, p) for p in sorted(partitions, key=str)]


def forgotten(artifacts: ArtifactStore) -> list[Artifact]:
    """The tombstones of documents that sequences of the corpus carried."""
    return [made for made in tombstones(artifacts) if made.facts["sequences"]]


def forgotten_texts(artifacts: ArtifactStore) -> set[str]:
    """The sha256 of every text that was forgotten."""
    return {str(made.facts["sha256"]) for made in tombstones(artifacts)}


def forgotten_positions(artifacts: ArtifactStore) -> dict[str, list[int]]:
    """By shard, the positions of the sequences that were touched."""
    found: dict[str, list[int]] = {}
    for made in forgotten(artifacts):
        rows: Any = pl.read_parquet(made.path / SEQUENCES).drop_nulls("shard")
        for shard, position in rows.select("shard", "position").iter_rows():
            found.setdefault(shard, []).append(position)
    return found
