"""install.py: what uv is told of pip's settings, and what goes wrong in a line."""

import importlib.util
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
Version = namedtuple("Version", "major minor micro")


@pytest.fixture(scope="module")
def install() -> ModuleType:
    found = importlib.util.spec_from_file_location("install", ROOT / "install.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_a_variable_counts_most_and_a_command_more_than_all(install: ModuleType) -> None:
    listed = """\
:env:.cert='/etc/ssl/own.crt'
global.cert='/etc/ssl/all.crt'
global.find-links='/opt/wheels https://wheels.example/cpu'
global.timeout='60'
install.timeout='90'
"""
    assert install.pip_settings(listed) == {
        "cert": "/etc/ssl/own.crt",
        "find-links": "/opt/wheels https://wheels.example/cpu",
        "timeout": "90",
    }


def test_uv_is_told_what_pip_knows(install: ModuleType, tmp_path: Path) -> None:
    options, variables = install.uv_settings(
        {
            "index-url": "https://index.example/simple",
            "extra-index-url": f"file:///not/there file://{tmp_path}",
            "find-links": "/opt/a /opt/b",
            "constraint": "/etc/constraints.txt",
            "cert": "/etc/ssl/own.crt",
            "no-index": "true",
            "quiet": "1",
        }
    )
    assert options == [
        *("--default-index", "https://index.example/simple", "--index", f"file://{tmp_path}"),
        *("--find-links", "/opt/a", "--find-links", "/opt/b"),
        *("--constraints", "/etc/constraints.txt", "--index-strategy", "unsafe-best-match"),
        "--no-index",
    ]
    assert variables == {"SSL_CERT_FILE": "/etc/ssl/own.crt"}
    assert install.uv_settings({}) == ([], {})


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 14, 0)])
def test_a_python_that_is_too_old_or_new_is_refused(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: tuple[int, ...]
) -> None:
    monkeypatch.setattr(sys, "version_info", Version(*version))
    wrong = install.main(tmp_path / "venv")
    assert "Python 3.11 to 3.13 is needed" in wrong
    assert "make PYTHON=" in wrong
    assert not list(tmp_path.iterdir())


def installed(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "install.py", folder],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = installed(tmp_path / "file" / "venv")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/file/venv: cannot be written (Not a directory)")
    assert "make VENV=" in line


def test_without_a_network_pip_is_tried_after_uv_and_the_end_is_told(tmp_path: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    nowhere |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}
    done = installed(tmp_path / "venv", **nowhere)
    assert done.returncode == 2
    assert "uv cannot be had" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "run the same command again" in last
    assert not (tmp_path / "venv" / ".installed").exists()


def test_with_an_extra_nothing_else_is_left_to_install(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").touch()
    monkeypatch.setattr(install, "_by_uv", lambda *_: True)
    assert install.main(tmp_path, "dev") is None
    assert {p.name for p in tmp_path.glob(".installed*")} == {".installed", ".installed-dev"}
    (tmp_path / ".installed-dev").unlink()
    assert install.main(tmp_path) is None
    assert {p.name for p in tmp_path.glob(".installed*")} == {".installed"}
