"""Find what a home no longer needs: older versions, retired shards and unfinished attempts.

Everything current is kept, and everything that it was built from according to the ledger.
"""

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from colorfilter.storage.files import is_locked
from colorfilter.storage.manifest import MANIFEST
from resources.artifacts import ArtifactStore
from resources.lineage import Lineage


@dataclass(frozen=True)
class Leftover:
    """A folder that nothing current needs: its asset, the reason, its path and size in bytes."""

    asset: str
    why: str
    path: Path
    size: int


def leftovers(artifacts: ArtifactStore, shards: Collection[str]) -> list[Leftover]:
    """Return the folders that can be removed, largest first.

    `shards` are the current shards of the corpus.
    """
    root = artifacts.at.artifacts
    lineage = Lineage(artifacts)
    needed = lineage.ancestry(lineage.current(shards))
    known = {e["path"] for e in artifacts.ledger}
    found = []
    for folder in folders(root):
        path = str(folder.relative_to(artifacts.at.root))
        if path in needed or at_work(artifacts, folder):
            continue
        unfinished = not (folder / MANIFEST).exists()
        why = "unfinished" if unfinished else "older" if path in known else "not in the ledger"
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        asset = str(folder.parent.relative_to(root))
        found.append(Leftover(asset, why, folder, size))
    return sorted(found, key=lambda left: (-left.size, str(left.path)))


def folders(root: Path) -> Iterator[Path]:
    """Yield the folders of artifacts, which are named by a key, at any depth."""
    for folder, below, _ in os.walk(root):
        for name in list(below):
            if re.fullmatch("[0-9a-f]{16}", name):
                below.remove(name)
                yield Path(folder) / name


def at_work(artifacts: ArtifactStore, folder: Path) -> bool:
    """Whether an attempt holds the lease of a folder's artifact."""
    return any(is_locked(lease) for lease in artifacts.at.leases.glob(f"{folder.name}*"))
