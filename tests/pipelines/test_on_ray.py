"""The pipeline on a Ray cluster of three nodes, started and cancelled from the web server."""

from collections.abc import Iterator
from typing import Any

import pytest

from resources.artifacts import ArtifactStore
from tests.conftest import Project, copy_of
from tests.pipelines.scoring_runs import (
    chunks,
    every_shard,
    forget_scores,
    mid_scoring,
    whole_once,
)
from tests.pipelines.server import Server, serving, wait_for
from tests.three_nodes import loopback_only, three_nodes, workers_at_work

pytestmark = pytest.mark.slow

EVENTS = """
    query($id: ID!) {logsForRun(runId: $id) {... on EventConnection {events {
        ... on MessageEvent {message}
        ... on MaterializationEvent {
            assetKey {path} partition
            metadataEntries {label ... on JsonMetadataEntry {jsonString}}
        }
    }}}}
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with loopback_only(), three_nodes() as nodes:
        yield nodes


@pytest.fixture
def project(nodes: Any, finished: Project, tmp_path: Any) -> Project:
    """The finished project, scored on this machine; from now on on the cluster."""
    made = copy_of(finished, tmp_path)
    made.facts = {**made.facts, "compute": {"backend": "ray", "address": nodes.address}}
    made.write()
    return made


@pytest.fixture
def server(project: Project) -> Iterator[Server]:
    with serving(project.path, project.home.root) as server:
        yield server


def prior_losses(project: Project) -> dict[str | None, str]:
    """Fingerprints of the prior's losses by shard."""
    entries = ArtifactStore(home=str(project.home.root)).entries()
    return {part: e["fingerprint"] for (a, part), e in entries.items() if a == "prior_scores"}


def test_a_cancelled_run_lets_the_cluster_go_and_another_ends_it(
    project: Project, server: Server
) -> None:
    alone = prior_losses(project)
    before = forget_scores(project)
    run_id = server.launch("rescore", every_shard(project.home))
    process, _ = mid_scoring(server, project, run_id, before)
    assert workers_at_work()
    server.cancel_held(run_id, process)
    assert server.ended(run_id, 60)["status"] == "CANCELED"
    wait_for("end of the workers", lambda: None if workers_at_work() else True, 30)

    second = server.launch("rescore", every_shard(project.home))
    assert server.ended(second, 180)["status"] == "SUCCESS", server.log.read_text()[-5000:]
    whole_once(project, before)
    assert prior_losses(project) == alone
    assert len(chunks(project)) > before

    events = server.ask(EVENTS, id=second)["logsForRun"]["events"]
    said = [e["message"] for e in events if "by node" in e.get("message", "")]
    assert "shards: " in said[-1]
    assert said[-1].count("127.0.0.1/") == 3
    shown = {
        e["partition"]: entry["jsonString"]
        for e in events
        if e.get("assetKey") == {"path": ["prior_scores"]}
        for entry in e["metadataEntries"]
        if entry["label"] == "chunks by node"
    }
    assert shown
    assert all("127.0.0.1/" in nodes for nodes in shown.values())
