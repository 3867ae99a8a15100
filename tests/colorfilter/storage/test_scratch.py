"""Temporary folders that are deleted with the last process that uses them."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from colorfilter.errors import InputError
from colorfilter.storage.scratch import held, scratch, sweep

HOLD = """
import sys, time
from colorfilter.storage.scratch import held
with held(sys.argv[1]) as folder:
    folder.mkdir(exist_ok=True)
    (folder / "text").touch()
    folder.with_suffix(".part").mkdir(exist_ok=True)
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"colorfilter-{os.getuid()}"


def there(own: Path) -> set[str]:
    return {p.name for p in own.iterdir()} - {"scratch.lock"}


def test_a_scratch_folder_is_empty_and_goes(own: Path) -> None:
    with scratch() as one, scratch() as two:
        assert one != two
        assert list(one.iterdir()) == []
        (one / "file").touch()
    assert there(own) == set()


def test_a_folder_goes_with_the_last_that_holds_it(own: Path) -> None:
    with held("shared") as one:
        one.mkdir()
        with held("shared") as two:
            assert two == one
        assert one.exists()
    assert there(own) == set()


def test_what_a_killed_process_left_goes_with_the_next(own: Path) -> None:
    command = [sys.executable, "-c", HOLD]
    processes = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True)
        for name in ("dead", "at-work")
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    dead, at_work = processes
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    with scratch():
        pass
    assert there(own) == {"scratch-at-work", "scratch-at-work.held", "scratch-at-work.part"}
    at_work.kill()
    at_work.wait()
    sweep()
    assert there(own) == set()


def test_a_folder_that_others_may_write_to_is_refused(own: Path) -> None:
    own.mkdir()
    own.chmod(0o777)
    with pytest.raises(InputError, match="accessible to other users"), scratch():
        pass


def test_a_folder_that_is_a_link_is_refused(own: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="accessible to other users"):
        sweep()
