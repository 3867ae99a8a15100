"""Artifacts and the ledger: what was made from what, exact per partition, and made only once.

An artifact is a folder named by its key. It stands once its `manifest.json`, written last, is
there; until then the same folder holds what an interrupted attempt left, and the next one goes on
from that. The manifest says what it is and what it was made from; the ledger has the manifest's
hash.
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
RECIPE = "recipe"  # the artifact that a run's recipe is kept as
HELD = ("manifest", "bytes", "rows", "run")


@dataclass(frozen=True)
class Artifact:
    """A made thing: its identity, where it lies, what it was made from, and facts about it."""

    asset: str
    partition: str | None
    key: str
    fingerprint: str
    path: Path
    facts: dict[str, Any]
    inputs: dict[str, str]  # fingerprints by name
    reused: bool = False
    manifest: str | None = None  # its sha256
    bytes: int | None = None
    rows: int | None = None  # of its Parquet files
    run: str | None = None  # of Dagster, that made it

    @property
    def name(self) -> str:
        return self.asset if self.partition is None else f"{self.asset}[{self.partition}]"

    def part(self, folder: str) -> "Artifact":
        """A folder of it as an input: what lies beside that does not change the fingerprint."""
        content = manifest.content(self.path, folder)
        return replace(
            self, asset=f"{self.asset}/{folder}", path=self.path / folder, **content._asdict()
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What whatever is made from it has on record."""
        names = ("asset", "partition", "fingerprint", *HELD)
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Work:
    """What is to be made: all that its key is computed from.

    `sources` are inputs that are recorded but do not enter the key: what is frozen once drawn.
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
    """A piece of work under its lease: found standing, or to be built in `folder`."""

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
        """What stands, found or committed."""
        assert self.standing is not None
        return self.standing

    def commit(self, facts: Mapping[str, Any]) -> Artifact:
        """Close the folder with its manifest and enter it in the ledger."""
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
        """Remove what was built: the input was bad, so there is nothing to go on from."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # as far up as nothing else is there
            for parent in self.folder.parents:
                parent.rmdir()
        self.release()

    def release(self) -> None:
        """Let the next one have the lease."""
        self._lease.close()


