"""Whether what lies in a home is what the ledger says was made: chain, links, and every byte."""

import contextlib
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from colorfilter.documents import content_of
from colorfilter.errors import one_line
from colorfilter.files import file_sha256, lock
from colorfilter.progress import Progress, silent
from colorfilter.provenance import (
    MANIFEST,
    Content,
    artifact_key,
    canonical_json,
    content,
    read_manifest,
)
from colorfilter.shards import InputFile
from colorfilter.stages import ArtifactName, Stage
from resources.artifacts import ArtifactStore
from resources.home import Home
from resources.ledger import NOTHING, Entry, is_removed
from resources.lineage import Lineage, name_of
from resources.pruning import at_work, folders

THREADS = 4
WORKPLACE = "auditing"  # the folder for what an audit makes
READ = {Stage.RAW_CORPUS, Stage.DOMAIN_TEXT}  # what reads raw files
# What an entry of the ledger and the manifest that it is for both have.
IDENTITY = (
    "asset",
    "partition",
    "key",
    "recipe",
    "code",
    "seed",
    "precision",
    "experiment",
    "run",
    "facts",
)


@dataclass(frozen=True)
class Finding:
    """Something that does not hold; as a warning, something that cannot be shown to hold."""

    asset: str
    artefact: str  # the file, table or entry in which it was found
    expected: str
    found: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.asset}: {self.artefact}: expected {self.expected}, found {self.found}"


