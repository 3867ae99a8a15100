"""Listing raw files and grouping them into shards, without reading them.

A shard is a list of complete input files, planned from their names and sizes only. So shards are
known immediately, and a new or changed file affects no shard but its own.
"""

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import fsspec

from colorfilter.config.recipe import Source
from colorfilter.errors import InputError


@dataclass(frozen=True)
class InputFile:
    """One raw file.

    `path` is relative to the fixed part of the source's glob, so that names derived from it do not
    depend on where the data is stored. `version` detects changes cheaply: a modification time, ETag
    or similar. `vanished` marks a file that was read before and is now missing.
    """

    source: str
    path: str
    uri: str
    size: int
    version: str
    vanished: bool = False

    @property
    def name(self) -> str:
        return f"{self.source}/{self.path}"


@dataclass(frozen=True)
class Shard:
    """A list of complete input files of one source."""

    name: str
    files: tuple[InputFile, ...]

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Shard":
        return cls(facts["name"], tuple(InputFile(**f) for f in facts["files"]))


def list_files(sources: Iterable[Source]) -> list[InputFile]:
    """Return every file that the sources match, in order of source and path.

    Raises InputError for a source that matches nothing or cannot be listed.
    """
    files = []
    for source in sources:
        found = sorted(_matches(source), key=lambda f: f.path)
        if not found:
            raise InputError(
                f"source {source.name}: nothing matches {source.files}; correct `files`"
            )
        files += found
    return files


def _matches(source: Source) -> Iterator[InputFile]:
    try:
        filesystem, path = fsspec.core.url_to_fs(source.files)
        root = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        if any(c in path for c in "*?["):
            infos = list(filesystem.glob(path, detail=True).values())
        else:
            infos = [filesystem.info(path)] if filesystem.exists(path) else []
    except ImportError as error:
        raise InputError(f"source {source.name}: {source.files}: {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"source {source.name}: cannot list {source.files} ({error}); correct `files` or the "
            "access to it"
        ) from error
    for info in infos:
        uri = filesystem.unstrip_protocol(info["name"]).removeprefix("file://")
        if info["type"] == "file" and not _excluded(source, uri):
            signs = ("ETag", "mtime", "LastModified", "blob_id")
            yield InputFile(
                source=source.name,
                path=info["name"].removeprefix(root).lstrip("/"),
                uri=uri,
                size=info["size"] or 0,
                version=str(next((info[sign] for sign in signs if info.get(sign)), "")),
            )


def _excluded(source: Source, uri: str) -> bool:
    return any(fnmatch.fnmatch(uri, pattern) for pattern in source.exclude)


def with_vanished(
    files: Sequence[InputFile], sources: Sequence[Source], read: Sequence[Shard]
) -> list[InputFile]:
    """Return the listed files, and the missing files of shards that were read, as `vanished`.

    The text of vanished files is kept, so they stay in the corpus until the user removes them.
    Excluded are missing files that no source of the recipe matches any more, and those of a shard
    in which another file has changed, because the whole shard must be read again.
    """
    present = {f.name: (f.size, f.version) for f in files}
    kept = []
    for shard in read:
        gone = [f for f in shard.files if f.name not in present]
        if all(
            present.get(f.name, (f.size, f.version)) == (f.size, f.version) for f in shard.files
        ):
            kept += [replace(f, vanished=True) for f in gone if _asked_for(sources, f)]
    return sorted([*files, *kept], key=lambda f: (f.source, f.path))


def _asked_for(sources: Sequence[Source], file: InputFile) -> bool:
    """Return whether the sources match a file that is missing."""
    for source in sources:
        if source.name == file.source:
            filesystem, pattern = fsspec.core.url_to_fs(source.files)
            name = filesystem._strip_protocol(file.uri)
            matches = re.fullmatch(fsspec.utils.glob_translate(pattern), name) is not None
            return matches and not _excluded(source, file.uri)
    return False


def plan_shards(
    files: Sequence[InputFile], shard_bytes: int, standing: Sequence[Shard] = ()
) -> list[Shard]:
    """Group files into shards of about `shard_bytes`, from names and sizes only.

    A shard in `standing` is kept while all its files exist with the same sizes; only the remaining
    files are planned. So a new file creates a new shard, a changed file retires its shard, and no
    other shard changes. Small files of a source share a shard, in order of path; a big file has a
    shard of its own.
    """
    available = {(f.source, f.path, f.size): f for f in files}
    shards = []
    for shard in standing:
        keys = [(f.source, f.path, f.size) for f in shard.files]
        if all(k in available for k in keys):
            shards.append(Shard(shard.name, tuple(available.pop(k) for k in keys)))
    group: list[InputFile] = []
    for file in [*available.values(), None]:
        full = sum(f.size for f in group) + (file.size if file else 0) > shard_bytes
        if group and (file is None or full or file.source != group[0].source):
            shards.append(Shard(_shard_name(group), tuple(group)))
            group = []
        if file:
            group.append(file)
    return sorted(shards, key=lambda s: s.name)


def _shard_name(files: Sequence[InputFile]) -> str:
    digest = hashlib.sha256(json.dumps([(f.path, f.size) for f in files]).encode()).hexdigest()
    return f"{files[0].source}-{digest[:10]}"