class ArtifactStore(dg.ConfigurableResource):
    """The artifacts of a home and the ledger over them.

    `recipe` is the text of the recipe that runs go by: each keeps it, as an artifact of its own.
    """

    home: str
    recipe: str = ""

    _run: IO[bytes] | None = PrivateAttr(default=None)
    _run_id: str | None = PrivateAttr(default=None)
    _recipe: str | None = PrivateAttr(default=None)

    @property
    def run_id(self) -> str | None:
        """The run of Dagster that this is a resource of."""
        return self._run_id

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Make the home where there is none, and keep the recipe.

        Shows that the run's process lives, for as long as it does. Raises InputError for a home
        that belongs to another recipe.
        """
        if self.recipe:
            self.at.claim(yaml.safe_load(self.recipe)["name"])
        if context.run:
            self._run_id = context.run.run_id
            self._run = lock(self.at.run_lease(context.run.run_id))
            try:
                self.at.refuse_exclusive()  # which looks at the lease after it was begun
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
        """Let go of what setup_for_execution holds."""
        if self._run:
            Path(self._run.name).unlink(missing_ok=True)
            self._run.close()

    @property
    def at(self) -> Home:
        return Home(self.home)

    def folder(self, asset: str, partition: str | None, key: str) -> Path:
        """Where an artifact of this key is or will be: its last version, where it was replaced."""
        place = self.at.artifacts / asset
        first = (place / partition if partition else place) / key[:16]
        return self.at.root / self.ledger.last_version(str(first.relative_to(self.at.root)))

    def make(self, work: Work, build: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """The artifact of this work: the standing one, or built now by `build(folder) -> facts`.

        Two requests for the same key meet at a lease: the second waits and finds it standing. A
        build that raises InputError leaves nothing behind; any other failure leaves the folder
        for the next attempt to go on from.
        """
        with self.attempts([work]) as (attempt,):
            return attempt.standing or attempt.commit(build(attempt.folder))

    @contextlib.contextmanager
    def attempts(self, works: Sequence[Work]) -> Iterator[list[Attempt]]:
        """Attempts at several works, for the caller to build and commit, under their leases.

        An InputError abandons those that are not committed; after any other failure, and where a
        cluster cannot be reached, their folders stay for the next attempt.
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
        # Made again by a run that was killed before it could enter it, it has another manifest.
        known = current and (current["key"], current.get("manifest") or artifact.manifest)
        if known != (key, artifact.manifest):
            self.record(work, artifact)
        return artifact

    def current(self, asset: str, partition: str | None = None) -> Artifact:
        """The current artifact of an asset's partition.

        Raises InputError where it has not been made yet or its files are gone.
        """
        entry = self.entries().get((asset, partition))
        name = asset if partition is None else f"{asset}[{partition}]"
        if entry is None:
            raise InputError(f"{name} is not there yet; materialize it first")
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
        """The current artifact, if it was made from exactly these inputs.

        Raises InputError where it was made from something older.
        """
        artifact = self.current(asset, partition)
        for made_from in inputs:
            if artifact.inputs.get(made_from.name) != made_from.fingerprint:
                raise InputError(
                    f"{artifact.name} was made from another {made_from.name} than the current "
                    "one; materialize it again"
                )
        return artifact

    @property
    def ledger(self) -> Ledger:
        return ledger_at(self.at.ledger)

    def entries(self) -> Entries:
        """The current ledger entry of every asset's partition."""
        return self.ledger.current()

    def is_behind(self, entry: Mapping[str, Any]) -> bool:
        """Whether an artifact was made from something that has since been made anew."""
        return any(self._fingerprint(name) != was for name, was in entry["inputs"].items())

    def _fingerprint(self, name: str) -> str | None:
        """The current fingerprint of an artifact, or of a part of one, by its name."""
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
        """What the manifest of an artifact has on record: what it is and what it is made from.

        `ledger` is the head of the ledger, with all that was entered before.
        """
        return {
            "asset": work.asset,
            "partition": work.partition,
            "key": key,
            "inputs": [a.identity for a in work.inputs],
            "sources": [a.identity for a in work.sources],
            **_terms(work),
            "experiment": self._recipe,
            "run": self.run_id,
            "environment": manifest.environment(),
            "ledger": self.ledger.head(),
        }

    def replace(self, entry: Entry, write: Callable[[Path, Path], Collection[str]]) -> None:
        """Make another version of an artifact, which takes its place, and record it.

        `write(old, new)` writes the new folder and returns the files that differ. The key and the
        fingerprint stay, so whatever was made from the artifact exists as before. Made once: after
        an interruption the same call completes it. The old folder is for the caller to remove.
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
        """Record that an artifact is removed for good, and remove its folder.

        Backups of the home lose it too.
        """
        folder = self.at.root / entry["path"]
        if not entry.get("removed"):
            parts = entry.get("parts")
            if parts is None and (folder / manifest.MANIFEST).exists():
                parts = manifest.parts(folder)
            self._record_change(entry, removed=True, parts=parts)
        self.discard(folder)

    def discard(self, folder: Path) -> None:
        """Remove a folder, its manifest first: what is left of one half removed is no artifact.

        A dataset's table of rows, which has no text, is kept: by it one finds what trained on them.
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
        """A dataset's row, shard, position and sha256, also where its folder is gone.

        None where it was removed before such tables were kept.
        """
        here = self.at.root / dataset["path"] / ROWS
        kept = self.at.rows / f"{dataset['fingerprint']}.parquet"
        for table in (here, kept):
            if table.exists():
                return pl.read_parquet(table, columns=["row", "shard", "position", "sha256"])
        return None

    def _record_change(self, entry: Entry, **changes: Any) -> None:
        """Append an entry to the ledger with some facts changed."""
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
                **_terms(work),
                "experiment": self._recipe,
                "environment": manifest.environment(),
                "recorded": _now(),
            }
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _terms(work: Work) -> dict[str, Any]:
    """What of a piece of work is in its key, beside its inputs."""
    return {
        "recipe": dict(work.recipe),
        "code": work.code,
        "seed": work.seed,
        "precision": work.precision,
    }


def _allow_open_files() -> None:
    """As many as the system lets this process have: a lease is an open file, one per shard."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
