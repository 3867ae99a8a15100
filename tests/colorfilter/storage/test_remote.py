"""Shared storage, as folders and as URIs of an in-memory file system."""

import contextlib
import os
import tempfile
import time
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pytest
from upath import UPath

from colorfilter.data.tokens import read_tokens, real_tokens
from colorfilter.errors import InputError
from colorfilter.storage import remote, staging
from colorfilter.storage.remote import MirroredFolder, Place, borrowed, here, names
from colorfilter.storage.staging import RemoteStaging


@pytest.fixture(params=["folder", "uri"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "shared")
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/pool"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home" / "artifacts" / "model" / "abc"
    (folder / "down").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "down" / "tokens.npy").write_bytes(b"1234")
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def read(place: Place, name: str) -> bytes:
    return (place / name).read_bytes()


def test_a_folder_is_shared_once_and_anew_when_it_has_changed(home: Path, root: str) -> None:
    shared, folder = RemoteStaging(home, root), home / "artifacts" / "model" / "abc"
    place = shared.share(folder)
    assert isinstance(place, Path) == root.startswith("/")
    assert names(place) == [".whole", "config.json", "down/tokens.npy"]
    assert read(place, "down/tokens.npy") == b"1234"
    assert shared.share(folder) == place
    (folder / "config.json").write_text("{ }")
    again = shared.share(folder)
    assert again != place
    assert read(again, "config.json") == b"{ }"


def test_a_folder_that_was_shared_in_part_is_shared_again(home: Path, root: str) -> None:
    shared, folder = RemoteStaging(home, root), home / "artifacts" / "model" / "abc"
    place = shared.share(folder)
    (place / ".whole").unlink()
    (place / "config.json").unlink()
    assert shared.share(folder) == place
    assert names(place) == [".whole", "config.json", "down/tokens.npy"]


def folders(home: Path, count: int) -> list[Path]:
    found = [home / "artifacts" / "tokens" / str(i) for i in range(count)]
    for folder in found:
        folder.mkdir(parents=True)
        (folder / "tokens.npy").write_bytes(folder.name.encode())
    return found


def test_folders_are_shared_beside_other_work(home: Path, root: str) -> None:
    shared, wanted = RemoteStaging(home, root), folders(home, 5)
    with shared.sharing(wanted) as place:
        found = [place(folder) for folder in reversed(wanted)]
    assert found == [shared.share(folder) for folder in reversed(wanted)]
    assert [read(place, "tokens.npy") for place in found] == [b"4", b"3", b"2", b"1", b"0"]


