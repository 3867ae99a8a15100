"""What must not be read or selected again: each forgotten document leaves a tombstone.

It has the sha256 of the text, where that was, and what learned from it.
"""

from colorfilter.stages import Stage
from resources.artifacts import Artifact, ArtifactStore

EXCLUSION = Stage.FORGOTTEN.value  # the asset whose partitions are tombstones
SEQUENCES = "sequences.parquet"


def tombstones(artifacts: ArtifactStore) -> list[Artifact]:
    """The tombstones of all forgotten documents."""
    partitions = [p for asset, p in artifacts.entries() if asset == EXCLUSION]
    return [artifacts.current(EXCLUSION, p) for p in sorted(partitions, key=str)]


def exclusions(artifacts: ArtifactStore) -> list[Artifact]:
    """Those of documents that sequences of the corpus carried: an input of whatever selects."""
    return [made for made in tombstones(artifacts) if made.facts["sequences"]]


def unwanted_texts(artifacts: ArtifactStore) -> dict[str, str]:
    """Why texts must not be read, by their sha256."""
    return {str(made.facts["sha256"]): EXCLUSION for made in tombstones(artifacts)}
