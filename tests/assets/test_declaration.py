"""What assets declare is the same for Dagster and the ledger, and matches what they read."""

from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from assets.declaration import Declaration, Read, Shards, asset
from pipelines.graph import build_definitions
from resources.artifacts import Artifact, ArtifactStore, Work
from resources.exclusions import EXCLUSION
from resources.home import Home
from tests.conftest import Project
from tests.reads import assert_declared, recorded

DECLARED = Declaration(
    "books/color/model",
    "evaluated",
    {"pytorch"},
    inputs=[Read("tokenizer"), Read("corpus_tokens", Shards.ALL)],
    consults=[Read("score_tables")],
    settings={"rate": 0.1},
    code=2,
    seed=1,
    precision="bf16",
)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(home=str(Home(tmp_path / "home").claim("tests").root))


def made(store: ArtifactStore, name: str, partition: str | None = None) -> Artifact:
    def write(folder: Path) -> dict[str, int]:
        (folder / "tokens").mkdir()
        (folder / "tokens" / "rows").write_text(name)
        return {}

    return store.make(Work(name, partition), write)


def test_the_ledger_and_dagster_are_told_the_same(store: ArtifactStore) -> None:
    inputs = [made(store, "tokenizer"), made(store, "corpus_tokens", "s0")]
    assert DECLARED.work(inputs) == Work(
        "books/color/model",
        inputs=inputs,
        recipe={"rate": 0.1},
        code=2,
        seed=1,
        precision="bf16",
    )

    @asset(DECLARED)
    def model() -> None:
        """What it is."""

    (spec,) = model.specs
    assert spec.key == dg.AssetKey(["books", "color", "model"])
    assert spec.code_version == DECLARED.code_version
    assert spec.description == "What it is."
    mappings = {dep.asset_key.to_user_string(): type(dep.partition_mapping) for dep in spec.deps}
    assert mappings == {
        "tokenizer": type(None),
        "corpus_tokens": dg.AllPartitionMapping,
        "score_tables": type(None),
    }


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"rate": 0.2}},
        {"code": 3},
        {"seed": 2},
        {"precision": "float32"},
        {"inputs": [Read("tokenizer")]},
    ],
)
def test_what_decides_the_content_decides_the_code_version(change: dict) -> None:
    assert replace(DECLARED, **change).code_version != DECLARED.code_version


def test_what_is_consulted_or_said_does_not_decide_the_code_version() -> None:
    other = replace(DECLARED, consults=[], description="other words", pool="gpu")
    assert other.code_version == DECLARED.code_version


def test_settings_and_seed_of_a_partition_take_the_place_of_the_declared() -> None:
    work = DECLARED.work([], "seed_4", settings={"ends": [1, 2]}, seed=4)
    assert (work.partition, work.recipe, work.seed) == ("seed_4", {"ends": [1, 2]}, 4)
    assert DECLARED.work([], settings={}).recipe == {}
    assert DECLARED.work([], seed=0).seed == 0


def test_what_is_not_declared_is_not_read(store: ArtifactStore) -> None:
    prior = made(store, "prior_model")
    with pytest.raises(ValueError, match="books/color/model reads prior_model, which is not"):
        DECLARED.current(store, "prior_model")
    with pytest.raises(ValueError, match="prior_model"):
        DECLARED.work([prior])
    with pytest.raises(ValueError, match="prior_model"):
        DECLARED.work([], sources=[prior])


def test_a_part_of_an_input_and_a_forgotten_document_are_declared(store: ArtifactStore) -> None:
    part = made(store, "tokenizer").part("tokens")
    gone = made(store, EXCLUSION, "0123")
    assert DECLARED.work([part, gone]).inputs == [part, gone]


def test_assets_read_exactly_what_they_declare(finished: Project) -> None:
    """In a run of every stage; for other methods see test_arms, for tasks test_tasks."""
    definitions = build_definitions(finished.recipe, str(finished.home.root))
    reads = recorded(finished.reads)
    keys = definitions.resolve_asset_graph().get_all_asset_keys()
    made = {asset for step in reads for asset in step}
    # A domain's text is read from its sources, which are no assets.
    assert made == {key.to_user_string() for key in keys} - {"reference/domain_text"}
    assert_declared(definitions, reads)
