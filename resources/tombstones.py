"""What is left of a forgotten document: its sha256, where it was, and what learned from it."""

from resources.artifacts import Artifact, ArtifactStore

FORGOTTEN = "forgotten"  # the asset whose partitions are tombstones
SEQUENCES = "sequences.parquet"


def tombstones(artifacts: ArtifactStore) -> list[Artifact]:
    """The tombstones of all forgotten documents."""
    partitions = [p for asset, p in artifacts.entries() if asset == FORGOTTEN]
    return [artifacts.current(FORGOTTEN, p) for p in sorted(partitions, key=str)]


def tombstones_of_sequences(artifacts: ArtifactStore) -> list[Artifact]:
    """Those of documents that sequences of the corpus carried: an input of whatever selects."""
    return [made for made in tombstones(artifacts) if made.facts["sequences"]]


def unwanted_texts(artifacts: ArtifactStore) -> dict[str, str]:
    """Why texts must not be read, by their sha256."""
    return {str(made.facts["sha256"]): FORGOTTEN for made in tombstones(artifacts)}
