"""Make a virtual environment and install the project in it: `python3 install.py FOLDER [EXTRA]`.

Installs by uv, which takes a minute where pip takes five. Where uv cannot be had, installs by pip.
uv does not read pip's configuration, so what it says of indexes and certificates is handed on.
"""

from __future__ import annotations  # so that an older Python can say what is wrong

import ast
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST, NEWEST = (3, 11), (3, 13)
# pip's settings by uv's options. Each of several values, apart by spaces, is an option of its own.
OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraints",
    "trusted-host": "--allow-insecure-host",
}
VARIABLES = {"cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY", "default-timeout": "UV_HTTP_TIMEOUT"}


def main(folder: Path, extra: str = "") -> str | None:
    """Install; returns what is wrong, in a line."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        return (
            f"Python {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))} is needed, this "
            f"is {sys.version.split()[0]}; name another: make PYTHON=/path/to/python3.12"
        )
    python, done = folder / "bin" / "python", folder / f".installed{extra and '-'}{extra}"
    try:
        if not (folder / "bin" / "pip").exists():
            venv.create(folder, clear=folder.exists(), with_pip=True, symlinks=True)
        done.unlink(missing_ok=True)
    except OSError as error:
        return f"{folder}: cannot be written ({error.strerror}); name another: make VENV=/tmp/venv"
    except subprocess.CalledProcessError:
        return "this Python cannot install pip; install it (Debian: apt install python3-venv)"
    project = f"{ROOT}[{extra}]" if extra else str(ROOT)
    wanted = ["--editable", project, "--constraint", str(CONSTRAINTS)]
    print(f"installing into {folder}: about 600 MB to fetch, 2 GB on disk", flush=True)
    if not (_by_uv(python, wanted) or _ran([python, "-m", "pip", "install", "--quiet", *wanted])):
        return f"nothing more was installed in {folder} (see above); run the same command again"
    done.touch()
    (folder / ".installed").touch()  # an extra comes with all that is there without
    return None


def _by_uv(python: Path, wanted: list[str]) -> bool:
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    if not _ran([*pip, "install", "--quiet", "uv>=0.8"]):
        print("uv cannot be had; pip takes some minutes longer", flush=True)
        return False
    listed = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=True)
    settings = pip_settings(listed.stdout)
    options, variables = uv_settings(settings)
    install = [python, "-m", "uv", "pip", "install", "--compile-bytecode", "--python", python]
    install += [*wanted, *options]
    if not sys.stderr.isatty():
        install.append("--quiet")
    environment = {**variables, **os.environ}
    # Of torch's builds uv can choose the one for the machine's GPU, or for none. That asks torch's
    # own index, so it is left out where pip was told where to look.
    if not settings.keys() & {"index-url", "find-links", "no-index"}:
        environment.setdefault("UV_TORCH_BACKEND", "auto")
    if _ran(install, environment):
        return True
    print("uv could not install; trying pip, which takes some minutes longer", flush=True)
    return False


def pip_settings(listed: str) -> dict[str, str]:
    """Settings by name from what `pip config list` prints. A variable counts most."""
    found = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
    settings = {}
    for level in ("global.", "install.", ":env:."):
        for name, value in found.items():
            if name.startswith(level):
                settings[name.removeprefix(level)] = str(ast.literal_eval(value))
    return settings


def uv_settings(settings: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Uv's options and environment variables for pip's settings."""
    options = []
    for name, option in OPTIONS.items():
        for value in settings.get(name, "").split():
            # pip passes over a folder that is not there, uv does not.
            if not value.startswith("file:") or Path(value.removeprefix("file://")).exists():
                options += [option, value]
    if "--index" in options:  # pip prefers no index to another
        options += ["--index-strategy", "unsafe-best-match"]
    if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        options.append("--no-index")
    return options, {VARIABLES[n]: v for n, v in settings.items() if n in VARIABLES}


def _ran(command: list[str | Path], environment: dict[str, str] | None = None) -> bool:
    return subprocess.run(command, env=environment, check=False).returncode == 0


if __name__ == "__main__":
    wrong = main(Path(sys.argv[1]), *sys.argv[2:])
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(2)
