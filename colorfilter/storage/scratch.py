"""Folders that this machine has for a while, and that go with the last process that needs them.

A process that is killed says nothing, but its locks end with it: what nobody holds is removed when
the next one begins or ends something here.
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
    """A folder for temporary files, of this user alone: what lies in it is loaded as a model.

    Raises UnreachableError where others may write to it.
    """
    folder = Path(tempfile.gettempdir()) / f"colorfilter-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise UnreachableError(f"{folder}: others may write there; remove it or set TMPDIR")
    return folder


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder for as long as it is needed."""
    with held(uuid.uuid4().hex) as folder:
        folder.mkdir()
        yield folder


@contextlib.contextmanager
def held(name: str) -> Iterator[Path]:
    """A path for a folder that processes of this machine share by its name; who comes first makes
    it, and it is removed with the last of them.
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
    """Remove what processes that were killed have left."""
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
