"""The artifact store: build each artifact once, and record in the ledger what it was built from.

An artifact is a folder named by its key. It exists once its `manifest.json`, which is written last,
exists. Until then the folder contains the partial work of an interrupted attempt, from which the
next attempt resumes. The manifest states what the artifact is and what it was built from. The
ledger records the manifest's hash.
"""

import contextlib
import hashlib
import resource
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import dagster as dg
import polars as pl
import yaml
from pydantic import PrivateAttr

from colorfilter.errors import InputError, UnreachableError
from colorfilter.storage import manifest
from colorfilter.storage.files import lock, write_atomically
from resources.home import Home
from resources.ledger import Entries, Entry, Ledger, ledger_at

ROWS = "tokens/sequences.parquet"  # the table of a dataset's rows
RECIPE = "recipe"  # the asset name of the artifact that stores a run's recipe
HELD = ("manifest", "bytes", "rows", "run")


@dataclass(frozen=True)
class Artifact:
    """An existing artifact: its identity, folder, inputs and facts."""

    asset: str
    partition: str | None
    key: str
    fingerprint: str
    path: Path
    facts: dict[str, Any]
    inputs: dict[str, str]  # fingerprints by name
    reused: bool = False
    manifest: str | None = None  # sha256 of manifest.json
    bytes: int | None = None
    rows: int | None = None  # of all Parquet files
    run: str | None = None  # id of the Dagster run that built it

    @property
    def name(self) -> str:
        return self.asset if self.partition is None else f"{self.asset}[{self.partition}]"

    def part(self, folder: str) -> "Artifact":
        """Return a subfolder as an input; other files do not affect its fingerprint."""
        content = manifest.content(self.path, folder)
        return replace(
            self, asset=f"{self.asset}/{folder}", path=self.path / folder, **content._asdict()
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What the manifests of artifacts built from this one record about it."""
        names = ("asset", "partition", "fingerprint", *HELD)
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Work:
    """An artifact to build: everything that its key is computed from.

    `sources` are inputs that are recorded but are not part of the key, so that an artifact drawn
    from them once stays valid when they change.
    """

    asset: str
    partition: str | None = None
    inputs: Sequence[Artifact] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    code: int = 1
    seed: int | None = None
    precision: str | None = None
    sources: Sequence[Artifact] = ()

    @property
    def input_fingerprints(self) -> dict[str, str]:
        return {a.name: a.fingerprint for a in self.inputs}

    @property
    def key(self) -> str:
        return manifest.artifact_key(
            self.asset,
            self.partition,
            self.input_fingerprints,
            self.recipe,
            self.code,
            self.seed,
            self.precision,
        )


class Attempt:
    """A unit of work whose lease is held: the artifact exists, or is to be built in `folder`."""

    def __init__(self, store: "ArtifactStore", work: Work) -> None:
        self._store = store
        self.work = work
        self.key = work.key
        self.folder = store.folder(work.asset, work.partition, self.key)
        self._lease = lock(store.at.leases / self.key)
        self.standing = store.standing(work, self.key, self.folder)
        if self.standing:
            self.release()
        else:
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def artifact(self) -> Artifact:
        """The artifact, which existed before or was committed by this attempt."""
        assert self.standing is not None
        return self.standing

    def commit(self, facts: Mapping[str, Any]) -> Artifact:
        """Write the manifest, which completes the artifact, and enter it in the ledger."""
        content = manifest.write_manifest(
            self.folder, facts, self._store.identity(self.work, self.key)
        )
        self.standing = Artifact(
            asset=self.work.asset,
            partition=self.work.partition,
            key=self.key,
            path=self.folder,
            facts=dict(facts),
            inputs=self.work.input_fingerprints,
            run=self._store.run_id,
            **content._asdict(),
        )
        self._store.record(self.work, self.standing)
        self.release()
        return self.standing

    def abandon(self) -> None:
        """Remove the folder: the input was invalid, so there is nothing to resume from."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # stops at the first parent that is not empty
            for parent in self.folder.parents:
                parent.rmdir()
        self.release()

    def release(self) -> None:
        """Release the lease."""
        self._lease.close()


class ArtifactStore(dg.ConfigurableResource):
    """The artifacts of a home and their ledger.

    `recipe` is the text of the recipe. Every run stores it as an artifact.
    """

    home: str
    recipe: str = ""

    _run: IO[bytes] | None = PrivateAttr(default=None)
    _run_id: str | None = PrivateAttr(default=None)
    _recipe: str | None = PrivateAttr(default=None)

    @property
    def run_id(self) -> str | None:
        """The id of the Dagster run that uses this resource."""
        return self._run_id

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Create the home if it does not exist, lock the run's lease, and store the recipe.

        The lock shows other processes that the run's process is alive. Raises InputError for a
        home that belongs to another recipe.
        """
        if self.recipe:
            self.at.claim(yaml.safe_load(self.recipe)["name"])
        if context.run:
            self._run_id = context.run.run_id
            self._run = lock(self.at.run_lease(context.run.run_id))
            try:
                # Such a command checks the leases of runs after it has announced itself.
                self.at.refuse_exclusive()
            except InputError:
                self.teardown_after_execution(context)
                raise
        if self.recipe:
            work = Work(RECIPE, recipe={"text": self.recipe})
            self._recipe = self.make(work, self._write_recipe).fingerprint

    def _write_recipe(self, folder: Path) -> dict[str, Any]:
        (folder / "recipe.yaml").write_text(self.recipe, encoding="utf-8")
        return {}

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:  # noqa: ARG002
        """Release the run's lease."""
        if self._run:
            Path(self._run.name).unlink(missing_ok=True)
            self._run.close()

    @property
    def at(self) -> Home:
        return Home(self.home)

    def folder(self, asset: str, partition: str | None, key: str) -> Path:
        """Return an artifact's folder, existing or not; its last version if it was replaced."""
        parent = self.at.artifacts / asset
        first = (parent / partition if partition else parent) / key[:16]
        return self.at.root / self.ledger.last_version(str(first.relative_to(self.at.root)))

    def make(self, work: Work, build: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """Return the artifact of this work, built by `build(folder) -> facts` if it does not exist.

        A lease serializes requests for the same key: the second waits and then reuses the
        artifact. If a build raises InputError, its folder is removed. After any other failure the
        folder is kept, and the next attempt resumes from it.
        """
        with self.attempts([work]) as (attempt,):
            return attempt.standing or attempt.commit(build(attempt.folder))

    @contextlib.contextmanager
    def attempts(self, works: Sequence[Work]) -> Iterator[list[Attempt]]:
        """Yield attempts at several works, with their leases held; the caller builds and commits.

        An InputError abandons attempts that are not committed. After any other failure, which
        includes UnreachableError, their folders are kept for the next attempt.
        """
        _allow_open_files()
        with contextlib.ExitStack() as leases:
            attempts = []
            for work in works:
                attempts.append(Attempt(self, work))
                leases.callback(attempts[-1].release)
            try:
                yield attempts
            except UnreachableError:
                raise
            except InputError:
                for attempt in attempts:
                    if not attempt.standing:
                        attempt.abandon()
                raise

    def standing(self, work: Work, key: str, folder: Path) -> Artifact | None:
        if not manifest.stands(folder):
            return None
        read = manifest.read_manifest(folder)
        artifact = Artifact(
            asset=work.asset,
            partition=work.partition,
            key=key,
            path=folder,
            facts=read["facts"],
            inputs=work.input_fingerprints,
            reused=True,
            run=read.get("run"),
            **manifest.content(folder)._asdict(),
        )
        current = self.entries().get((work.asset, work.partition))
        # The manifest differs if a run rebuilt the artifact but was killed before recording it.
        known = current and (current["key"], current.get("manifest") or artifact.manifest)
        if known != (key, artifact.manifest):
            self.record(work, artifact)
        return artifact

    def current(self, asset: str, partition: str | None = None) -> Artifact:
        """Return the current artifact of an asset's partition.

        Raises InputError if it does not exist yet or its files are missing.
        """
        entry = self.entries().get((asset, partition))
        name = asset if partition is None else f"{asset}[{partition}]"
        if entry is None:
            raise InputError(f"{name} does not exist yet; materialize it first")
        path = self.at.root / entry["path"]
        if not manifest.stands(path):
            raise InputError(f"{name}: files at {path} are missing; materialize it again")
        return Artifact(
            asset,
            partition,
            entry["key"],
            entry["fingerprint"],
            path,
            entry["facts"],
            entry["inputs"],
            reused=True,
            **{name: entry.get(name) for name in HELD},
        )

    def current_from(
        self, asset: str, partition: str | None, inputs: Sequence[Artifact]
    ) -> Artifact:
        """Return the current artifact, which must have been built from these inputs.

        Raises InputError if it was built from other versions of them.
        """
        artifact = self.current(asset, partition)
        for made_from in inputs:
            if artifact.inputs.get(made_from.name) != made_from.fingerprint:
                raise InputError(
                    f"{artifact.name}: was not built from the current {made_from.name}; "
                    "materialize it again"
                )
        return artifact

    @property
    def ledger(self) -> Ledger:
        return ledger_at(self.at.ledger)

    def entries(self) -> Entries:
        """Return the current ledger entry by asset and partition."""
        return self.ledger.current()

    def is_behind(self, entry: Mapping[str, Any]) -> bool:
        """Whether an artifact is out of date: an input has another fingerprint now."""
        return any(self._fingerprint(name) != was for name, was in entry["inputs"].items())

    def _fingerprint(self, name: str) -> str | None:
        """Return the current fingerprint of an artifact or a part of one; None if missing."""
        asset, _, partition = name.removesuffix("]").partition("[")
        entry = self.entries().get((asset, partition or None))
        if entry:
            return str(entry["fingerprint"])
        whole, _, part = asset.rpartition("/")
        entry = self.entries().get((whole, None))
        path = entry and self.at.root / entry["path"]
        if path and manifest.stands(path):
            return manifest.content(path, part).fingerprint
        return None

    def identity(self, work: Work, key: str) -> dict[str, Any]:
        """Return what the manifest states: the identity of the artifact and of its inputs.

        `ledger` is the ledger's head, the hash that covers all earlier entries.
        """
        return {
            "asset": work.asset,
            "partition": work.partition,
            "key": key,
            "inputs": [a.identity for a in work.inputs],
            "sources": [a.identity for a in work.sources],
            **_key_settings(work),
            "experiment": self._recipe,
            "run": self.run_id,
            "environment": manifest.environment(),
            "ledger": self.ledger.head(),
        }

    def replace(self, entry: Entry, write: Callable[[Path, Path], Collection[str]]) -> None:
        """Replace an artifact by a new version and record the new version in the ledger.

        `write(old, new)` writes the new folder and returns the files that differ. The key and the
        fingerprint do not change, so artifacts built from this one stay valid. After an
        interruption, the same call completes the replacement. The caller removes the old folder.
        """
        old = self.at.root / entry["path"]
        name = hashlib.sha256(f"{entry['key']} replaces {entry['path']}".encode()).hexdigest()
        new = old.with_name(name[:16])
        read = manifest.read_manifest(old)
        if not manifest.stands(new):
            differ = set(write(old, new))
            origins = {
                file["path"]: file.get("origin", file["sha256"])
                for file in read["files"]
                if "origin" in file or file["path"] in differ
            }
            identity = {k: v for k, v in read.items() if k not in {"facts", "files"}}
            manifest.write_manifest(
                new, read["facts"], {**identity, "ledger": self.ledger.head()}, origins
            )
        path = str(new.relative_to(self.at.root))
        if self.ledger.last_version(entry["path"]) != path:
            content = manifest.content(new)._asdict()
            parts = manifest.parts(new)
            self._record_change(entry, path=path, replaces=entry["path"], parts=parts, **content)

    def remove(self, entry: Entry) -> None:
        """Record that an artifact is permanently removed, and remove its folder.

        Backups of the home remove it too.
        """
        folder = self.at.root / entry["path"]
        if not entry.get("removed"):
            parts = entry.get("parts")
            if parts is None and (folder / manifest.MANIFEST).exists():
                parts = manifest.parts(folder)
            self._record_change(entry, removed=True, parts=parts)
        self.discard(folder)

    def discard(self, folder: Path) -> None:
        """Remove a folder, its manifest first, so that a partly removed folder is not an artifact.

        A dataset's table of rows, which contains no text, is kept in the home: it is needed to find
        the models that were trained on a row.
        """
        table = folder / ROWS
        if table.exists() and (folder / manifest.MANIFEST).exists():
            kept = self.at.rows / f"{manifest.content(folder).fingerprint}.parquet"
            kept.parent.mkdir(exist_ok=True)
            temporary = kept.with_suffix(".tmp")
            pl.read_parquet(table, columns=["row", "shard", "position", "sha256"]).write_parquet(
                temporary, compression="zstd"
            )
            write_atomically(temporary, kept)
        (folder / manifest.MANIFEST).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)

    def rows_of(self, dataset: Entry) -> pl.DataFrame | None:
        """Return a dataset's row, shard, position and sha256, even if its folder was removed.

        Returns None if it was removed by a version that did not keep these tables.
        """
        here = self.at.root / dataset["path"] / ROWS
        kept = self.at.rows / f"{dataset['fingerprint']}.parquet"
        for table in (here, kept):
            if table.exists():
                return pl.read_parquet(table, columns=["row", "shard", "position", "sha256"])
        return None

    def _record_change(self, entry: Entry, **changes: Any) -> None:
        """Append a copy of an entry, with changes, to the ledger."""
        changed = {**entry, "reused": True, **changes, "recorded": _now()}
        changed.pop("previous", None)
        self.ledger.append(changed)

    def record(self, work: Work, artifact: Artifact) -> None:
        """Enter an artifact in the ledger."""
        self.ledger.append(
            {
                **asdict(artifact),
                "path": str(artifact.path.relative_to(self.at.root)),
                "parts": manifest.parts(artifact.path),
                "sources": {a.name: a.fingerprint for a in work.sources},
                **_key_settings(work),
                "experiment": self._recipe,
                "environment": manifest.environment(),
                "recorded": _now(),
            }
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _key_settings(work: Work) -> dict[str, Any]:
    """Return what enters the key of a work in addition to its inputs."""
    return {
        "recipe": dict(work.recipe),
        "code": work.code,
        "seed": work.seed,
        "precision": work.precision,
    }


def _allow_open_files() -> None:
    """Raise the limit on open files to the allowed maximum: there is an open lease per shard."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
