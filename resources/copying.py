"""Copies of what a home holds, each whole or not there, while others may be writing."""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from colorfilter.errors import InputError
from colorfilter.provenance import MANIFEST, stands

BEGUN = "begun"  # where a folder is copied to, until it is whole
BLOCK = 1 << 23

Listener = Callable[[int, int], None]


class DamagedError(InputError):
    """The files of a folder are not those of its manifest."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"{folder}: is damaged, its files are not those of its manifest; remove it, then run "
            "(what a home lacks is made again) and back up (what a backup lacks is copied again)"
        )


@dataclass
class Copying:
    """What is copied: artefacts, those that were there already, and bytes, done and in all.

    `listener` is called with the bytes.
    """

    listener: Listener
    copied: int = 0
    there: int = 0
    done: int = 0
    total: int = 0

    @property
    def summary(self) -> str:
        return (
            f"{self.copied} artefacts copied, {self.there} already there; "
            f"{self.done / 1e6:,.1f} MB copied"
        )

    def artifact(self, path: str, source: Path, target: Path) -> None:
        """Copy the folder of an artefact as in `folder`, and count it."""
        self.folder(path, source, target)
        self.copied += 1

    def folder(self, path: str, source: Path, target: Path) -> None:
        """Copy a folder that stands at a path below `source` to the same below `target`.

        Raises DamagedError where a file is not what the manifest says.
        """
        begun = target / BEGUN
        shutil.rmtree(begun, ignore_errors=True)
        try:
            manifest = (source / path / MANIFEST).read_bytes()
            for file in json.loads(manifest)["files"]:
                sha256 = self._file(source / path / file["path"], begun / file["path"])
                if sha256 != file["sha256"]:
                    raise DamagedError(source / path)
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(source / path) from error
        self._write([manifest], begun / MANIFEST)
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target / path, ignore_errors=True)
        begun.rename(target / path)

    def lines(self, source: Path, target: Path) -> None:
        """Copy the whole lines of a file that is appended to, if there is one."""
        if source.exists():
            content = source.read_bytes()
            self._write([content[: content.rfind(b"\n") + 1]], target)

    def changing(self, source: Path, target: Path) -> None:
        """Copy a file that may be replaced or removed meanwhile, or an SQLite database in use."""
        if source.name.endswith(".db"):
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy_database(source, target)
            self._tell(target.stat().st_size)
            return
        with contextlib.suppress(FileNotFoundError):
            self._file(source, target)

    def _file(self, source: Path, target: Path) -> str:
        with source.open("rb") as stream:
            return self._write(iter(lambda: stream.read(BLOCK), b""), target)

    def _write(self, blocks: Iterable[bytes], target: Path) -> str:
        """Write blocks to a file and flush it to disk; gives the sha256."""
        target.parent.mkdir(parents=True, exist_ok=True)
        content = hashlib.sha256()
        with target.open("wb") as stream:
            for block in blocks:
                stream.write(block)
                content.update(block)
                self._tell(len(block))
            stream.flush()
            os.fsync(stream.fileno())
        return content.hexdigest()

    def _tell(self, amount: int) -> None:
        self.done += amount
        self.listener(self.done, self.total)


def _copy_database(source: Path, target: Path) -> None:
    """Copy an SQLite database as it is in between two transactions."""
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{source.as_uri()}?mode=rw", uri=True)) as read,
            contextlib.closing(sqlite3.connect(target)) as write,
        ):
            read.backup(write)
    except sqlite3.Error as error:
        raise OSError(f"{source}: {error}") from error


def is_copied(source: Path, target: Path) -> bool:
    """Whether the target stands and has the manifest of the source."""
    return stands(target) and (source / MANIFEST).read_bytes() == (target / MANIFEST).read_bytes()


def size(folder: Path) -> int:
    """Bytes of what stands in a folder."""
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return sum(int(file["bytes"]) for file in files) + (folder / MANIFEST).stat().st_size
