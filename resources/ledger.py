"""The ledger: an append-only file that records what every artifact was built from.

It has a line of JSON for every artifact that was built or reused. A line can also record that an
artifact was replaced by a version with the same key and fingerprint (`replaces`), or permanently
removed (`removed`). The current artifact of an asset's partition is that of its last line, unless
that line removes it or replaces an older one. Each entry contains the sha256 of the line before it,
so an edited, deleted or moved line breaks the chain. Whoever edits a line and recomputes all later
hashes changes the head, the hash of the last line. The head is printed, and every manifest records
the head at the time that it was written.
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
# Entries by asset and partition.
Entries = dict[tuple[str, str | None], Entry]

NOTHING = "0" * 64  # the hash before the first entry


class Link(NamedTuple):
    """A line of the ledger: its number and sha256, the sha256 of the line before, and its entry.

    `entry` is None if the line is not a valid entry.
    """

    number: int
    sha256: str
    before: str
    entry: Entry | None


class Ledger:
    """The ledger in a file. `current` and `last_version` read only lines that are new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reading = _Reading()

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over all entries, oldest first. A line cut off by a crash is skipped."""
        return (link.entry for link in self.links() if link.entry is not None)

    def links(self) -> Iterator[Link]:
        """Yield all complete lines as links, oldest first."""
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
        """Return the current entry of every asset's partition."""
        return self._read().entries

    def last_version(self, path: str) -> str:
        """Return the path of the last version of the artifact that was at `path`."""
        replaced = self._read().replaced
        while path in replaced:
            path = replaced[path]
        return path

    def by_path(self) -> dict[str, Entry]:
        """Return the last entry of every artifact, by the path of its folder."""
        return {entry["path"]: entry for entry in self}

    def head(self) -> str:
        """Return the hash of the last entry, which depends on every entry before it."""
        if not self.path.exists():
            return NOTHING
        with self.path.open("rb") as stream:
            return _sha256(last_line(stream)[1])

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append an entry and flush it to disk. A lock admits one writer at a time."""

        def chained(last: bytes) -> str:
            return json.dumps({"previous": _sha256(last), **entry}, ensure_ascii=False, default=str)

        append_line(self.path, chained)

    def _read(self) -> "_Reading":
        """Read new lines, and return the current state."""
        if not self.path.exists():
            return _Reading()
        reading = self._reading
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) == (reading.stop, reading.written):
            return reading
        with self.path.open("rb") as stream:
            stream.seek(reading.stop - len(reading.tail))
            before = stream.read(len(reading.tail))
            if before != reading.tail or now.st_size <= reading.stop:  # the file was rewritten
                reading = _Reading()
                stream.seek(0)
            appended = stream.read()
        complete = appended[: appended.rfind(b"\n") + 1]
        stop, tail = reading.stop + len(complete), complete[-4096:] or reading.tail
        # Copies, because callers may be iterating over the old dictionaries.
        new = _Reading(stop, now.st_mtime_ns, tail, dict(reading.entries), dict(reading.replaced))
        for line in complete.splitlines():
            entry = _parsed(line)
            if entry is not None:
                new.enter(entry)
        self._reading = new
        return new


@functools.cache
def ledger_at(path: Path) -> Ledger:
    """Return the ledger of a file, one per process: resources are recreated at every tick."""
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
    """Whether an entry records that an artifact was permanently removed.

    Ledgers of home format 1 record it as `withdrawn: "whole"`.
    """
    return bool(entry.get("removed")) or entry.get("withdrawn") == "whole"


@dataclass
class _Reading:
    """What a ledger said when it was read: up to which offset and at which modification time.

    `tail` holds the last bytes before the offset, to detect that the file was rewritten.
    """

    stop: int = 0
    written: int = 0
    tail: bytes = b""
    entries: Entries = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)

    def enter(self, entry: Entry) -> None:
        """Apply the next entry."""
        key = entry["asset"], entry["partition"]
        earlier = entry.get("replaces")
        if earlier:
            self.replaced[earlier] = entry["path"]
        was_current = self.entries.get(key, {}).get("path") == (earlier or entry.get("path"))
        if is_removed(entry):
            if was_current:
                del self.entries[key]
        # A version that replaces an older artifact does not become current.
        elif was_current or not (earlier or entry.get("withdrawn")):
            self.entries[key] = entry
