"""What a home no longer needs: older versions, retired shards, and what attempts left unfinished.

Kept is whatever is current, and all that it was made from, as the ledger has it.
"""

import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colorfilter.files import is_locked
from colorfilter.provenance import MANIFEST, part_fingerprint, stands
from resources.artifacts import ArtifactStore


@dataclass(frozen=True)
class Leftover:
    """A folder that nothing current needs: of which asset, why, and how much it holds."""

    asset: str
    why: str
    path: Path
    size: int


def leftovers(artifacts: ArtifactStore, shards: Collection[str]) -> list[Leftover]:
    """What can be removed where these are the corpus's shards, the largest first."""
    root = artifacts.at.artifacts
    needed = _needed(artifacts, shards)
    known = {e["path"] for e in artifacts.ledger()}
    found = []
    for folder in _folders(root):
        path = str(folder.relative_to(artifacts.at.root))
        if path in needed or _at_work(artifacts, folder):
            continue
        unfinished = not (folder / MANIFEST).exists()
        why = "unfinished" if unfinished else "older" if path in known else "not in the ledger"
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        asset = str(folder.parent.relative_to(root))
        found.append(Leftover(asset, why, folder, size))
    return sorted(found, key=lambda left: (-left.size, str(left.path)))


def remove(leftover: Leftover) -> None:
    """Remove a folder, its manifest first: what is left of one half removed does not stand."""
    (leftover.path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(leftover.path)


def _needed(artifacts: ArtifactStore, shards: Collection[str]) -> set[str]:
    """Paths of the current artefacts and of what they were made from."""
    made: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in artifacts.ledger():
        partition = entry["partition"]
        name = entry["asset"] if partition is None else f"{entry['asset']}[{partition}]"
        made[name, entry["fingerprint"]] = entry
    corpus = {p for asset, p in artifacts.entries() if asset == "raw_corpus"}
    waiting = [
        entry
        for (_, partition), entry in artifacts.entries().items()
        if partition in shards or partition not in corpus
    ]
    needed: set[str] = set()
    while waiting:
        entry = waiting.pop()
        if entry["path"] in needed:
            continue
        needed.add(entry["path"])
        for name, fingerprint in {**entry["inputs"], **entry["sources"]}.items():
            whole = made.get((name, fingerprint))
            waiting += [whole] if whole else _wholes(artifacts, made, name, fingerprint)
    return needed


def _wholes(
    artifacts: ArtifactStore,
    made: dict[tuple[str, str], dict[str, Any]],
    part: str,
    fingerprint: str,
) -> list[dict[str, Any]]:
    """The artefacts that have a folder of this name and content."""
    asset, _, folder = part.rpartition("/")
    return [
        entry
        for (name, _), entry in made.items()
        if name == asset
        and stands(artifacts.at.root / entry["path"])
        and part_fingerprint(artifacts.at.root / entry["path"], folder) == fingerprint
    ]


def _folders(root: Path) -> Iterator[Path]:
    """The folders of artefacts: named by a key, at any depth."""
    for folder, below, _ in os.walk(root):
        for name in list(below):
            if re.fullmatch("[0-9a-f]{16}", name):
                below.remove(name)
                yield Path(folder) / name


def _at_work(artifacts: ArtifactStore, folder: Path) -> bool:
    """Whether an attempt holds the lease of a folder."""
    return any(is_locked(lease) for lease in artifacts.at.leases.glob(f"{folder.name}*"))
