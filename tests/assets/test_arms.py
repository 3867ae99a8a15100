"""Every method of the paper from one recipe: what each selects, and that it trains a target."""

import polars as pl
import pytest

from assets.scores.cutoff_confidence import flips
from colorfilter import cost
from colorfilter.selection.sql import fetch
from pipelines.graph import build_definitions
from resources.artifacts import ArtifactStore
from resources.score_store import ScoreStore
from tests.conftest import Project, copy_of
from tests.reads import assert_declared, recorded

ARMS = [
    {"method": "color", "tau": 4},
    {"method": "color", "tau": 4, "batch": 16, "seeds": [1]},
    {"method": "conditional_only", "tau": 4, "seeds": [1]},
    {"method": "random"},
    {"method": "rho_down", "tau": 3, "seeds": [1]},
    {"method": "rho_down_prior", "tau": 3, "seeds": [1]},
    {"method": "dsir", "seeds": [1]},
    {"method": "full", "seeds": [1]},
]
NEEDED = 8_000 // 32
SELECTED = NEEDED + NEEDED // 20


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = copy_of(finished, tmp_path_factory.mktemp("arms"))
    project.facts = {**finished.facts, "arms": ARMS}
    project.write()
    with pytest.MonkeyPatch.context() as monkeypatch:
        failure = project.run(monkeypatch)
    assert failure is None, failure
    return project


@pytest.fixture(scope="module")
def artifacts(project: Project) -> ArtifactStore:
    return ArtifactStore(home=str(project.home.root))


def chosen(artifacts: ArtifactStore, arm: str) -> pl.DataFrame:
    folder = artifacts.current(f"reference/{arm}/selection").path
    return pl.read_parquet(folder / "selection.parquet")


def test_every_arm_selects_with_ranks_and_trains_on_as_many_tokens(
    project: Project, artifacts: ArtifactStore
) -> None:
    report = artifacts.current("reference/report").path
    losses = pl.read_parquet(report / "evaluations.parquet").filter(metric="held_out_loss")
    for arm in project.recipe.arms:
        table = chosen(artifacts, arm.name)
        assert table.columns == ["rank", "shard", "position", "score", "color"]
        assert table["rank"].to_list() == list(range(1, len(table) + 1))
        assert table.select("shard", "position").is_unique().all()
        assert len(table) >= NEEDED
        mine = losses.filter(arm=arm.name)
        assert mine["tokens"].min() == NEEDED * 32
        assert set(mine["seed"]) == set(project.recipe.seeds(arm))
    with ScoreStore(home=str(project.home.root)).read() as connection:
        published = fetch(
            connection,
            "SELECT arm, count(*) FROM selected.selections "
            "JOIN selected.selection_versions USING (selection) WHERE current GROUP BY arm",
        )
    assert dict(published) == {a.name: len(chosen(artifacts, a.name)) for a in project.recipe.arms}


def test_assets_of_every_method_read_exactly_what_they_declare(
    project: Project, finished: Project
) -> None:
    """By both runs: what stood before the second run was not made in it."""
    reads = recorded(project.reads)
    for step, found in recorded(finished.reads).items():
        if step in reads:  # the losses are other steps, with another model
            reads[step] |= found
    assert_declared(build_definitions(project.recipe, str(project.home.root)), reads)


def test_what_stood_before_the_arms_came_is_not_computed_again(project: Project) -> None:
    made: dict[str, int] = {}
    for entry in project.ledger():
        made[entry["asset"]] = made.get(entry["asset"], 0) + (not entry["reused"])
    shards = len(project.home.shards()) + 1
    assert made["prior_model"] == made["reference/conditional_model"] == 1
    assert made["prior_scores"] == made["reference/domain_only_scores"] == shards
    assert made["reference/color_tau4/target_model"] == 2
    assert made["reference/cutoff_confidence"] == 2  # a second conditional, and its losses


