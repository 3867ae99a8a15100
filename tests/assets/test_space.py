"""A full disk is reported before work starts, and existing artifacts are kept."""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from pipelines.settings import Job
from resources.artifacts import ArtifactStore
from tests.conftest import Project, write_corpus

STAGES = [
    "raw_corpus",
    "corpus_tokens",
    "scoring",
    "a new scores.duckdb",
    "a new selections.duckdb",
    "reference/color_tau4/filtered_dataset",
    "reference/conditional_only_tau4/filtered_dataset",
    "reference/random/filtered_dataset",
]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_refresh_that_lacks_room_says_so_at_every_stage_and_goes_on_from_there(
    movable: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(home=str(movable.home.root))
    dataset = store.current("reference/color_tau4/filtered_dataset")
    write_corpus(tmp_path / "corpus", ["textwrap"])
    told: list[str] = []

    def usage(_: Path) -> Usage:
        """Full for every stage that has not met a full disk yet."""
        what = sys._getframe(1).f_locals["what"]
        if what in told:
            return Usage(10**9, 0, 10**9)
        told.append(what)
        return Usage(10**9, 10**9, 0)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    failures = 0
    while failure := movable.run(monkeypatch, Job.REFRESH):
        failures += 1
        assert failures <= len(STAGES)
        assert any(f"{what} takes about" in failure.message for what in told)
        assert "0.00 GB are free at " in failure.message
        assert "\n" not in failure.message
        assert dataset.path.exists()
    assert failures >= 5  # arms that have no room fail in the same run
    assert sorted(told) == sorted(STAGES)
    assert store.current("reference/color_tau4/filtered_dataset") != dataset
