"""The asset graph: a snapshot, and a guard over its partition mappings."""

import json
import os
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.asset_graph_view.asset_graph_view import AssetGraphView

from assets.common import SHARDS
from colorfilter.config.load import load
from colorfilter.config.recipe import Recipe
from colorfilter.cost import METHODS
from colorfilter.stages import Stage
from pipelines.graph import build_definitions
from pipelines.settings import recipe_path
from resources.artifacts import RECIPE
from resources.exclusions import EXCLUSION
from tests.conftest import recipe_facts

SNAPSHOT = Path(__file__).with_name("graph.json")


def sample() -> dg.Definitions:
    return build_definitions(load(recipe_path("sample")), "/nowhere")


def with_everything() -> dg.Definitions:
    """Every asset that a recipe can ask for: all methods, 16 bits, fine-tuning, both domains."""
    facts = recipe_facts(Path("/nowhere"))
    training = facts["domains"][0]["training"]
    quiz = {"name": "quiz", "tasks": [{"name": "piqa", "train": "a", "test": "b"}]}
    facts["domains"] = [*facts["domains"], {**quiz, "training": training}]
    facts["arms"] = [
        {"method": method, "tau": 4} if parts.scores else {"method": method}
        for method, parts in METHODS.items()
    ]
    facts["scoring"] = {"precision": "bf16"}
    facts["evaluation"] = {**facts["evaluation"], "finetune": True}
    return build_definitions(Recipe.model_validate(facts), "/nowhere")


@pytest.fixture(params=[sample, with_everything])
def definitions(request: pytest.FixtureRequest) -> dg.Definitions:
    made: dg.Definitions = request.param()
    return made


def describe(defs: dg.Definitions) -> dict[str, Any]:
    graph = defs.resolve_asset_graph()
    described = {}
    for key in sorted(graph.get_all_asset_keys(), key=str):
        node = graph.get(key)
        described[key.to_user_string()] = {
            "group": node.group_name,
            "kinds": sorted(node.kinds),
            "partitioned": node.is_partitioned,
            "pools": sorted(node.pools or []),
            "parents": {
                parent.to_user_string(): type(
                    node.partition_mappings.get(parent)
                ).__name__.removesuffix("PartitionMapping")
                for parent in sorted(node.parent_keys, key=str)
            },
            "checks": sorted(c.name for c in graph.asset_check_keys if c.asset_key == key),
        }
    return described


def test_the_graph_has_not_changed_by_accident() -> None:
    """After a change that is meant: UPDATE_SNAPSHOT=1 pytest tests/assets/test_graph.py."""
    described = describe(sample())
    if os.environ.get("UPDATE_SNAPSHOT"):
        SNAPSHOT.write_text(json.dumps(described, indent=1) + "\n")
    assert described == json.loads(SNAPSHOT.read_text())


def test_every_asset_is_described_and_owned(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description, key
        assert node.owners, key
        assert node.kinds, key
        assert node.code_version, key


def test_no_dependency_asks_for_partitions_that_do_not_exist(definitions: dg.Definitions) -> None:
    """Identity is the default mapping; between unequal key sets it only fails at launch."""
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(SHARDS.name or "", ["a", "b", "_probe_reference"])
        view = AssetGraphView.for_test(definitions, instance)
        for key in view.asset_graph.get_all_asset_keys():
            wanted = view.get_full_subset(key=key)
            for parent in view.asset_graph.get(key).parent_keys:
                _, missing = view.compute_parent_subset_and_required_but_nonexistent_subset(
                    parent, wanted
                )
                assert missing.is_empty, f"{key} asks {parent} for what does not exist"


def test_unsharded_assets_depend_on_every_shard(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        for parent in node.parent_keys:
            if graph.get(parent).is_partitioned and not node.is_partitioned:
                mapping = node.partition_mappings.get(parent)
                assert isinstance(mapping, dg.AllPartitionMapping), f"{parent} -> {key}"


def test_a_domain_cannot_have_the_name_of_an_asset() -> None:
    """Its folders would be taken for the asset's."""
    keys = with_everything().resolve_asset_graph().get_all_asset_keys()
    names = {name for key in keys for name in (key.path[0], key.path[-1])}
    domains = {"reference", "quiz"}
    assert domains < names
    assert names - domains <= set(Stage)
    assert {RECIPE, EXCLUSION} <= set(Stage)
