"""The lineage of artifacts: which was built from which, according to the ledger."""

import contextlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from colorfilter.storage.manifest import content
from resources.artifacts import RECIPE, ArtifactStore
from resources.ledger import Entry, Ledger


def name_of(entry: Mapping[str, Any]) -> str:
    """Return an artifact's name: the asset, followed by any partition in brackets."""
    partition = entry["partition"]
    return str(entry["asset"] if partition is None else f"{entry['asset']}[{partition}]")


def _where_it_is(entry: Entry, ledger: Ledger) -> Entry:
    """Return an entry with the path of the artifact's last version."""
    path = ledger.last_version(entry["path"])
    return entry if path == entry["path"] else {**entry, "path": path}


class Lineage:
    """All entries of the ledger, to trace artifacts back to what they were built from."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        self._root = artifacts.at.root
        self._current = artifacts.entries()
        self._entries = [_where_it_is(entry, artifacts.ledger) for entry in artifacts.ledger]
        self._made: dict[str, dict[str, Entry]] = {}
        for entry in self._entries:
            self._made.setdefault(name_of(entry), {})[entry["fingerprint"]] = entry

    def current(self, shards: Collection[str]) -> list[Entry]:
        """Return the current artifacts, without those of retired shards.

        `shards` are the current shards of the corpus.
        """
        corpus = {partition for asset, partition in self._current if asset == "raw_corpus"}
        return [
            entry
            for (_, partition), entry in self._current.items()
            if partition in shards or partition not in corpus
        ]

    def versions(self, name: str) -> list[Entry]:
        """Return the last entry of each content that an artifact has had, oldest first."""
        return sorted(self._made.get(name, {}).values(), key=lambda e: str(e["recorded"]))

    def of(self, asset: str) -> list[Entry]:
        """Return the last entry of each content of an asset, of all partitions."""
        made = (e for contents in self._made.values() for e in contents.values())
        return [entry for entry in made if entry["asset"] == asset]

    def newest_first(self) -> list[Entry]:
        """Return all entries, newest first."""
        return self._entries[::-1]

    def as_of(self, later: Entry, name: str) -> Entry | None:
        """Return the entry of the input `name` of `later`, as recorded when `later` was built.

        The same content may have been rebuilt since, from other inputs.
        """
        fingerprint = {**later.get("sources", {}), **later["inputs"]}.get(name)
        found = None
        for entry in self._entries:
            if entry["fingerprint"] == fingerprint and name_of(entry) == name:
                found = entry
            if entry == later:
                break
        return found

    def find(self, name: str, fingerprint: str) -> list[Entry]:
        """Return the last entry with this name and content, or an empty list.

        If `name` is a part of an artifact, returns an entry for each artifact that contains the
        part with this content.
        """
        whole = self._made.get(name, {}).get(fingerprint)
        if whole:
            return [whole]
        asset, _, partition = name.removesuffix("]").partition("[")
        asset, _, folder = asset.rpartition("/")
        found = self._made.get(f"{asset}[{partition}]" if partition else asset, {})
        return [e for e in found.values() if self._part(e, folder) == fingerprint]

    def whole(self, name: str, fingerprint: str, before: str) -> Entry | None:
        """Return the entry with this name and content, or one that contains it as a part.

        If several contain it, the last one recorded by the time `before` is preferred. Returns
        None if there is no such entry.
        """
        return max(
            reversed(self.find(name, fingerprint)),
            key=lambda entry: (entry["recorded"] <= before, entry["recorded"]),
            default=None,
        )

    def _part(self, entry: Entry, folder: str) -> str | None:
        """Return the fingerprint of an artifact's subfolder, from its files if not recorded."""
        if entry.get("parts") is not None:
            return dict(entry["parts"]).get(folder)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return content(self._root / entry["path"], folder).fingerprint
        return None

    def made_from(self, entry: Entry) -> list[tuple[str, str]]:
        """Return names and fingerprints of an entry's inputs, sources and recipe."""
        recipe = [(RECIPE, entry["experiment"])] if entry.get("experiment") else []
        return [*entry["inputs"].items(), *entry["sources"].items(), *recipe]

    def ancestry(self, entries: Iterable[Entry]) -> dict[str, Entry]:
        """Return these entries and everything that they were built from, by path."""
        found: dict[str, Entry] = {}
        waiting = list(entries)
        while waiting:
            entry = waiting.pop()
            if entry["path"] not in found:
                found[entry["path"]] = entry
                for name, fingerprint in self.made_from(entry):
                    waiting += self.find(name, fingerprint)
        return found
