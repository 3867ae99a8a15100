"""Tamper with homes, and audit them."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from colorfilter.storage.manifest import read_manifest, write_manifest
from commands.audit.audit import Audit, audit
from resources.ledger import NOTHING
from tests.conftest import Project


def audited(project: Project, **how: object) -> Audit:
    return audit(project.recipe, project.home, lambda _name, _size: lambda _amount: None, **how)  # type: ignore[arg-type]


def lines(project: Project, **how: object) -> list[str]:
    """What does not hold."""
    return [str(f) for f in audited(project, **how).findings if not f.warning]


def folder(project: Project, asset: str) -> Path:
    """Of the last artifact of an asset, in the order of partitions."""
    return (
        project.home.root
        / max(
            (e for e in project.ledger() if e["asset"] == asset), key=lambda e: str(e["partition"])
        )["path"]
    )


def found(project: Project, *patterns: str, **how: object) -> None:
    """Each pattern is in a line that does not hold, and there is no line without one of them."""
    there = lines(project, **how)
    for pattern in patterns:
        assert any(re.search(pattern, line) for line in there), (pattern, there)
    others = [line for line in there if not any(re.search(p, line) for p in patterns)]
    assert not others


def flip(path: Path, offset: int = 100) -> None:
    """One bit of a file, its size and times as they were."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def close(place: Path) -> dict[str, object]:
    """Make a folder's manifest anew, so that it fits; what the ledger would have to say of it."""
    was = read_manifest(place)
    identity = {k: v for k, v in was.items() if k not in {"fingerprint", "facts", "files"}}
    return write_manifest(place, was["facts"], identity)._asdict()


def forge(project: Project, asset: str, change: Callable[[Path], None]) -> None:
    """Change an artifact, its manifest and its entry, and make the ledger's chain anew."""
    place = folder(project, asset)
    change(place)
    made = close(place)
    path = str(place.relative_to(project.home.root))
    entries = [{**e, **made} if e["path"] == path else e for e in project.ledger()]
    rewrite(project, entries)


def append(project: Project, entry: dict[str, object]) -> None:
    rewrite(project, [*project.ledger(), entry])


def rewrite(project: Project, entries: list[dict]) -> None:
    """The ledger anew, its chain too."""
    before, text = NOTHING, b""
    for entry in entries:
        line = json.dumps({**entry, "previous": before}, ensure_ascii=False).encode() + b"\n"
        before, text = hashlib.sha256(line).hexdigest(), text + line
    project.home.ledger.write_bytes(text)