def test_no_more_is_shared_when_the_other_work_ends(
    home: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, copied = RemoteStaging(home, root), []

    def put(path: Path, place: Place, name: str) -> None:
        time.sleep(0.05)
        copied.append(path.parent)
        remote.put_file(path, place, name)

    monkeypatch.setattr(staging, "put_file", put)
    wanted = folders(home, 20)
    with shared.sharing(wanted) as place:
        place(wanted[0])
    assert wanted[0] in copied
    assert len(copied) < 10


def test_a_folder_that_cannot_be_shared_is_told_to_who_waits_for_it(
    home: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, (first, second) = RemoteStaging(home, root), folders(home, 2)

    def put(path: Path, place: Place, name: str) -> None:
        if path.parent == second:
            raise OSError("no space")
        remote.put_file(path, place, name)

    monkeypatch.setattr(staging, "put_file", put)
    with shared.sharing([second, first]) as place:
        assert read(place(first), "tokens.npy") == b"0"
        with pytest.raises(OSError, match="no space"):
            place(second)


def test_discarded_is_every_copy_of_a_folder_and_nothing_beside_it(home: Path, root: str) -> None:
    shared, model = RemoteStaging(home, root), home / "artifacts" / "model"
    (model / "abcd").mkdir()
    (model / "abcd" / "config.json").write_text("{}")
    copies = [shared.share(model / "abc"), shared.share(model / "abc" / "down")]
    remote.write_file(b"", shared.staged(model / "abc"), "losses")
    beside = shared.share(model / "abcd")
    shared.discard(model / "abc")
    assert [names(copy) for copy in [*copies, shared.staged(model / "abc")]] == [[], [], []]
    assert names(beside)


def test_what_was_committed_is_taken_and_cleared(home: Path, root: str, tmp_path: Path) -> None:
    shared, folder = RemoteStaging(home, root), home / "artifacts" / "model" / "abc"
    staged = shared.staged(folder)
    with remote.temporary_file(staged) as temporary:
        temporary.write_bytes(b"losses")
        remote.commit(temporary, staged, "losses-0")
        assert names(staged) == ["losses-0"]
    shared.take(folder, "losses-0")
    assert (folder / "losses-0").read_bytes() == b"losses"
    shared.clear(folder)
    assert names(staged) == []
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_is_not_committed_is_not_there(home: Path, root: str, tmp_path: Path) -> None:
    staged = RemoteStaging(home, root).staged(home / "artifacts" / "model" / "abc")
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(remote.temporary_file(staged))
        temporary.write_bytes(b"half")
        assert names(staged) == []
    assert names(staged) == []
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_copy_on_this_machine_is_made_once_and_kept_a_day(home: Path) -> None:
    fsspec.filesystem("memory").store.clear()
    shared, folder = RemoteStaging(home, "memory://bucket"), home / "artifacts" / "model" / "abc"
    place = shared.share(folder)
    copy = here(place)
    assert (copy / "down" / "tokens.npy").read_bytes() == b"1234"
    assert copy.parent.stat().st_mode & 0o077 == 0
    remote.remove(place)
    assert here(place) == copy  # not fetched again
    day_ago = time.time() - remote.CACHE_SECONDS - 1
    os.utime(copy, (day_ago, day_ago))
    (folder / "config.json").write_text("other")
    here(shared.share(folder))
    assert not copy.exists()


def test_borrowed_is_a_copy_for_as_long_as_it_is_needed(home: Path) -> None:
    fsspec.filesystem("memory").store.clear()
    place = RemoteStaging(home, "memory://bucket").share(home / "artifacts" / "model" / "abc")
    with borrowed(place) as folder:
        assert (folder / "config.json").read_text() == "{}"
        with borrowed(place) as another:
            assert another == folder
        assert (folder / "config.json").exists()
    assert list(folder.parent.iterdir()) == [folder.parent / "scratch.lock"]
    with borrowed(home) as folder:
        assert folder == here(home) == home


def test_what_is_half_fetched_is_in_no_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    shared, out = RemoteStaging(home, "memory://bucket"), home / "artifacts" / "out"
    remote.write_file(b"1", shared.begun(out), "curve.parquet")

    def lost(_self: object, _name: str, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("lost")

    with monkeypatch.context() as patched:
        patched.setattr(type(filesystem), "get_file", lost)
        with pytest.raises(OSError, match="lost"):
            shared.take_all(out)
    assert list(out.iterdir()) == []
    (out / ".curve.parquet.123.tmp").write_bytes(b"of one that was killed")
    shared.take_all(out)
    assert [p.name for p in out.iterdir()] == ["curve.parquet"]


def test_a_kept_folder_comes_back_on_another_machine(root: str, tmp_path: Path) -> None:
    place = RemoteStaging(tmp_path, root).begun(tmp_path / "out")
    one = tmp_path / "one"
    one.mkdir()
    kept = MirroredFolder(one, place)
    (one / "state").write_text("1")
    (one / "trunk").write_text("1")
    (one / "half.tmp").write_text("-")
    kept.push()
    assert names(place) == ["state", "trunk"]
    (one / "state").write_text("22")
    (one / "trunk").unlink()
    kept.push()
    two = tmp_path / "two"
    two.mkdir()
    MirroredFolder(two, place)
    assert {p.name: p.read_text() for p in two.iterdir()} == {"state": "22"}
    RemoteStaging(tmp_path, root).take_all(tmp_path / "out")
    assert (tmp_path / "out" / "state").read_text() == "22"
    assert names(place) == []


def test_what_says_that_all_is_there_is_kept_last(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a node is lost in the middle, another must not take it for whole."""
    place = RemoteStaging(tmp_path, root).begun(tmp_path / "out")
    one = tmp_path / "one"
    one.mkdir()
    kept = MirroredFolder(one, place)
    for age, name in enumerate(("model", "curve")):
        (one / name).write_text(name)
        os.utime(one / name, (1e9 + age, 1e9 + age))
    put_file, put = remote.put_file, []

    def lost_after_one(path: Path, place: Place, name: str) -> None:
        if put:
            raise OSError("lost")
        put_file(path, place, name)
        put.append(name)

    monkeypatch.setattr(remote, "put_file", lost_after_one)
    with pytest.raises(OSError, match="lost"):
        kept.push()
    assert names(place) == ["model"]


def test_states_of_a_training_that_was_begun_here_do_not_stay_beside_it(
    root: str, tmp_path: Path
) -> None:
    shared, out = RemoteStaging(tmp_path, root), tmp_path / "out"
    out.mkdir()
    (out / "running.safetensors").touch()
    remote.write_file(b"", shared.begun(out), "curve.parquet")
    shared.take_all(out)
    assert [p.name for p in out.iterdir()] == ["curve.parquet"]


def test_a_name_that_leads_out_of_its_place_is_passed_over(tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pipe_file("/bucket/x/inside", b"1")
    filesystem.store["/bucket/x/../../outside"] = filesystem.store["/bucket/x/inside"]
    assert names(UPath("memory://bucket/x")) == ["inside"]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize(("start", "stop"), [(0, 3), (2, None), (4, 9), (7, 7), (0, 10), (9, 10)])
def test_rows_of_a_uri_are_those_of_the_file(
    dtype: type, start: int, stop: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).integers(0, 999, (10, 3000)).astype(dtype)
    np.save(tmp_path / "tokens.npy", rows)
    facts = pl.DataFrame({"position": np.arange(10), "n_tokens": np.arange(10, dtype=np.int32)})
    facts.write_parquet(tmp_path / "sequences.parquet")
    filesystem = fsspec.filesystem("memory")
    for name in ("tokens.npy", "sequences.parquet"):
        filesystem.pipe_file(f"/bucket/x/{name}", (tmp_path / name).read_bytes())
    read_bytes = 0
    cat_file = type(filesystem).cat_file

    def counting(self: object, *arguments: object, **more: object) -> bytes:
        nonlocal read_bytes
        content: bytes = cat_file(self, *arguments, **more)
        read_bytes += len(content)
        return content

    monkeypatch.setattr(type(filesystem), "cat_file", counting)
    found = read_tokens(UPath("memory://bucket/x"), start, stop)
    assert found.dtype == dtype
    assert np.array_equal(found, read_tokens(tmp_path, start, stop))
    assert np.array_equal(found, rows[start:stop])
    assert read_bytes <= remote.HEADER_BYTES + found.nbytes
    assert np.array_equal(real_tokens(UPath("memory://bucket/x")), np.arange(10))


def test_a_storage_that_cannot_be_written_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for wrong in (str(tmp_path / "file"), "nosuch://bucket"):
        with pytest.raises(InputError, match=r"compute\.storage: cannot write to") as caught:
            RemoteStaging(tmp_path, wrong).check()
        assert "\n" not in str(caught.value)
    RemoteStaging(tmp_path, str(tmp_path / "shared")).check()
    assert names(tmp_path / "shared") == []
