"""Sharing folders of a home with the machines of a cluster, from the machine that has the home."""

import contextlib
import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from upath import UPath

from colorfilter.errors import UnreachableError, one_line
from colorfilter.storage.remote import (
    Place,
    fetch,
    fetch_file,
    names,
    put_file,
    remove,
    write_file,
)

COPIES = 2  # concurrent copies; the file system's library may split each into concurrent parts
WHOLE = ".whole"  # marks a folder as completely copied; written last


class LocalStaging:
    """Staging for work on a single machine: folders are read and written in the home directly."""

    def check(self) -> None: ...

    def share(self, folder: Path) -> Place:
        return folder

    @contextlib.contextmanager
    def sharing(self, folders: Iterable[Path]) -> Iterator[Callable[[Path], Place]]:  # noqa: ARG002
        yield self.share

    def staged(self, folder: Path) -> Place:
        return folder

    def begun(self, folder: Path) -> Place:
        return folder

    def take(self, folder: Path, name: str) -> None: ...

    def clear(self, folder: Path) -> None: ...

    def take_all(self, folder: Path) -> None: ...

    def discard(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class RemoteStaging(LocalStaging):
    """Staging for a cluster, from the machine that has the home.

    With `storage`, a URI or folder that all machines can access, folders are copied there before
    workers read them. Without it, the home itself must be on a file system shared by all machines.
    """

    home: Path
    storage: str | None = None

    def check(self) -> None:
        """Raise UnreachableError if the storage is not writable."""
        if self.storage is None:
            return
        try:
            probe = self._place(self.home, f"@probe-{uuid.uuid4().hex}")
            write_file(b"", probe, WHOLE)
            remove(probe)
        except Exception as error:  # libraries raise anything for a wrong name, key or network
            raise UnreachableError(
                f"compute.storage: cannot write to {self.storage} ({one_line(error)}); correct it, "
                "or provide its credentials in the environment"
            ) from error

    def share(self, folder: Path) -> Place:
        """Return the location where all machines can read a folder of the home.

        The folder is copied there unless a copy of its current state exists.
        """
        if self.storage is None:
            return folder
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        signs = [
            (str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files
        ]
        sign = hashlib.sha256(repr(signs).encode()).hexdigest()[:12]
        place = self._place(folder, f"@{sign}")
        if WHOLE not in names(place):
            for name, *_ in signs:
                put_file(folder / name, place, name)
            write_file(b"", place, WHOLE)
        return place

    @contextlib.contextmanager
    def sharing(self, folders: Iterable[Path]) -> Iterator[Callable[[Path], Place]]:
        """Share folders in the background, in their order.

        Yields a function that waits for a folder and returns its location.
        """
        pool = ThreadPoolExecutor(COPIES)
        try:
            places = {folder: pool.submit(self.share, folder) for folder in folders}
            yield lambda folder: places[folder].result()
        finally:
            pool.shutdown(cancel_futures=True)

    def staged(self, folder: Path) -> Place:
        """Return where workers commit files for a folder of the home; `take` fetches them.

        The location is separate from the folder, so that late or abandoned workers change nothing
        in the home.
        """
        if self.storage is None:
            return self.home / "staged" / folder.relative_to(self.home)
        return self._place(folder, "@staged")

    def begun(self, folder: Path) -> Place:
        """Return where a worker writes the content of a folder of the home, for `take_all`."""
        return folder if self.storage is None else self._place(folder, "@begun")

    def take(self, folder: Path, name: str) -> None:
        """Copy a committed file to its folder of the home."""
        fetch_file(self.staged(folder), name, folder / name)

    def clear(self, folder: Path) -> None:
        """Remove committed files of a folder, after those that count were taken."""
        remove(self.staged(folder))

    def take_all(self, folder: Path) -> None:
        """Move all files that a worker wrote to their folder of the home."""
        place = self.begun(folder)
        if place != folder:
            # Left over: states of a training that was started locally, partially fetched files.
            for left in [*folder.glob("*.safetensors"), *folder.rglob(".*.tmp")]:
                left.unlink()
            fetch(place, folder)
            remove(place)

    def discard(self, folder: Path) -> None:
        """Remove every copy of a folder of the home, including copies of its subfolders."""
        remove(self.staged(folder))
        if self.storage is None:
            return
        root = UPath(self._place(folder, ""))
        root.fs.invalidate_cache()
        for copy in [root, *root.parent.glob(f"{root.name}@*")]:
            remove(copy)

    def _place(self, folder: Path, suffix: str) -> Place:
        """Return the location of a folder of the home in the storage."""
        assert self.storage is not None
        return UPath(self.storage) / f"{folder.relative_to(self.home)}{suffix}"
