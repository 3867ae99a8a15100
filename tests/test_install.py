"""install.py: pip's settings are passed to uv, and errors are one line."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from collections import namedtuple
from collections.abc import Callable
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
    assert "Python 3.11 to 3.13 is required" in wrong
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
    assert line.startswith(f"error: {tmp_path}/file/venv: cannot be written to (Not a directory)")
    assert "make VENV=" in line


def test_without_a_network_pip_is_tried_after_uv_and_the_end_is_told(tmp_path: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    nowhere |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}
    done = installed(tmp_path / "venv", **nowhere)
    assert done.returncode == 2
    assert "uv is not available" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "run the same command again" in last
    assert not (tmp_path / "venv" / ".installed").exists()


@pytest.fixture
def made(install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A virtual environment as `install` leaves it, but for what is installed by uv or pip."""

    def create(folder: Path, **_: object) -> None:
        (folder / "pyvenv.cfg").touch()
        (folder / "lib" / "python3" / "site-packages" / "pip").mkdir(parents=True)
        (folder / "bin").mkdir()
        (folder / "bin" / "pip").touch()
        (folder / "bin" / "python").symlink_to("/bin/true")

    monkeypatch.setattr(install.venv, "create", create)
    monkeypatch.setattr(install, "_by_uv", lambda *_: True)
    folder = tmp_path / "venv"
    assert install.main(folder, "dev") is None
    return folder


def stamps(folder: Path) -> set[str]:
    return {path.name for path in folder.glob(".install*")}


def test_with_an_extra_nothing_else_is_left_to_install(install: ModuleType, made: Path) -> None:
    assert stamps(made) == {".installed", ".installed-dev"}
    (made / ".installed-dev").unlink()
    assert install.main(made) is None
    assert stamps(made) == {".installed"}


def test_a_folder_with_other_files_is_left_alone(install: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    wrong = install.main(tmp_path)
    assert wrong == (
        f"{tmp_path}: is not a virtual environment and has other files; "
        "use another: make VENV=/tmp/venv"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def packages(folder: Path) -> Path:
    return folder / "lib" / "python3" / "site-packages"


def half_installed(interrupted: BaseException | None) -> Callable[[Path, object], bool]:
    """An installation by uv that leaves half a package; it fails or is interrupted."""

    def install(folder: Path, _: object) -> bool:
        (packages(folder) / "half").mkdir()
        if interrupted:
            raise interrupted
        return False

    return install


def test_an_interrupted_installation_is_made_anew(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    monkeypatch.setattr(install, "_by_uv", half_installed(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        install.main(made, "dev")
    assert stamps(made) == {".installed", ".installing"}
    monkeypatch.setattr(install, "_by_uv", lambda *_: True)
    assert install.main(made) is None
    assert {p.name for p in packages(made).iterdir()} == {"pip"}
    assert stamps(made) == {".installed"}


def test_pip_begins_anew_where_uv_left_half_a_package(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    monkeypatch.setattr(install, "_by_uv", half_installed(None))
    assert install.main(made, "dev") is None
    assert {p.name for p in packages(made).iterdir()} == {"pip"}


def test_a_python_that_is_gone_is_made_anew(install: ModuleType, made: Path) -> None:
    (made / "bin" / "python").unlink()
    (made / "bin" / "python").symlink_to("/not/there")
    (packages(made) / "of the old one").mkdir()
    assert install.main(made, "dev") is None
    assert {p.name for p in packages(made).iterdir()} == {"pip"}


def test_what_stands_is_kept_where_nothing_could_be_installed(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    (made / ".installed-dev").unlink()
    (packages(made) / "torch").mkdir()
    (made / "bin" / "python").unlink()
    (made / "bin" / "python").symlink_to("/bin/false")
    monkeypatch.setattr(install, "_ran", lambda command, *_: "pip" not in command)
    assert "run the same command again" in (install.main(made, "dev") or "")
    assert {p.name for p in packages(made).iterdir()} == {"pip", "torch"}
    assert stamps(made) == {".installed"}


def test_a_checkout_that_cannot_be_written_is_told(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(install.os, "access", lambda *_: False)
    assert (install.main(tmp_path / "venv") or "").startswith(f"{ROOT}: is not writable; clone")
    assert not list(tmp_path.iterdir())


def test_a_wheel_has_all_packages_and_their_files() -> None:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        setuptools = tomllib.load(stream)["tool"]["setuptools"]
    found = [
        file
        for top in ("assets", "colorfilter", "commands", "pipelines", "resources")
        for file in (ROOT / top).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    ]
    folders = {file.parent.relative_to(ROOT) for file in found if file.name == "__init__.py"}
    assert set(setuptools["packages"]) == {".".join(folder.parts) for folder in folders}
    data = {
        file
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for file in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    assert data == {file for file in found if file.suffix != ".py"}
