"""Compare a home with its ledger: the hash chain, the links to inputs, and every file."""

import contextlib
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from colorfilter.data.documents import content_of
from colorfilter.data.shards import InputFile
from colorfilter.errors import one_line
from colorfilter.progress import Progress, silent
from colorfilter.stages import ArtifactName, Stage
from colorfilter.storage.files import file_sha256, lock
from colorfilter.storage.manifest import (
    MANIFEST,
    artifact_key,
    canonical_json,
    content,
    read_manifest,
)
from resources.artifacts import ArtifactStore
from resources.home import Home
from resources.ledger import NOTHING, Entry, is_removed
from resources.lineage import Lineage, name_of
from resources.pruning import at_work, folders
from resources.score_store import ScoreStore

READ = {Stage.RAW_CORPUS, Stage.DOMAIN_TEXT}  # stages that read raw files
WORKPLACE = "auditing"  # name of an audit's temporary folder
WORK = ("inputs", "recipe", "code", "seed", "precision")  # what a key depends on besides the name
# Fields that must be equal in a manifest and its ledger entry.
STATED = ("asset", "partition", "key", *WORK[1:], "experiment", "run", "facts")


@dataclass(frozen=True)
class Finding:
    """Something that an audit found to be wrong; a warning if it could not be verified."""

    asset: str
    artifact: str  # the file, table or entry with the difference
    expected: str
    found: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.asset}: {self.artifact}: expected {self.expected}, found {self.found}"


