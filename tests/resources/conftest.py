"""A score store in a temporary home."""

from pathlib import Path

import pytest

from resources.home import Home
from resources.score_store import ScoreStore


@pytest.fixture
def store(tmp_path: Path) -> ScoreStore:
    Home(tmp_path / "home").claim("tests")
    return ScoreStore(home=str(tmp_path / "home"))
