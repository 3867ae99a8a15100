"""Raw files listed and planned into shards, before anything is read.

A shard is a list of whole input files, planned from their names and sizes alone. So shards are
known at once, and a file that arrives or changes moves no shard but its own.
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

    `path` is relative to the fixed part of the source's glob, so that names derived from it are
    the same wherever the data lies; `version` is the cheap sign of change: modification time,
    ETag or the like. `vanished` where it was read once and is no longer there.
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
    """A list of whole input files of one source."""

    name: str
    files: tuple[InputFile, ...]

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Shard":
        return cls(facts["name"], tuple(InputFile(**f) for f in facts["files"]))


def list_files(sources: Iterable[Source]) -> list[InputFile]:
    """Every file that the sources match, in order of source and path.

    Raises InputError for a source that matches nothing or whose place cannot be reached.
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
        raise InputError(f"source {source.name}: cannot list {source.files} ({error})") from error
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
    """The listed files, and as `vanished` those of shards that were read which are not there now.

    What was read of them stands, so they stay in the corpus until someone decides otherwise. Not
    those that the recipe no longer asks for, nor those of a shard of which another file has
    changed, since all of it must be read again.
    """
    there = {f.name: (f.size, f.version) for f in files}
    kept = []
    for shard in read:
        gone = [f for f in shard.files if f.name not in there]
        if all(there.get(f.name, (f.size, f.version)) == (f.size, f.version) for f in shard.files):
            kept += [replace(f, vanished=True) for f in gone if _asked_for(sources, f)]
    return sorted([*files, *kept], key=lambda f: (f.source, f.path))


def _asked_for(sources: Sequence[Source], file: InputFile) -> bool:
    """Whether a file that is not there would be listed if it were."""
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
    """Group files into shards of about `shard_bytes`, from names and sizes alone.

    A standing shard stays as long as all its files are there with their sizes; only what it does
    not cover is planned anew. So a new file brings a new shard, a changed one retires its shard,
    and nothing else moves. Small files of a source share a shard, in order of path; a big file is
    a shard by itself.
    """
    there = {(f.source, f.path, f.size): f for f in files}
    shards = []
    for shard in standing:
        keys = [(f.source, f.path, f.size) for f in shard.files]
        if all(k in there for k in keys):
            shards.append(Shard(shard.name, tuple(there.pop(k) for k in keys)))
    group: list[InputFile] = []
    for file in [*there.values(), None]:
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
