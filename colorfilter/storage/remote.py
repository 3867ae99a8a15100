"""Folders that every machine of a cluster reads and writes.

A place is a folder: a Path where all machines see one file system, else a UPath of one that fsspec
knows (`s3://`, `gs://`, ...). Credentials come from each machine's own environment, as the
filesystem's library reads them, and from nowhere else. Files in a place are whole or not there: an
object store shows none before its last byte, and on a file system they are renamed.
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

CACHE_SECONDS = 24 * 3600.0  # that a folder is kept on a machine after it was last asked for
HEADER_BYTES = 4_096  # more than the header of a .npy file takes


def here(place: Place) -> Path:
    """The folder on this machine; a copy of one elsewhere, kept until a day after its last use."""
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
    """Fetch a folder that several processes want: one does, and the others wait for it."""
    with lock(folder.with_suffix(".lock")):
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            fetch(place, part)
            part.rename(folder)


def _forget_unused(cache: Path) -> None:
    for folder in cache.iterdir():
        kept = folder.is_dir() and not folder.name.startswith("scratch-")
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if kept and time.time() - folder.stat().st_mtime > CACHE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def fetch(place: Place, folder: Path) -> None:
    """Copy all files of a place into a folder."""
    for name in names(place):
        fetch_file(place, name, folder / name)


def fetch_file(place: Place, name: str, path: Path) -> None:
    """Copy a file of a place to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        source = UPath(place / name)
        source.fs.get_file(source.path, str(temporary))
        write_atomically(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_file(path: Path, place: Place, name: str) -> None:
    """Copy a file into a place under a name, whole or not at all."""
    if isinstance(place, Path):
        fetch_file(path.parent, path.name, place / name)
    else:
        target = place / name
        target.fs.put_file(str(path), target.path)


@contextlib.contextmanager
def temporary_file(place: Place) -> Iterator[Path]:
    """A temporary file for what is to be committed to a place, on its file system if it has one."""
    with contextlib.ExitStack() as until_committed:
        folder = place if isinstance(place, Path) else until_committed.enter_context(scratch())
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{uuid.uuid4().hex}.tmp"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def commit(temporary: Path, place: Place, name: str) -> None:
    """Put a file that was begun in its place, whole or not at all."""
    if isinstance(place, Path):
        write_atomically(temporary, place / name)
    else:
        put_file(temporary, place, name)


def names(place: Place) -> list[str]:
    """The files of a place, relative to it, in order; none where it is not there."""
    folder = UPath(place)
    folder.fs.invalidate_cache()  # other machines write there
    try:
        found = folder.fs.find(folder.path)
    except FileNotFoundError:
        return []
    inside = (path[len(folder.path) :].lstrip("/") for path in found)
    return sorted(
        name for name in inside if ".." not in name.split("/") and not name.endswith(".tmp")
    )


def remove(place: Place) -> None:
    """Remove a place and all in it."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.fs.invalidate_cache()
        if place.exists():
            place.fs.rm(place.path, recursive=True)


def read_rows(file: UPath, start: int, stop: int | None = None) -> np.ndarray:
    """Rows [start, stop) of a remote .npy file, of which only they and the header are read."""
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
    """The folder on this machine for as long as it is needed, and no copy of it after that.

    Processes that need it at the same time have one between them.
    """
    if isinstance(place, Path):
        yield place
        return
    with held(_name(place)) as folder:
        _fetch_once(place, folder)
        yield folder


class MirroredFolder:
    """A folder of this machine whose files are kept in a place too: what was there is here."""

    def __init__(self, folder: Path, place: Place) -> None:
        self._folder = folder
        self._place = place
        fetch(place, folder)
        self._known = self._signs()

    def push(self) -> None:
        """Bring the place to hold what the folder holds."""
        signs = self._signs()
        changed = [name for name, sign in signs.items() if self._known.get(name) != sign]
        # As they were written: what says that all is there was written last.
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
    """Write a small file of a place."""
    if isinstance(place, Path):
        place.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(content)
