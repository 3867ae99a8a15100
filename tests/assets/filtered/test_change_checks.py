"""Checks of a new selection against the last one: they warn, or block the dataset."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.filtered.change_checks import CHECK
from colorfilter.config.recipe import Recipe
from colorfilter.selection.sql import fetch
from pipelines.graph import build_definitions
from pipelines.run import Failure
from pipelines.settings import Job
from resources.artifacts import ArtifactStore
from resources.score_store import ScoreStore
from tests.conftest import Project, write_corpus

ARM = "reference/color_tau4"


def checked(arm: str = ARM) -> Any:
    """The latest evaluation of an arm's check."""
    key = dg.AssetCheckKey(dg.AssetKey([*arm.split("/"), "selection"]), CHECK)
    with dg.DagsterInstance.get() as instance:
        records = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])
        return records[key].event.dagster_event.event_specific_data


def published(project: Project) -> str:
    """The fingerprint of the arm's current published selection."""
    with ScoreStore(home=str(project.home.root)).read() as connection:
        query = (
            "SELECT selection FROM selected.selection_versions WHERE arm = 'color_tau4' AND current"
        )
        ((selection,),) = fetch(connection, query)
    return selection


def limit(project: Project, **limits: Any) -> None:
    project.facts["refresh"] = {"limits": limits}
    project.write()


def test_what_is_standing_is_within_the_limits(
    movable: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(movable, overlap=1, drift=0, source_shift=0, beyond="block")
    assert movable.run(monkeypatch, Job.RESELECT) is None
    assert checked().description == "identical to the last published selection"
    assert checked().passed


def test_a_refresh_is_compared_with_the_last_selection(
    movable: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = published(movable)
    write_corpus(tmp_path / "corpus", ["textwrap"])
    assert movable.run(monkeypatch, Job.REFRESH) is None
    assert published(movable) != before
    found = checked()
    assert found.passed
    assert found.description == "within the limits"
    shown = {name: value.value for name, value in found.metadata.items()}
    with ScoreStore(home=str(movable.home.root)).read() as connection:
        ids = "SELECT shard, position FROM selected.selections WHERE selection = ?"
        old = set(fetch(connection, ids, [before]))
        new = set(fetch(connection, ids, [published(movable)]))
    assert (shown["entering"], shown["leaving"]) == (len(new - old), len(old - new))
    assert shown["overlap"] == pytest.approx(len(new & old) / min(len(new), len(old)))
    assert shown["new shards"] == 1
    assert 0 < abs(shown["drift"]) < 0.5
    apart = shown["mean score in new shards"] - shown["mean score in other shards"]
    assert apart * shown["drift"] > 0
    assert shown["sequences in new shards"] > 0
    (source,) = found.metadata["shares of tokens"].records
    assert source.data == {"source": "code", "now": 1.0, "last": 1.0}
    assert "data:image/svg+xml;base64," in shown["scores of new shards"]


BEYOND = [
    ({"overlap": 1}, "overlap 0."),
    ({"drift": 0}, "the scores of new shards drifted by"),
    ({"source_shift": 0.1}, "a source's share moved by"),
]


def test_beyond_a_limit_the_last_dataset_stands_or_it_is_told(
    movable: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = ArtifactStore(home=str(movable.home.root))
    dataset, before = artifacts.current(f"{ARM}/filtered_dataset"), published(movable)
    write_corpus(tmp_path / "other", ["textwrap", "shlex", "difflib"])
    movable.facts["corpus"]["sources"].append(
        {"name": "other", "files": str(tmp_path / "other" / "*.jsonl")}
    )
    for limits, words in BEYOND:
        limit(movable, **{"source_shift": 1, "drift": 9, "overlap": 0, **limits}, beyond="block")
        failure = movable.run(monkeypatch, Job.REFRESH)
        assert isinstance(failure, Failure)
        assert failure.input_is_wrong
        assert [other for _, other in BEYOND if other in failure.message] == [words]
        assert "relax refresh.limits in the recipe" in failure.message
        assert artifacts.current(f"{ARM}/filtered_dataset") == dataset
        assert dataset.path.exists()
        assert published(movable) == before

    limit(movable, overlap=1, drift=0, source_shift=0.1, beyond="warn")
    assert movable.run(monkeypatch, Job.REFRESH) is None
    assert not checked().passed
    for _, words in BEYOND:
        assert words in checked().description
    assert checked().severity == dg.AssetCheckSeverity.WARN
    assert published(movable) != before
    assert movable.run(monkeypatch, Job.REFRESH) is None
    assert checked().description == "identical to the last published selection"


def test_after_other_models_scores_are_not_said_to_drift(
    movable: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    movable.facts["domains"][0]["training"] = {"learning_rate": 2e-3, "batch_sequences": 32}
    limit(movable, drift=0, overlap=0, beyond="block")
    write_corpus(tmp_path / "corpus", ["textwrap"])
    movable.materialize(monkeypatch, ["reference/conditional_model"])
    assert movable.run(monkeypatch, Job.REFRESH) is None
    assert checked().passed
    assert "drift" not in checked().metadata
    assert "overlap" in checked().metadata


def test_a_dataset_is_late_as_the_recipe_says(finished: Project) -> None:
    facts = {**finished.facts, "refresh": {"stale_after_hours": 36}}
    key = dg.AssetKey(["reference", "color_tau4", "filtered_dataset"])
    for recipe, hours in ((Recipe.model_validate(facts), 36), (finished.recipe, None)):
        specs = build_definitions(recipe, "/nowhere").resolve_asset_graph().get(key)
        policy = specs.freshness_policy
        assert (policy and policy.fail_window.to_timedelta().total_seconds() / 3600) == hours
