"""Call the command line in the test's process."""

import pytest

from tests.program import Caller


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Caller:
    return Caller(monkeypatch)