def test_full_trains_on_everything_and_random_on_a_part_of_it(
    project: Project, artifacts: ArtifactStore
) -> None:
    full = chosen(artifacts, "full")
    assert len(full) == artifacts.current("reference/full/selection").facts["candidates"]
    assert (
        chosen(artifacts, "random")["score"].to_list()
        == full["score"][: project.recipe.with_spare(project.recipe.arm("random"))].to_list()
    )
    kept = artifacts.current("reference/full/filtered_dataset").facts["sequences"]
    assert kept <= len(full)
    target = artifacts.current("reference/full/target_model", "seed_1")
    assert [int(n) for n in target.facts["checkpoints"]] == [NEEDED * 32, kept * 32]


def test_the_proxies_choose_by_their_own_conditional(artifacts: ArtifactStore) -> None:
    alone, with_prior = (chosen(artifacts, f"rho_down{p}_tau3") for p in ("", "_prior"))
    assert len(alone) == len(with_prior) == SELECTED
    assert not alone.equals(with_prior)
    facts = artifacts.current("reference/rho_down_prior_tau3/selection")
    assert facts.facts["candidates"] == 3 * SELECTED
    assert not (facts.path / "pool").exists()
    # The proxy has learnt of the corpus, so what it chooses has lower color than the corpus.
    assert with_prior["color"].mean() < chosen(artifacts, "full")["color"].mean() - 0.01


def test_a_dsir_dataset_is_whole_documents_in_the_order_drawn(artifacts: ArtifactStore) -> None:
    selection = artifacts.current("reference/dsir/selection")
    drawn = pl.read_parquet(selection.path / "packed" / "documents.parquet")
    assert len(drawn) == selection.facts["documents"]
    assert chosen(artifacts, "dsir")["score"].is_sorted()
    plan = pl.read_parquet(artifacts.current("sample_plan").path / "documents.parquet")
    assert not set(drawn["sha256"]) & set(plan["sha256"])
    dataset = artifacts.current("reference/dsir/filtered_dataset").path
    texts = pl.read_parquet(dataset / "documents" / "*.parquet")
    whole = texts.join(drawn.select("doc_id", whole="text"), on="doc_id")
    assert len(whole) == len(texts)
    cut = whole.filter(pl.col("text") != pl.col("whole"))
    assert len(cut) <= 1  # the last one, where training_tokens end


def test_a_second_run_computes_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    before, kernels = len(project.ledger()), len(project.kernel_runs())
    assert project.run(monkeypatch) is None
    assert [e["asset"] for e in project.ledger()[before:] if not e["reused"]] == []
    assert len(project.kernel_runs()) == kernels


def test_the_confidence_at_the_cutoff_is_told_for_what_losses_rank(
    project: Project, artifacts: ArtifactStore
) -> None:
    made = artifacts.current("reference/cutoff_confidence")
    tables = ScoreStore(home=str(project.home.root))
    found = flips(artifacts, tables, project.recipe, project.recipe.domains[0])
    rows = {r["arm"]: r for r in found}
    assert rows.keys() == {"color_tau4", "conditional_only_tau4"}
    for row in rows.values():
        assert row["selected"] == row["sampled"] // 4
        assert 0 < row["flips"] < row["selected"] / 2
        assert row["correlation"] > 0.8
    assert not (made.path / "sample").exists()


def test_what_every_arm_trains_on_is_predicted_to_the_token(
    project: Project, artifacts: ArtifactStore
) -> None:
    candidates = artifacts.current("reference/full/selection").facts["selected"]
    sizes = cost.sizes_of(project.recipe, corpus_tokens=candidates * 32)
    trained = [r for r in project.kernel_runs() if r["verb"] == "train"]
    for stage in cost.predict(project.recipe, sizes):
        if stage.asset.endswith(("/selection", "/target_model")):
            runs = [r["tokens"] for r in trained if f"/{stage.asset}/" in r["folder"]]
            assert len(runs) == stage.runs, stage.asset
            assert sum(runs) == stage.tokens, stage.asset
