"""The ledger: what was made from what, exact per partition, in a file that is only appended to.

A line of JSON for every artifact made or taken up again; the last line of an asset's partition says
what is current. A line may also say that another version `replaces` an artifact, with the same key
and fingerprint, or that one was `removed` for good. Each entry holds the sha256 of the line before
it, so one that is edited, dropped or moved breaks the chain. Whoever makes the chain anew from
there changes its head, the hash of the last line: that is printed, and is in the manifest of every
artifact made after.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from colorfilter.storage.files import append_line, last_line

Entry = dict[str, Any]
# By asset and partition.
Entries = dict[tuple[str, str | None], Entry]

NOTHING = "0" * 64  # the hash before the first entry


class Link(NamedTuple):
    """An entry in its place of the chain: its line's number and hash, and that of the one before.

    `entry` is None where the line is not one.
    """

    number: int
    sha256: str
    before: str
    entry: Entry | None


class Ledger:
    """The ledger in a file. Keeps what it has read, so that only new lines are read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reading = _Reading()

    def __iter__(self) -> Iterator[Entry]:
        """All entries, oldest first. A line cut off by a crash is passed over."""
        return (link.entry for link in self.links() if link.entry is not None)

    def links(self) -> Iterator[Link]:
        """All lines in their places, oldest first."""
        if not self.path.exists():
            return
        before = NOTHING
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    return
                sha256 = _sha256(line)
                yield Link(number, sha256, before, _parsed(line))
                before = sha256

    def current(self) -> Entries:
        """The current entry of every asset's partition."""
        return self._read().entries

    def last_version(self, path: str) -> str:
        """The path of the last version of an artifact that was at `path`."""
        replaced = self._read().replaced
        while path in replaced:
            path = replaced[path]
        return path

    def by_path(self) -> dict[str, Entry]:
        """The last entry of every artifact's folder."""
        return {entry["path"]: entry for entry in self}

    def head(self) -> str:
        """The hash of the last entry: with all before in it."""
        if not self.path.exists():
            return NOTHING
        with self.path.open("rb") as stream:
            return _sha256(last_line(stream)[1])

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add an entry, flushed to disk, one writer at a time."""

        def chained(last: bytes) -> str:
            return json.dumps({"previous": _sha256(last), **entry}, ensure_ascii=False, default=str)

        append_line(self.path, chained)

    def _read(self) -> "_Reading":
        """What the ledger says by now."""
        if not self.path.exists():
            return _Reading()
        reading = self._reading
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) == (reading.stop, reading.written):
            return reading
        with self.path.open("rb") as stream:
            stream.seek(reading.stop - len(reading.tail))
            before = stream.read(len(reading.tail))
            if before != reading.tail or now.st_size <= reading.stop:  # written anew
                reading = _Reading()
                stream.seek(0)
            appended = stream.read()
        whole = appended[: appended.rfind(b"\n") + 1]
        stop, tail = reading.stop + len(whole), whole[-4096:] or reading.tail
        # Copies: whoever has the old ones may be going through them.
        new = _Reading(stop, now.st_mtime_ns, tail, dict(reading.entries), dict(reading.replaced))
        for line in whole.splitlines():
            entry = _parsed(line)
            if entry is not None:
                new.enter(entry)
        self._reading = new
        return new


@functools.cache
def ledger_at(path: Path) -> Ledger:
    """The ledger in a file, one for all of the process: Dagster makes resources anew each tick."""
    return Ledger(path)


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest() if line else NOTHING


def _parsed(line: bytes) -> Entry | None:
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict) and "asset" in entry:
            return entry
    return None


def is_removed(entry: Entry) -> bool:
    """Whether an entry says that an artifact was removed for good.

    Ledgers of home format 1 say it in another way.
    """
    return bool(entry.get("removed")) or entry.get("withdrawn") == "whole"


@dataclass
class _Reading:
    """How far a ledger was read and when it was written, the bytes before, and what they said."""

    stop: int = 0
    written: int = 0
    tail: bytes = b""
    entries: Entries = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)

    def enter(self, entry: Entry) -> None:
        """Take up the next entry."""
        place = entry["asset"], entry["partition"]
        earlier = entry.get("replaces")
        if earlier:
            self.replaced[earlier] = entry["path"]
        was_current = self.entries.get(place, {}).get("path") == (earlier or entry.get("path"))
        if is_removed(entry):
            if was_current:
                del self.entries[place]
        elif was_current or not (earlier or entry.get("withdrawn")):
            self.entries[place] = entry
