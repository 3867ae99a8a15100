import hashlib
import os
import shutil
from pathlib import Path

import pytest

from colorfilter.storage.files import (
    TAIL,
    append_line,
    file_sha256,
    is_locked,
    lock,
    require_space,
    write_atomically,
    write_text_atomically,
)


@pytest.mark.parametrize("data", [b"", b"abc", b"\x00\xff" * 300_000])
def test_the_hash_is_of_the_whole_content(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_a_temporary_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "a.tmp").write_text("new")
    write_atomically(tmp_path / "a.tmp", tmp_path / "a")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "new"}


def test_the_content_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tmp").write_text("new")
    synced: list[bool] = []

    def fsync(descriptor: int) -> None:
        synced.append((tmp_path / "a").exists())
        assert os.fstat(descriptor).st_ino == (tmp_path / "a.tmp").stat().st_ino

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "a.tmp", tmp_path / "a")
    assert synced[:1] == [False]


def test_a_text_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_text_atomically(path, "größe\n")
    assert path.read_bytes() == "größe\n".encode()

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomically(path, "other")
    assert path.read_bytes() == "größe\n".encode()


def test_what_does_not_fit_on_the_disk_is_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path, 1000, "a run")
    with pytest.raises(OSError, match=r"a run takes about .* GB are free at .*; make"):
        require_space(tmp_path, 2 * free, "a run")


def test_a_lock_is_seen_while_it_is_held(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "a")
    with lock(tmp_path / "a"):
        assert is_locked(tmp_path / "a")
    assert not is_locked(tmp_path / "a")


@pytest.mark.parametrize("size", [0, 1, TAIL - 1, TAIL, TAIL + 1, 50_000])
@pytest.mark.parametrize("left", [b"", b"x", b"x" * 10_000])
def test_the_last_whole_line_is_found_and_what_a_crash_left_is_replaced(
    size: int, left: bytes, tmp_path: Path
) -> None:
    path, last = tmp_path / "lines", b"l" * size + b"\n"
    path.write_bytes(b"first\n" + last + left)
    append_line(path, lambda line: f"next after {len(line)}")
    assert path.read_bytes() == b"first\n" + last + b"next after %d\n" % len(last)


def test_a_file_without_a_whole_line_has_no_last_one(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"cut")
    append_line(tmp_path / "lines", repr)
    assert (tmp_path / "lines").read_bytes() == b"b''\n"