class Record:
    """The ledger of a home, read once, to check it and to compare the home with it."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        self.artifacts, self.home = artifacts, artifacts.at
        self.store, self.lineage = ScoreStore(home=artifacts.home), Lineage(artifacts)
        self._links = list(artifacts.ledger.links())
        self.head = self._links[-1].sha256 if self._links else NOTHING
        self._lines = {NOTHING: 0} | {link.sha256: link.number for link in self._links}
        # Line numbers and entries by path, oldest first.
        self._by_path: dict[str, list[tuple[int, Entry]]] = {}
        # The number of the first line by name and fingerprint.
        self._first: dict[tuple[str, str], int] = {}
        # Paths that must not exist: the artifact was replaced or permanently removed.
        self._gone: set[str] = set()
        for number, _, _, entry in self._links:
            if entry is not None:
                self._by_path.setdefault(entry["path"], []).append((number, entry))
                self._first.setdefault((name_of(entry), entry["fingerprint"]), number)
                self._gone.discard(entry["path"])
                gone = entry["path"] if is_removed(entry) else entry.get("replaces")
                if gone:
                    self._gone.add(gone)

    def chain(self, head: str | None = None) -> Iterator[Finding]:
        """Find entries without the hash of the line before them, and a `head` with no entry."""
        for number, _, before, entry in self._links:
            if entry is None:
                yield Finding("ledger", f"line {number}", "an entry", "none")
            elif (previous := entry.get("previous")) != before:
                where = f"line {number} ({name_of(entry)})"
                wanted = f"the sha256 of the line before, {before[:16]}"
                yield Finding("ledger", where, wanted, str(previous or "none")[:16])
        if head is not None and not any(link.sha256.startswith(head) for link in self._links):
            yield Finding("ledger", "the head", f"an entry with the sha256 {head[:16]}", "none")

    def links(self, entries: Iterable[Entry]) -> Iterator[Finding]:
        """Find entries whose inputs were not recorded earlier, or whose key does not match."""
        for entry in entries:
            name, (number, _) = name_of(entry), self._by_path[entry["path"]][-1]
            for source, fingerprint in self.lineage.made_from(entry):
                found = self.lineage.find(source, fingerprint)
                first = min((self._first[name_of(e), e["fingerprint"]] for e in found), default=0)
                if not 0 < first < number:
                    wanted = f"an earlier entry of its input {source} {fingerprint[:16]}"
                    late = f"a later one, in line {first}" if first else "none"
                    yield Finding(name, "its entry", wanted, late)
            key = artifact_key(entry["asset"], entry["partition"], *(entry[w] for w in WORK))
            path = self.artifacts.folder(entry["asset"], entry["partition"], key)
            if (entry["key"], self.home.root / entry["path"]) != (key, path):
                wanted = f"the key of its inputs, recipe, code and seed, {key[:16]}"
                yield Finding(name, "its entry", wanted, f"{entry['key'][:16]}, {entry['path']}")

    def reuse(self) -> Iterator[Finding]:
        """Find artifacts that were reused with content other than was built."""
        for lines in self._by_path.values():
            _, made = lines[0]
            for number, entry in lines:
                if not entry["reused"]:
                    made = entry
                elif entry["fingerprint"] != made["fingerprint"]:
                    wanted = f"the fingerprint {made['fingerprint'][:16]} that was built"
                    found = f"{entry['fingerprint'][:16]} reused"
                    yield Finding(name_of(entry), f"line {number} of the ledger", wanted, found)

    def files(self, entries: Collection[Entry], progress: Progress = silent) -> Iterator[Finding]:
        """Find missing, extra and changed files; `progress` is called with the bytes hashed."""
        there = [entry for entry in entries if entry["path"] not in self._gone]
        with ThreadPoolExecutor(4) as threads:
            for found in threads.map(lambda e: list(self._folder(e, progress)), there):
                yield from found

    def _folder(self, entry: Entry, progress: Progress) -> Iterator[Finding]:
        name, folder = name_of(entry), self.home.root / entry["path"]
        where = f"{entry['path']}/{MANIFEST}"
        try:
            manifest = read_manifest(folder)
            before, held = manifest["ledger"], content(folder)
            stated = {part: manifest[part] for part in STATED}
            stated |= {"bytes": held.bytes, "rows": held.rows}
            for part in ("inputs", "sources"):
                stated[part] = {name_of(source): source["fingerprint"] for source in manifest[part]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            found = "no file" if isinstance(error, FileNotFoundError) else f"no manifest ({error})"
            yield Finding(name, where, "the manifest", found)
            return
        lines = self._by_path[entry["path"]]
        number, made = next((line for line in lines[::-1] if not line[1]["reused"]), lines[0])
        fingerprint = made["fingerprint"]
        if held.fingerprint != fingerprint:
            wanted = f"files with the fingerprint {fingerprint[:16]}"
            yield Finding(name, where, wanted, held.fingerprint[:16])
        manifests = {str(e.get("manifest")) for _, e in lines if e["fingerprint"] == fingerprint}
        if held.manifest not in manifests:
            wanted = f"the sha256 {' or '.join(sorted(m[:16] for m in manifests))}"
            yield Finding(name, where, wanted, held.manifest[:16])
        for part, value in stated.items():
            expected, found = canonical_json(value), canonical_json(made.get(part))
            if expected != found:
                yield Finding(name, f"{part} in its entry", _brief(expected), _brief(found))
        line = self._lines.get(before)
        if line is None or line >= number:
            wanted = f"the entry before it, {before[:16]}, in the ledger before line {number}"
            yield Finding(name, where, wanted, "none" if line is None else f"it in line {line}")
        yield from self._contents(entry, manifest["files"], progress)

    def _contents(self, entry: Entry, files: list[Any], progress: Progress) -> Iterator[Finding]:
        """Compare the files of an artifact with those that its manifest lists."""
        name, path, folder = name_of(entry), entry["path"], self.home.root / entry["path"]
        listed = {file["path"]: file for file in files}
        there = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
        for extra in sorted(there - listed.keys() - {MANIFEST}):
            yield Finding(name, f"{path}/{extra}", "no file that is not in the manifest", "one")
        for file, made in listed.items():
            if file not in there:
                yield Finding(name, f"{path}/{file}", f"a file of {made['bytes']:,} bytes", "none")
                continue
            size, sha256 = (folder / file).stat().st_size, file_sha256(folder / file)
            progress(size)
            if sha256 != made["sha256"]:
                wanted, found = _content(made), _content({"bytes": size, "sha256": sha256})
                yield Finding(name, f"{path}/{file}", wanted, found)

    def raw_files(
        self, entries: Iterable[Entry], current: Collection[str], progress: Progress = silent
    ) -> Iterator[Finding]:
        """Find raw files that have changed since they were read.

        `progress` is called with the bytes read. A finding is a warning if the path of the
        artifact is not in `current`, because its shard was retired.
        """
        for entry in entries:
            name, retired = name_of(entry), entry["path"] not in current
            table = self.home.root / entry["path"] / "files.parquet"
            if not table.exists():
                if ArtifactName.parse(name).stage in READ and not entry["inputs"]:
                    yield Finding(name, entry["path"], "raw files' sha256", "none", warning=True)
                continue
            for was in pl.read_parquet(table).iter_rows(named=True):
                file = InputFile(was["source"], was["path"], was["uri"], was["bytes"], "")
                try:
                    now = content_of(file)
                except OSError as error:
                    yield Finding(name, file.uri, _content(was), one_line(error), warning=True)
                    continue
                progress(now["bytes"])
                if now["sha256"] != was["sha256"]:
                    yield Finding(name, file.uri, _content(was), _content(now), warning=retired)

    def orphans(self) -> Iterator[Finding]:
        """Find folders that are not in the ledger, or that it records as permanently removed.

        The ledger is read again, so that artifacts recorded during the audit are not reported.
        """
        there = list(folders(self.home.artifacts))
        known = {entry["path"] for entry in self.artifacts.ledger}
        for folder in there:
            path = str(folder.relative_to(self.home.root))
            asset = str(folder.parent.relative_to(self.home.artifacts))
            unknown = path not in known and (folder / MANIFEST).exists()
            if unknown and not at_work(self.artifacts, folder):
                yield Finding(asset, path, "an entry in the ledger", "none")
            if path in self._gone:
                yield Finding(
                    asset, path, "no folder: it was replaced or permanently removed", "one"
                )


@contextlib.contextmanager
def workplace(home: Home) -> Iterator[Path]:
    """Yield an audit's temporary folder, emptied first; other audits wait until it is removed."""
    folder = home.root / WORKPLACE
    with lock(home.leases / folder.name):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _content(file: Mapping[str, Any]) -> str:
    return f"{file['bytes']:,} bytes with the sha256 {file['sha256'][:16]}"


def _brief(text: str) -> str:
    return text if len(text) < 100 else f"{text[:100]}..."
