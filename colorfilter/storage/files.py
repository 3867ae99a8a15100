"""Files that are whole or not there: atomic writes and content hashes."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from colorfilter.progress import Progress, silent

BLOCK = 1 << 23  # bytes that are copied at a time
TAIL = 4_096  # bytes in which the last line of a file is looked for first


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checkpoint_content(path: str) -> dict[str, str]:
    """sha256 of the files of a checkpoint or tokenizer in a local folder; none for a hub name."""
    files = sorted(f for form in ("*.json", "*.safetensors") for f in Path(path).glob(form))
    return {file.name: file_sha256(file) for file in files}


def copy_file(source: Path, target: Path, progress: Progress = silent) -> str:
    """Copy a file, flush it to disk and return its sha256. Makes the folder of the target.

    `progress` is called with the bytes of every block.
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
    """Make a folder of the files of another one, but for those of the name `without`.

    The files get a second name; where the filesystem has no links they are copied. What was in
    `target` is removed.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_link, ignore=shutil.ignore_patterns(without))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_atomically(temporary: Path, path: Path) -> None:
    """Flush a finished temporary file to disk and give it its name, in one step for readers."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    write_atomically(temporary, path)


def append_line(path: Path, line: Callable[[bytes], str]) -> None:
    """Append a line, flushed to disk, one writer at a time.

    `line(last)` returns the line; `last` is that of `last_line`. A line cut off by a crash is
    removed.
    """
    with path.open("ab+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        end, last = last_line(stream)
        stream.truncate(end)
        stream.write(line(last).encode("utf-8") + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def last_line(stream: IO[bytes]) -> tuple[int, bytes]:
    """Where the last whole line of a file ends, and that line; 0 and nothing if there is none."""
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
    """Wait for a lock of this name and hold it until the stream is closed, or the process ends.

    Several can hold one that is shared at the same time.
    """
    stream = path.open("ab")
    fcntl.flock(stream, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    return stream


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock of this name."""
    if not path.exists():
        return False
    with path.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def require_space(folder: Path, size: int, what: str) -> None:
    """Raise OSError where the disk of a folder has no room for so many bytes more.

    Called before long work, which would end in that: by then what stood could be half written.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            f"{what} takes about {size / 1e9:,.2f} GB and {free / 1e9:,.2f} GB are free "
            f"at {folder}; make room (`colorfilter prune` says what can go) and run again"
        )
