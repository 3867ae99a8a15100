"""What of a home the machines of a cluster read and write, as the one that has the home sees it."""

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

COPIES = 2  # at a time, each by many parts at a time where the filesystem's library can
WHOLE = ".whole"  # of a folder that was copied, written last


class LocalStaging:
    """A home that one machine works in: what it reads and writes lies where it belongs."""

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
    """What of a home the machines of a cluster read and write, as the one that has it sees it.

    With `storage`, a URI or a folder that all see, folders are copied there before they are read.
    Without, the home itself lies on a file system that all see.
    """

    home: Path
    storage: str | None = None

    def check(self) -> None:
        """Raise UnreachableError where the storage cannot be written."""
        if self.storage is None:
            return
        try:
            probe = self._place(self.home, f"@probe-{uuid.uuid4().hex}")
            write_file(b"", probe, WHOLE)
            remove(probe)
        except Exception as error:  # what each library makes of a wrong name, key or network
            raise UnreachableError(
                f"compute.storage: cannot write to {self.storage} ({one_line(error)}); correct it, "
                "or let its library find credentials in the environment"
            ) from error

    def share(self, folder: Path) -> Place:
        """A folder of the home as all machines read it; copied there where it is not yet."""
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
        """Share folders in their order, beside other work; gives what waits for one of them."""
        pool = ThreadPoolExecutor(COPIES)
        try:
            places = {folder: pool.submit(self.share, folder) for folder in folders}
            yield lambda folder: places[folder].result()
        finally:
            pool.shutdown(cancel_futures=True)

    def staged(self, folder: Path) -> Place:
        """Where workers commit files that belong in a folder of the home, for `take`.

        A place of its own, so that a worker which is late, or was given up, changes nothing that
        stands.
        """
        if self.storage is None:
            return self.home / "staged" / folder.relative_to(self.home)
        return self._place(folder, "@staged")

    def begun(self, folder: Path) -> Place:
        """Where one worker makes what a folder of the home will hold, for `take_all`."""
        return folder if self.storage is None else self._place(folder, "@begun")

    def take(self, folder: Path, name: str) -> None:
        """Bring a committed file into its folder of the home."""
        fetch_file(self.staged(folder), name, folder / name)

    def clear(self, folder: Path) -> None:
        """Remove what was committed for a folder: what counts of it was taken."""
        remove(self.staged(folder))

    def take_all(self, folder: Path) -> None:
        """Bring all that was made into its folder of the home, and remove it where it was made."""
        place = self.begun(folder)
        if place != folder:
            # States of a training that was begun here, and what was half fetched.
            for left in [*folder.glob("*.safetensors"), *folder.rglob(".*.tmp")]:
                left.unlink()
            fetch(place, folder)
            remove(place)

    def discard(self, folder: Path) -> None:
        """Remove every copy of a folder of the home and of what is in it."""
        remove(self.staged(folder))
        if self.storage is None:
            return
        root = UPath(self._place(folder, ""))
        root.fs.invalidate_cache()
        for copy in [root, *root.parent.glob(f"{root.name}@*")]:
            remove(copy)

    def _place(self, folder: Path, suffix: str) -> Place:
        """Where a folder of the home lies in the storage."""
        assert self.storage is not None
        return UPath(self.storage) / f"{folder.relative_to(self.home)}{suffix}"
