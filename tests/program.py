"""Run `colorfilter` commands in a process of their own, or in the test's process."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands import cli, options

REPOSITORY = Path(__file__).resolve().parent.parent
Done = subprocess.CompletedProcess[str]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "commands.cli", *arguments]


def colorfilter(*arguments: str, **environment: str) -> Done:
    """Run a command to its end, in a process of its own."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "200", **environment},
        cwd=REPOSITORY,
        check=False,
    )


class Caller:
    """Calls commands in this process, where what takes seconds to load is loaded already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: str) -> Done:
        for name in ("DAGSTER_HOME", "COLORFILTER_HOME", "COLORFILTER_RECIPE"):  # which it sets
            self._monkeypatch.setenv(name, os.environ.get(name, ""))
            self._monkeypatch.delenv(name)
        err = io.StringIO()
        # sys.stderr stays: where it is another, a logging handler of absl closes the one it has.
        options.errors.file = err
        try:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                code = cli.call(list(arguments))
        finally:
            options.errors.file = None  # which is sys.stderr, whatever that is then
        return Done(list(arguments), code, out.getvalue(), err.getvalue())
