"""Atomic writes, content hashes and file locks."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from colorfilter.progress import Progress, silent

BLOCK = 1 << 23  # bytes per read when copying
TAIL = 4_096  # bytes at the end of a file that are searched first for its last line


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checkpoint_content(path: str) -> dict[str, str]:
    """Return the sha256 of each file of a local checkpoint or tokenizer; empty for a hub name."""
    files = sorted(f for form in ("*.json", "*.safetensors") for f in Path(path).glob(form))
    return {file.name: file_sha256(file) for file in files}


def copy_file(source: Path, target: Path, progress: Progress = silent) -> str:
    """Copy a file, flush it to disk and return its sha256. Creates the target's folder.

    `progress` is called with the size of every block.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sha256 = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(BLOCK):
            write.write(block)
            sha256.update(block)
            progress(len(block))
        write.flush()
        os.fsync(write.fileno())
    return sha256.hexdigest()


def link_folder(source: Path, target: Path, without: str) -> None:
    """Replicate a folder with hard links, excluding files named `without`.

    If a file cannot be linked, it is copied. Existing content of `target` is removed.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_link, ignore=shutil.ignore_patterns(without))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_atomically(temporary: Path, path: Path) -> None:
    """Flush a finished temporary file to disk and rename it to `path` atomically."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    write_atomically(temporary, path)


def append_line(path: Path, line: Callable[[bytes], str]) -> None:
    """Append a line and flush it to disk, one writer at a time.

    `line(last)` returns the line to append; `last` is the last complete line. A line cut off by a
    crash is removed.
    """
    with path.open("ab+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        end, last = last_line(stream)
        stream.truncate(end)
        stream.write(line(last).encode("utf-8") + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def last_line(stream: IO[bytes]) -> tuple[int, bytes]:
    """Return the end offset of the last complete line of a file, and the line; 0, b"" if none."""
    size = stream.seek(0, os.SEEK_END)
    length = TAIL
    while True:
        start = max(0, size - length)
        stream.seek(start)
        tail = stream.read(size - start)
        end = tail.rfind(b"\n") + 1
        begin = tail.rfind(b"\n", 0, max(0, end - 1)) + 1
        if begin or not start:
            return start + end, tail[begin:end]
        length *= 8


def lock(path: Path, *, shared: bool = False) -> IO[bytes]:
    """Wait for the lock file `path`; the lock is held until the returned stream is closed.

    The lock is also released when the process ends. Several processes can hold a shared lock.
    """
    stream = path.open("ab")
    fcntl.flock(stream, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    return stream


def is_locked(path: Path) -> bool:
    """Return whether the lock file `path` is held by anyone."""
    if not path.exists():
        return False
    with path.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def require_space(folder: Path, size: int, what: str) -> None:
    """Raise OSError if the disk of a folder has less than `size` bytes free.

    Call this before long work: a disk that fills up later can leave existing files partially
    written.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            f"{what} takes about {size / 1e9:,.2f} GB, but {free / 1e9:,.2f} GB are free "
            f"at {folder}; make room (`colorfilter prune` lists what can be removed) and run again"
        )
