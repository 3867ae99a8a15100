"""How assets report the progress of long work."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from assets.common import LISTENER, Progress


def test_what_an_earlier_run_did_is_in_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines, shown = 100.0, [], []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    listening = LISTENER.set(lambda *told: shown.append(told))
    context: Any = SimpleNamespace(
        op=SimpleNamespace(name="books__prior"), log=SimpleNamespace(info=lines.append)
    )
    progress = Progress(context, 1_000, "tokens")
    LISTENER.reset(listening)
    progress.stands(600)
    now += 20
    progress(100)
    assert lines == ["700 of 1,000 tokens, 5/s, 60 s left"]
    assert shown[-1] == ("books/prior", 700, 1_000, "tokens", 5.0)
