"""Forgotten documents, which must not be read or selected again: each leaves a tombstone.

A tombstone records the sha256 of the text, where the text was, and what was trained on it.
"""

from colorfilter.stages import Stage
from resources.artifacts import Artifact, ArtifactStore

EXCLUSION = Stage.FORGOTTEN.value  # the asset whose partitions are tombstones
SEQUENCES = "sequences.parquet"


def tombstones(artifacts: ArtifactStore) -> list[Artifact]:
    """Return the tombstones of all forgotten documents."""
    partitions = [p for asset, p in artifacts.entries() if asset == EXCLUSION]
    return [artifacts.current(EXCLUSION, p) for p in sorted(partitions, key=str)]


def exclusions(artifacts: ArtifactStore) -> list[Artifact]:
    """Return the tombstones of documents that were in sequences of the corpus.

    They are an input of every asset that selects.
    """
    return [made for made in tombstones(artifacts) if made.facts["sequences"]]


def unwanted_texts(artifacts: ArtifactStore) -> dict[str, str]:
    """Return the reason to reject each forgotten text, by the text's sha256."""
    return {str(made.facts["sha256"]): EXCLUSION for made in tombstones(artifacts)}
