"""A score store in a home of its own."""

from pathlib import Path

import pytest

from resources.home import Home
from resources.score_store import ScoreStore


@pytest.fixture
def store(tmp_path: Path) -> ScoreStore:
    Home(tmp_path / "home").claim("tests")
    return ScoreStore(home=str(tmp_path / "home"))