class Record:
    """The ledger of a home, read once to be checked and compared with."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        self._artifacts = artifacts
        self._root = artifacts.at.root
        self.lineage = Lineage(artifacts)
        self._links = list(artifacts.ledger.links())
        self._lines = {NOTHING: 0} | {link.sha256: link.number for link in self._links}
        self._first: dict[tuple[str, str], int] = {}
        # By path: the line in which it was entered last, and that in which it was made last.
        self._entered: dict[str, int] = {}
        self._made: dict[str, tuple[int, Entry]] = {}
        # Paths that must not be there: what they held was replaced or removed for good.
        self._gone: set[str] = set()
        # By path and fingerprint: the hashes of the manifests that it has had.
        self._manifests: dict[tuple[str, str], set[str]] = {}
        for number, entry in self._entries():
            held = entry["path"], entry["fingerprint"]
            self._gone.discard(entry["path"])
            if is_removed(entry):
                self._gone.add(entry["path"])
                continue
            if entry.get("replaces"):
                self._gone.add(entry["replaces"])
            self._first.setdefault((name_of(entry), entry["fingerprint"]), number)
            self._entered[entry["path"]] = number
            if entry.get("manifest"):
                self._manifests.setdefault(held, set()).add(entry["manifest"])
            if not entry["reused"] or entry["path"] not in self._made:
                self._made[entry["path"]] = number, entry

    def _entries(self) -> Iterator[tuple[int, Entry]]:
        return ((link.number, link.entry) for link in self._links if link.entry is not None)

    @property
    def head(self) -> str:
        """The hash of the last entry."""
        return self._links[-1].sha256 if self._links else NOTHING

    def chain(self, head: str | None = None) -> Iterator[Finding]:
        """Whether each entry holds the hash of the line before, and `head` is the hash of one."""
        unchained, chained = 0, False
        for number, _, before, entry in self._links:
            if entry is None:
                yield Finding("ledger", f"line {number}", "an entry", "none", warning=not chained)
                continue
            where = f"line {number} ({name_of(entry)})"
            wanted = "the sha256 of the line before"
            if "previous" not in entry and chained:
                yield Finding("ledger", where, wanted, "none")
            elif "previous" not in entry:
                unchained += 1
            else:
                chained = True
                if entry["previous"] != before:
                    yield Finding(
                        "ledger", where, f"{wanted}, {before[:16]}", str(entry["previous"])[:16]
                    )
        if unchained:
            words = f"{unchained} from before entries were chained"
            yield Finding("ledger", "its first lines", "chained entries", words, warning=True)
        if head is not None and not any(link.sha256.startswith(head) for link in self._links):
            yield Finding("ledger", "the head", f"an entry with the sha256 {head[:16]}", "none")

    def links(self, entries: Iterable[Entry]) -> Iterator[Finding]:
        """Whether each was made from what was entered before, and has the key of that work."""
        for entry in entries:
            name, number = name_of(entry), self._entered[entry["path"]]
            for source, fingerprint in self.lineage.made_from(entry):
                found = [
                    self._first[name_of(e), e["fingerprint"]]
                    for e in self.lineage.find(source, fingerprint)
                ]
                if not any(before < number for before in found):
                    wanted = f"an earlier entry of {source} {fingerprint[:16]}, which it is made of"
                    late = f"one entered later, in line {min(found)}" if found else "none"
                    yield Finding(name, "its entry", wanted, late)
            work = [entry[p] for p in ("inputs", "recipe", "code", "seed", "precision")]
            key = artifact_key(entry["asset"], entry["partition"], *work)
            path = self._artifacts.folder(entry["asset"], entry["partition"], key)
            if (entry["key"], self._root / entry["path"]) != (key, path):
                wanted = f"the key of its inputs, recipe, code and seed, {key[:16]}"
                yield Finding(name, "its entry", wanted, f"{entry['key'][:16]}, {entry['path']}")

    def reuse(self) -> Iterator[Finding]:
        """Whether what was taken up again had the content that was made."""
        last: dict[str, str] = {}
        for number, entry in self._entries():
            made = last.get(entry["path"])
            if not entry["reused"] or made is None:
                last[entry["path"]] = entry["fingerprint"]
            elif entry["fingerprint"] != made:
                where = f"line {number} of the ledger"
                found = f"{entry['fingerprint'][:16]} taken up again"
                yield Finding(name_of(entry), where, f"the {made[:16]} that was made", found)

    def files(self, entries: Collection[Entry], progress: Progress = silent) -> Iterator[Finding]:
        """Whether every file has the content that was recorded, and none is missing or too many.

        `progress` is called with the bytes that have been hashed.
        """
        there = [entry for entry in entries if entry["path"] not in self._gone]
        with ThreadPoolExecutor(THREADS) as threads:
            for found in threads.map(lambda e: list(self._folder(e, progress)), there):
                yield from found

    def _folder(self, entry: Entry, progress: Progress) -> Iterator[Finding]:
        name, folder = name_of(entry), self._root / entry["path"]
        where = f"{entry['path']}/{MANIFEST}"
        try:
            manifest = read_manifest(folder)
            listed = {file["path"]: file for file in manifest["files"]}
            held = content(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            found = "no file" if isinstance(error, FileNotFoundError) else f"no manifest ({error})"
            yield Finding(name, where, "the manifest", found)
            return
        number, made = self._made[entry["path"]]
        if held.fingerprint != made["fingerprint"]:
            wanted = f"files of the fingerprint {made['fingerprint'][:16]}"
            yield Finding(name, where, wanted, held.fingerprint[:16])
        manifests = self._manifests.get((made["path"], made["fingerprint"]))
        if manifests and held.manifest not in manifests:
            wanted = f"the sha256 {' or '.join(sorted(m[:16] for m in manifests))}"
            yield Finding(name, where, wanted, held.manifest[:16])
        for part, expected in self._identity(manifest, held).items():
            if canonical_json(expected) != canonical_json(made.get(part)):
                values = _brief(canonical_json(expected)), _brief(canonical_json(made.get(part)))
                yield Finding(name, f"{part} in its entry", *values)
        head = manifest.get("ledger")
        if head is not None and self._lines.get(head, number) >= number:
            wanted = f"the entry before it, {head[:16]}, in the ledger before line {number}"
            line = self._lines.get(head)
            yield Finding(name, where, wanted, f"it in line {line}" if line else "none")
        yield from self._contents(name, entry["path"], listed, progress)

    def _identity(self, manifest: Mapping[str, Any], held: Content) -> dict[str, Any]:
        """What the entry has to say by the manifest, as far as that says it itself."""
        if "key" not in manifest:  # from before manifests said what they are of
            return {"facts": manifest["facts"]}
        return {
            **{part: manifest[part] for part in IDENTITY},
            "inputs": _names(manifest["inputs"]),
            "sources": _names(manifest["sources"]),
            "bytes": held.bytes,
            "rows": held.rows,
        }

    def _contents(
        self, name: str, path: str, listed: dict[str, dict[str, Any]], progress: Progress
    ) -> Iterator[Finding]:
        folder = self._root / path
        there = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
        for extra in sorted(there - listed.keys() - {MANIFEST}):
            yield Finding(name, f"{path}/{extra}", "no file that the manifest lacks", "one")
        for file, made in listed.items():
            where = f"{path}/{file}"
            if file not in there:
                yield Finding(name, where, f"a file of {made['bytes']:,} bytes", "none")
                continue
            size = (folder / file).stat().st_size
            sha256 = file_sha256(folder / file)
            progress(size)
            if sha256 != made["sha256"]:
                wanted = f"{made['bytes']:,} bytes with the sha256 {made['sha256'][:16]}"
                yield Finding(name, where, wanted, f"{size:,} with {sha256[:16]}")

    def orphans(self) -> Iterator[Finding]:
        """Folders that the ledger does not have, not even by now, or says are gone for good."""
        there = list(folders(self._artifacts.at.artifacts))
        known = {entry["path"] for entry in self._artifacts.ledger}
        for folder in there:
            path = str(folder.relative_to(self._root))
            unknown = path not in known and (folder / MANIFEST).exists()
            if unknown and not at_work(self._artifacts, folder):
                asset = str(folder.parent.relative_to(self._artifacts.at.artifacts))
                yield Finding(asset, path, "an entry in the ledger", "none")
            if path in self._gone:
                asset = str(folder.parent.relative_to(self._artifacts.at.artifacts))
                yield Finding(asset, path, "no folder: it was replaced or removed for good", "one")


@contextlib.contextmanager
def workplace(home: Home) -> Iterator[Path]:
    """A folder for what an audit makes, one audit at a time; what a killed one has left goes."""
    folder = home.root / WORKPLACE
    with lock(home.leases / folder.name):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sizes(root: Path, entries: Iterable[Entry]) -> int:
    """Bytes of what the entries name, as far as it is there."""
    found = (root / entry["path"] for entry in entries)
    return sum(f.stat().st_size for d in found for f in d.rglob("*") if f.is_file())


def raw_files(
    root: Path, entries: Iterable[Entry], current: Collection[str], progress: Progress = silent
) -> Iterator[Finding]:
    """Whether raw files still are what was read; `progress` is called with bytes read.

    A file that has changed since is a warning where what was read of it is not `current` (by path)
    any more: its shard has been retired.
    """
    unknown = []
    for entry in entries:
        record = root / entry["path"] / "files.parquet"
        if not record.exists():
            if ArtifactName.parse(entry["asset"]).stage in READ and not entry["inputs"]:
                unknown.append(name_of(entry))
            continue
        for was in pl.read_parquet(record).iter_rows(named=True):
            file = InputFile(was["source"], was["path"], was["uri"], was["bytes"], "")
            wanted = f"{was['bytes']:,} bytes with the sha256 {was['sha256'][:16]}"
            try:
                now = content_of(file)
            except OSError as error:
                yield Finding(name_of(entry), was["uri"], wanted, one_line(error), warning=True)
                continue
            progress(now["bytes"])
            if now["sha256"] != was["sha256"]:
                found = f"{now['bytes']:,} with {now['sha256'][:16]}"
                retired = entry["path"] not in current
                yield Finding(name_of(entry), was["uri"], wanted, found, warning=retired)
    if unknown:
        words = f"none of {len(unknown)}, the first {unknown[0]}"
        yield Finding("raw files", "of shards and domains", "their sha256", words, warning=True)


def _names(inputs: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Fingerprints by name, of inputs as a manifest has them."""
    return {name_of(i): i["fingerprint"] for i in inputs}


def _brief(text: str) -> str:
    return text if len(text) < 100 else f"{text[:100]}..."
