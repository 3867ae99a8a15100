"""Read what the pipeline selected, and select once at any tau."""

from typing import Any

import polars as pl
import pytest

from pipelines.run import Failure, select
from resources.artifacts import ArtifactStore
from tests.conftest import Project


def selection(project: Project, arm: str) -> pl.DataFrame:
    artifact = ArtifactStore(home=str(project.home.root)).current(f"reference/{arm}/selection")
    return pl.read_parquet(artifact.path / "selection.parquet")


def run_select(
    project: Project, monkeypatch: pytest.MonkeyPatch, **choice: Any
) -> Failure | dict[str, Any]:
    monkeypatch.setenv("DAGSTER_HOME", str(project.home.claim(project.recipe.name).dagster))
    choice = {"domain": "reference", "tokens": 2_000, **choice}
    return select(project.recipe, project.home, lambda _: None, choice)


def places(frame: pl.DataFrame) -> set[tuple[str, int]]:
    return set(frame.select("shard", "position").rows())
