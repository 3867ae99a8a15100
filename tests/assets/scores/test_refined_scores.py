"""Scores in 16 bits, made exact at the cutoff: the selection is that of float32."""

from pathlib import Path

import polars as pl
import pytest

from assets.scores import refined_scores
from assets.scores.scores import REFINED
from colorfilter.compute import worker_calls
from colorfilter.selection.sql import fetch
from pipelines.graph import build_definitions
from resources.artifacts import Artifact, ArtifactStore
from resources.score_store import ScoreStore
from tests.assets.results import selection
from tests.conftest import Project, copy_of, made_since
from tests.reads import assert_declared, recorded

ARMS = [
    {"method": "color", "tau": 4},
    {"method": "color", "tau": 5, "batch": 20},
    {"method": "random"},
]


def current(project: Project, asset: str) -> Artifact:
    return ArtifactStore(home=str(project.home.root)).current(asset)


@pytest.fixture(scope="module")
def coarse(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The finished project, scored in 16 bits and refined."""
    project = copy_of(finished, tmp_path_factory.mktemp("coarse"))
    project.facts = {**finished.facts, "arms": ARMS, "scoring": {"precision": "bf16"}}
    project.write()
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert project.run(monkeypatch) is None
    return project


def test_what_is_read_where_scores_are_refined_is_declared(coarse: Project) -> None:
    reads = recorded(coarse.reads)
    assert ("reference/refined_scores",) in reads
    assert_declared(build_definitions(coarse.recipe, str(coarse.home.root)), reads)


@pytest.mark.skipif(not worker_calls.multiplies("bf16"), reason="no products in bf16 here")
def test_scores_in_bf16_select_as_those_in_float32(
    finished: Project, coarse: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, project = copy_of(finished, tmp_path), coarse
    exact.facts = {**finished.facts, "arms": ARMS}
    exact.write()
    assert exact.run(monkeypatch) is None

    facts = current(project, "reference/refined_scores").facts
    assert 0 < facts["score_error"] < 0.01 * facts["score_spread"]
    for arm in ("color_tau4", "color_tau5_batch20"):
        found, wanted = selection(project, arm), selection(exact, arm)
        places = ["shard", "position"]
        assert set(found.select(places).rows()) == set(wanted.select(places).rows())
        assert not found["score"].equals(wanted["score"])
        about = current(project, f"reference/{arm}/selection").facts
        assert about["near_cutoff"] > 0
        assert about["near_cutoff_not_refined"] == 0
    overlay = {"reference": current(project, "reference/refined_scores").path / REFINED}
    with ScoreStore(home=str(project.home.root)).read(overlay) as connection:
        counts = dict(fetch(connection, "SELECT precision, count(*) FROM losses GROUP BY ALL"))
    assert counts["float32"] == 2 * facts["refined"]
    assert counts["bf16"] > counts["float32"]

    # Nothing is loaded for another tau unless it is asked for: its selection says what it lacks.
    before, kernels = len(project.ledger()), len(project.kernel_runs())
    assert project.run(monkeypatch) is None
    assert made_since(project, before) == {}
    assert len(project.kernel_runs()) == kernels
    project.facts = {**project.facts, "arms": [{"method": "color", "tau": 9}, *ARMS]}
    project.facts["target"] = {**project.facts["target"], "training_tokens": 4_000}
    project.write()
    project.materialize(monkeypatch, ["reference/color_tau9/selection"])
    assert len(project.kernel_runs()) == kernels
    about = current(project, "reference/color_tau9/selection").facts
    assert 0 < about["near_cutoff_not_refined"] <= about["near_cutoff"]

    # Once refined, a selection reads it.
    lone = ["reference/color_tau9/selection"]
    project.materialize(monkeypatch, ["reference/refined_scores"])
    project.materialize(monkeypatch, lone)
    assert current(project, lone[0]).facts["near_cutoff_not_refined"] == 0


def test_sequences_are_gathered_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def dies(places: pl.DataFrame, tokens: object, seed: int, out: Path) -> None:
        out.mkdir()
        (out / "tokens.npy").write_bytes(b"half")
        calls.append(out)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("colorfilter.selection.dataset.write_tokens", dies)
    places = pl.DataFrame({"shard": ["a"], "position": [0]})
    with pytest.raises(KeyboardInterrupt):
        refined_scores.gathered(places, {}, tmp_path)
    assert not (tmp_path / "tokens").exists()
    for _ in range(2):
        assert refined_scores.gathered(places, {}, tmp_path) == tmp_path / "tokens"
    assert len(calls) == 2
