"""Edit one value of the recipe: what is computed again, and what the web UI calls out of date.

`pytest -s` prints both, side by side.
"""

import json
from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest
from dagster._core.asset_graph_view.asset_graph_view import AssetGraphView
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus

from assets.common import SHARDS
from pipelines.graph import build_definitions
from pipelines.run import bring_in
from tests.conftest import Project, copy_of, made_since

pytestmark = pytest.mark.slow

DATASET = ("selection", "leakage", "filtered_dataset")
MODEL = ("target_model", "evaluation")


def of(arms: list[str], parts: tuple[str, ...]) -> set[str]:
    return {f"reference/{arm}/{part}" for arm in arms for part in parts}


def set_tau(facts: dict[str, Any]) -> None:
    facts["arms"][0]["tau"] = 6


def set_domain_rate(facts: dict[str, Any]) -> None:
    facts["domains"][0]["training"]["learning_rate"] = 2e-3


def set_prior_rate(facts: dict[str, Any]) -> None:
    facts["prior"]["training"]["learning_rate"] = 2e-3


def set_target_rate(facts: dict[str, Any]) -> None:
    facts["target"]["training"]["learning_rate"] = 2e-3


def set_seeds(facts: dict[str, Any]) -> None:
    facts["evaluation"]["seeds"] = [1, 2, 3]


def set_schedule(facts: dict[str, Any]) -> None:
    facts["refresh"] = {"cron": "0 5 * * *", "limits": {"overlap": 0.1}}


def called_stale(project: Project) -> set[str]:
    """What the web UI marks as out of date or missing, with the recipe as it is."""
    defs = build_definitions(project.recipe, str(project.home.root))
    graph = defs.resolve_asset_graph()
    found = set()
    with dg.DagsterInstance.get() as instance:
        shards = instance.get_dynamic_partitions(str(SHARDS.name))
        view = AssetGraphView.for_test(defs, instance)
        resolver = CachingStaleStatusResolver(instance, graph, view)
        for key in graph.materializable_asset_keys:
            partitions = shards if graph.get(key).is_partitioned else [None]
            if any(resolver.get_status(key, p) != StaleStatus.FRESH for p in partitions):
                found.add(key.to_user_string())
    return found


SCORED = ["color_tau4", "conditional_only_tau4"]
REPORT = {"reference/report"}
# What follows from another conditional. Of random the dataset is written anew, for the colors in
# it, and no model is trained.
FROM_CONDITIONAL = {
    "reference/conditional_model",
    "reference/conditional_scores",
    "reference/cutoff_confidence",
    "score_tables",
    *of(SCORED, DATASET + MODEL),
    *of(["random"], DATASET),
    *REPORT,
}


EDITS = [
    (set_schedule, set(), set()),
    (
        set_target_rate,
        of([*SCORED, "random"], MODEL) | REPORT,
        of([*SCORED, "random"], ("target_model",)),
    ),
    (
        set_domain_rate,
        FROM_CONDITIONAL,
        {"reference/conditional_model", "reference/cutoff_confidence"},
    ),
    (set_prior_rate, FROM_CONDITIONAL | {"prior_model", "prior_scores"}, {"prior_model"}),
    (  # conditional_only has seeds of its own
        set_seeds,
        of(["color_tau4", "random"], MODEL) | REPORT,
        of(["color_tau4", "random"], ("target_model",)),
    ),
    (
        set_tau,
        of(["color_tau6"], DATASET + MODEL) | REPORT,
        of(["color_tau6"], DATASET + MODEL) | REPORT,
    ),
]


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The finished project, to be edited again and again."""
    project = copy_of(finished, tmp_path_factory.mktemp("edits"))
    project.facts = json.loads(json.dumps(finished.facts))  # no part is shared
    return project


@pytest.mark.parametrize(("edit", "computed", "marked"), EDITS)
def test_only_what_depends_on_an_edit_is_computed_again(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    edit: Callable[[dict[str, Any]], None],
    computed: set[str],
    marked: set[str],
) -> None:
    """Dagster marks where a change begins, and not what follows from it."""
    monkeypatch.setenv("DAGSTER_HOME", str(project.home.dagster))
    bring_in(project.recipe, project.home)
    assert called_stale(project) == set()  # nor is anything after the edit before
    edit(project.facts)
    project.write()
    stale, before = called_stale(project), len(project.ledger())
    assert project.run(monkeypatch) is None
    made = set(made_since(project, before))
    print(f"\n{edit.__name__}")
    for asset in sorted(stale | made):
        words = "computed" if asset in made else "", "marked" if asset in stale else ""
        print(f"  {asset:<48} {words[0]:<10} {words[1]}")
    assert made == computed
    assert stale == marked


def test_nothing_is_marked_after_the_last_edit(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(project.home.dagster))
    assert called_stale(project) == set()
