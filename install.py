"""Create a virtual environment and install the project: `python3 install.py FOLDER [EXTRA]`.

Installs with uv, which takes one minute where pip takes five, or with pip if uv is not available.
uv does not read pip's configuration, so pip's settings for indexes and certificates are passed on.
"""

from __future__ import annotations  # so that an older Python gets as far as the version check

import ast
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST, NEWEST = (3, 11), (3, 13)
INCOMPLETE = ".installing"  # a file that exists until the installation is complete
# pip's settings and the corresponding options of uv. An option is repeated for each value of a
# setting; pip separates values by spaces.
OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraints",
    "trusted-host": "--allow-insecure-host",
}
VARIABLES = {"cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY", "timeout": "UV_HTTP_TIMEOUT"}
VARIABLES["default-timeout"] = VARIABLES["timeout"]  # its name as an environment variable


def main(folder: Path, extra: str = "") -> str | None:
    """Install. Return None, or one line that says what went wrong."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        return (
            f"Python {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))} is required, "
            f"this is {sys.version.split()[0]}; use another: make PYTHON=/path/to/python3.12"
        )
    if not os.access(ROOT, os.W_OK):
        return f"{ROOT}: is not writable; clone the project to a folder of your own"
    with _locked():
        try:
            wrong = _prepare(folder)
        except OSError as error:
            wrong = f"cannot be written to ({error.strerror})"
        except subprocess.CalledProcessError:
            return "this Python cannot install pip; install it (Debian: apt install python3-venv)"
        if wrong:
            return f"{folder}: {wrong}; use another: make VENV=/tmp/venv"
        project = f"{ROOT}[{extra}]" if extra else str(ROOT)
        return _install(folder, ["--editable", project, "--constraint", str(CONSTRAINTS)], extra)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Wait until no other installation from this checkout is running, and block others."""
    root = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(root, fcntl.LOCK_EX)
        yield
    finally:
        os.close(root)


def _prepare(folder: Path) -> str | None:
    """Create the virtual environment, or rebuild one that is incomplete or lost its Python.

    Returns None, or what is wrong. Raises OSError if the folder is not writable, and
    CalledProcessError if pip cannot be installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    incomplete = (folder / INCOMPLETE).exists()
    if not (incomplete or (folder / "pyvenv.cfg").exists()) and any(folder.iterdir()):
        return "is not a virtual environment and has other files"
    (folder / INCOMPLETE).touch()
    if incomplete or not _ran([_python(folder), "-c", ""]):
        _make(folder)
    elif not (folder / "bin" / "pip").exists():
        venv.create(folder, with_pip=True, symlinks=True)
    return None


def _make(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != INCOMPLETE:
            entry.unlink()
    venv.create(folder, with_pip=True, symlinks=True)


def _install(folder: Path, wanted: list[str], extra: str) -> str | None:
    """Install with uv, or with pip if that fails. Return None, or what went wrong.

    Neither detects packages whose installation was interrupted. So the environment is rebuilt when
    that may have happened: here after uv has failed, and by `_prepare` if INCOMPLETE was left.
    """
    done = folder / f".installed{extra and '-'}{extra}"
    done.unlink(missing_ok=True)
    pip = [_python(folder), "-m", "pip", "--disable-pip-version-check"]
    print(f"installing into {folder}: 600 MB download, 2 GB on disk; more with CUDA", flush=True)
    has_uv = _ran([*pip, "install", "--quiet", "uv>=0.8"])
    before = _packages(folder)
    if not (has_uv and _by_uv(folder, wanted)):
        tried = "failed" if has_uv else "is not available"
        print(f"uv {tried}; trying pip, which takes a few minutes longer", flush=True)
        if _packages(folder) != before:
            _make(folder)
            before = _packages(folder)
        if not _ran([*pip, "install", "--quiet", *wanted]):
            if _packages(folder) == before:
                (folder / INCOMPLETE).unlink()
            return f"{folder}: installation failed (see above); run the same command again"
    done.touch()
    (folder / ".installed").touch()  # an extra includes the installation without extras
    (folder / INCOMPLETE).unlink()
    return None


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _packages(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("lib/python*/site-packages/*")}


def _by_uv(folder: Path, wanted: list[str]) -> bool:
    listed = subprocess.run(
        [_python(folder), "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    settings = pip_settings(listed.stdout)
    options, variables = uv_settings(settings)
    install = [_python(folder), "-m", "uv", "pip", "install", "--compile-bytecode"]
    install += ["--python", _python(folder), *wanted, *options]
    if not sys.stderr.isatty():
        install.append("--quiet")
    environment = {**variables, **os.environ}
    # uv can choose the build of torch for the machine's GPU, or for the CPU. This uses torch's own
    # index, so it is not done if pip is configured with an index.
    if not settings.keys() & {"index-url", "find-links", "no-index"}:
        environment.setdefault("UV_TORCH_BACKEND", "auto")
    return _ran(install, environment)


def pip_settings(listed: str) -> dict[str, str]:
    """Return settings by name from the output of `pip config list`. Variables take precedence."""
    found = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
    settings = {}
    for level in ("global.", "install.", ":env:."):
        for name, value in found.items():
            if name.startswith(level):
                settings[name.removeprefix(level)] = str(ast.literal_eval(value))
    return settings


def uv_settings(settings: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return uv's options and environment variables for pip's settings."""
    options = []
    for name, option in OPTIONS.items():
        for value in settings.get(name, "").split():
            # pip ignores a folder that does not exist; uv fails.
            if not value.startswith("file:") or Path(value.removeprefix("file://")).exists():
                options += [option, value]
    if "--index" in options:  # pip takes the best version of any index
        options += ["--index-strategy", "unsafe-best-match"]
    if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        options.append("--no-index")
    return options, {VARIABLES[n]: v for n, v in settings.items() if n in VARIABLES}


def _ran(command: list[str | Path], environment: dict[str, str] | None = None) -> bool:
    try:
        return subprocess.run(command, env=environment, check=False).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    if len(sys.argv) not in {2, 3}:
        sys.exit(__doc__)
    try:
        wrong = main(Path(sys.argv[1]), *sys.argv[2:])
    except KeyboardInterrupt:
        print("stopped; run the same command again", file=sys.stderr)
        sys.exit(130)
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(2)
