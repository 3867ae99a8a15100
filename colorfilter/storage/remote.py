"""Folders that every machine of a cluster reads and writes.

A `Place` is a folder: a Path on a file system shared by all machines, or a UPath of a file system
that fsspec supports (`s3://`, `gs://`, ...). Credentials come only from each machine's environment,
where the library of the file system looks for them. Files appear atomically: an object store shows
a file when its last byte is written, and on a file system they are renamed.
"""

import contextlib
import hashlib
import io
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from upath import UPath

from colorfilter.storage.files import lock, write_atomically
from colorfilter.storage.scratch import held, own_folder, scratch

Place = Path | UPath

CACHE_SECONDS = 24 * 3600.0  # how long a machine keeps a folder after its last use
HEADER_BYTES = 4_096  # larger than the header of a .npy file


def here(place: Place) -> Path:
    """Return `place` if it is local, else a local copy, cached until a day after its last use."""
    if isinstance(place, Path):
        return place
    cache = own_folder()
    folder = cache / _name(place)
    if not folder.exists():
        _forget_unused(cache)
    _fetch_once(place, folder)
    os.utime(folder)
    return folder


def _name(place: UPath) -> str:
    return hashlib.sha256(str(place).encode()).hexdigest()[:32]


def _fetch_once(place: UPath, folder: Path) -> None:
    """Fetch a folder unless it exists. Only one process fetches it, and the others wait."""
    with lock(folder.with_suffix(".lock")):
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            fetch(place, part)
            part.rename(folder)


def _forget_unused(cache: Path) -> None:
    for folder in cache.iterdir():
        kept = folder.is_dir() and not folder.name.startswith("scratch-")
        with contextlib.suppress(FileNotFoundError):  # another process may have removed it
            if kept and time.time() - folder.stat().st_mtime > CACHE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def fetch(place: Place, folder: Path) -> None:
    """Copy all files of a place to a local folder."""
    for name in names(place):
        fetch_file(place, name, folder / name)


def fetch_file(place: Place, name: str, path: Path) -> None:
    """Copy a file of a place to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        source = UPath(place / name)
        source.fs.get_file(source.path, str(temporary))
        write_atomically(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_file(path: Path, place: Place, name: str) -> None:
    """Copy a local file to a place under a name, atomically."""
    if isinstance(place, Path):
        fetch_file(path.parent, path.name, place / name)
    else:
        target = place / name
        target.fs.put_file(str(path), target.path)


@contextlib.contextmanager
def temporary_file(place: Place) -> Iterator[Path]:
    """Yield a path for a temporary file to commit to a place.

    The path is in the place itself if that is a local folder, so that committing is a rename.
    """
    with contextlib.ExitStack() as until_committed:
        folder = place if isinstance(place, Path) else until_committed.enter_context(scratch())
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{uuid.uuid4().hex}.tmp"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def commit(temporary: Path, place: Place, name: str) -> None:
    """Store a finished temporary file in a place under a name, atomically."""
    if isinstance(place, Path):
        write_atomically(temporary, place / name)
    else:
        put_file(temporary, place, name)


def names(place: Place) -> list[str]:
    """Return the sorted relative paths of the files of a place; empty if it does not exist."""
    folder = UPath(place.absolute())
    folder.fs.invalidate_cache()  # other machines may have written to it
    try:
        found = folder.fs.find(folder.path)
    except FileNotFoundError:
        return []
    inside = (path[len(folder.path) :].lstrip("/") for path in found)
    return sorted(
        name for name in inside if ".." not in name.split("/") and not name.endswith(".tmp")
    )


def remove(place: Place) -> None:
    """Remove a place and its content."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.fs.invalidate_cache()
        if place.exists():
            place.fs.rm(place.path, recursive=True)


def read_rows(file: UPath, start: int, stop: int | None = None) -> np.ndarray:
    """Read rows [start, stop) of a remote .npy file, fetching only the header and these rows."""
    header = io.BytesIO(file.fs.cat_file(file.path, start=0, end=HEADER_BYTES))
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    first, last, _ = slice(start, stop).indices(shape[0])
    size = dtype.itemsize * int(np.prod(shape[1:]))
    begin, end = (header.tell() + row * size for row in (first, max(first, last)))
    content = file.fs.cat_file(file.path, start=begin, end=end) if end > begin else b""
    return np.frombuffer(content, dtype).reshape(-1, *shape[1:])


@contextlib.contextmanager
def borrowed(place: Place) -> Iterator[Path]:
    """Yield a folder on this machine: `place`, or a temporary copy that is removed after use.

    Processes that use the copy at the same time share it.
    """
    if isinstance(place, Path):
        yield place
        return
    with held(_name(place)) as folder:
        _fetch_once(place, folder)
        yield folder


class MirroredFolder:
    """A local folder whose files are mirrored to a place; starts with a copy of the place."""

    def __init__(self, folder: Path, place: Place) -> None:
        self._folder = folder
        self._place = place
        fetch(place, folder)
        self._known = self._signs()

    def push(self) -> None:
        """Update the place to the content of the folder."""
        signs = self._signs()
        changed = [name for name, sign in signs.items() if self._known.get(name) != sign]
        # Copy in order of modification: a file that marks others as complete was written last.
        for name in sorted(changed, key=lambda name: signs[name][1]):
            put_file(self._folder / name, self._place, name)
        for name in self._known.keys() - signs.keys():
            (self._place / name).unlink(missing_ok=True)
        self._known = signs

    def _signs(self) -> dict[str, tuple[int, int]]:
        files = (p for p in self._folder.rglob("*") if p.is_file() and p.suffix != ".tmp")
        found = ((str(p.relative_to(self._folder)), p.stat()) for p in files)
        return {name: (status.st_size, status.st_mtime_ns) for name, status in found}


def write_file(content: bytes, place: Place, name: str) -> None:
    """Write a small file to a place."""
    if isinstance(place, Path):
        place.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(content)
