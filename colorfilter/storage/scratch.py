"""Temporary folders on this machine that are removed with the last process that uses them.

A killed process cannot clean up, but its locks are released. Folders that no process holds are
removed when another process acquires or releases one.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from colorfilter.errors import UnreachableError
from colorfilter.storage.files import is_locked, lock


def own_folder() -> Path:
    """Return a folder for temporary files that is private to this user.

    It must be private because models are loaded from it. Raises UnreachableError if others can
    write to it.
    """
    folder = Path(tempfile.gettempdir()) / f"colorfilter-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise UnreachableError(f"{folder}: accessible to other users; remove it or set TMPDIR")
    return folder


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield an empty folder that is removed after use."""
    with held(uuid.uuid4().hex) as folder:
        folder.mkdir()
        yield folder


@contextlib.contextmanager
def held(name: str) -> Iterator[Path]:
    """Yield the path of a folder that processes of this machine share by its name.

    The folder does not exist until a process creates it. It is removed with the last process that
    holds it.
    """
    own = own_folder()
    folder = own / f"scratch-{name}"
    with lock(own / "scratch.lock"):
        _sweep(own)
        holding = lock(folder.with_suffix(".held"), shared=True)
    try:
        yield folder
    finally:
        with lock(own / "scratch.lock"):
            holding.close()
            _sweep(own)


def sweep() -> None:
    """Remove folders left by killed processes."""
    own = own_folder()
    with lock(own / "scratch.lock"):
        _sweep(own)


def _sweep(own: Path) -> None:
    for held_by in own.glob("scratch-*.held"):
        if not is_locked(held_by):
            for left in own.glob(f"{held_by.stem}.*"):
                if left != held_by:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            shutil.rmtree(held_by.with_suffix(""), ignore_errors=True)
            held_by.unlink()
