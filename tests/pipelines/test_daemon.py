"""Web server and daemon at work: new files, killed runs, runs that share a device.

`pytest -s` prints the figures.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import dagster as dg
import duckdb
import pytest

from tests.conftest import MODULES, Project, copy_of, recipe_facts, write_corpus
from tests.pipelines.scoring_runs import (
    MANY,
    by_hand,
    chunks,
    every_shard,
    forget_scores,
    mid_scoring,
    whole_once,
)
from tests.pipelines.server import Server, free_port, start, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The finished project over nine shards of its own, refreshed every minute."""
    root = tmp_path_factory.mktemp("daemon")
    write_corpus(root / "corpus", [*MODULES, "difflib"])
    made = copy_of(finished, root)
    made.facts = {**recipe_facts(root / "corpus"), "refresh": {"cron": "* * * * *"}}
    made.write()
    by_hand(made, "refresh")
    return made


@pytest.fixture(scope="module")
def started() -> Iterator[list[Server]]:
    """The servers that were started, of which the last may be at work."""
    servers: list[Server] = []
    yield servers
    if servers:
        assert not servers[-1].stop_as_by_ctrl_c()


def at_work(project: Project, started: list[Server]) -> Server:
    """The server at work; it is started where a test has killed the one before."""
    if not started or not started[-1].process.is_running():
        assert not started or started[-1].killed, "it has ended by itself"
        started.append(start(project.path, project.home.root, free_port()))
    return started[-1]


@pytest.fixture
def server(project: Project, started: list[Server]) -> Server:
    return at_work(project, started)


STOP_SENSOR = "mutation($id: String!) {stopSensor(id: $id) {__typename}}"
STOP_SCHEDULE = "mutation($id: String!) {stopRunningSchedule(id: $id) {__typename}}"
STATES = """
    query($in: RepositorySelector!) {repositoryOrError(repositorySelector: $in) {
        ... on Repository {
            sensors {name sensorState {id}} schedules {name scheduleState {id}}
        }
    }}
"""


@contextlib.contextmanager
def automation(server: Server) -> Iterator[None]:
    """The sensor of arrivals and the schedule are on, as by the switches on the Automation page."""
    where = server.repository()
    for kind, name in (("Sensor", "arrivals"), ("Schedule", "refresh")):
        selector = {**where, f"{kind.lower()}Name": name}
        query = (
            f"mutation($it: {kind}Selector!) "
            f"{{start{kind}({kind.lower()}Selector: $it) {{__typename}}}}"
        )
        assert "Error" not in server.ask(query, it=selector)[f"start{kind}"]["__typename"]
    yield
    found = server.ask(STATES, **{"in": where})["repositoryOrError"]
    states = {s["name"]: s["sensorState"]["id"] for s in found["sensors"]}
    server.ask(STOP_SENSOR, id=states["arrivals"])
    (schedule,) = found["schedules"]
    server.ask(STOP_SCHEDULE, id=schedule["scheduleState"]["id"])


def launched_again(server: Server, run_id: str) -> dict[str, Any]:
    """The run that the daemon launches in place of one that failed."""

    def look() -> dict[str, Any] | None:
        for run in server.runs().values():
            if {"key": "dagster/parent_run_id", "value": run_id} in run["tags"]:
                return run if run["startTime"] else None
        return None

    return wait_for("second run", look, 60)


def test_what_is_dropped_into_the_source_is_scored_by_the_next_tick(
    project: Project, server: Server
) -> None:
    home, before = project.home, len(project.kernel_runs())
    standing, known = {s.name for s in home.shards()}, server.runs()
    with automation(server):
        dropped = time.time()
        write_corpus(project.root / "corpus", ["textwrap"])
        run = server.new_run_succeeds(known, 150)
    (new,) = {s.name for s in home.shards()} - standing
    tags = {tag["key"]: tag["value"] for tag in run["tags"]}
    assert run["jobName"] == "refresh"
    assert tags["dagster/schedule_name"] == "refresh"
    assert tags["dagster/asset_partition_range_start"] == new
    runs = project.kernel_runs()[before:]
    assert {(r["verb"], r["shard"]) for r in runs} == {("score", new)}
    with duckdb.connect(str(home.scores), read_only=True) as scores:
        (n,) = scores.execute("SELECT count(*) FROM sequences WHERE shard = ?", [new]).fetchall()[0]
    assert {r["sequences"] for r in runs} == {n}
    first = min(known.values(), key=lambda run: run["startTime"])
    losses = [r for r in project.kernel_runs()[:before] if r["verb"] == "score"]
    print(
        f"\none new shard of {len(standing) + 1}: its run began "
        f"{run['startTime'] - dropped:.0f} s later and took "
        f"{run['endTime'] - run['startTime']:.1f} s, the first one, of everything over "
        f"{len(MODULES)}, {first['endTime'] - first['startTime']:.1f} s; {n} sequences scored "
        f"by two models, of {sum(r['sequences'] for r in losses)} losses that stood"
    )


def test_a_run_that_is_killed_is_launched_again_and_goes_on_behind_its_last_chunk(
    project: Project, server: Server
) -> None:
    write_corpus(project.root / "corpus", MANY)
    by_hand(project, "refresh")
    before = forget_scores(project)
    run_id = server.launch("rescore", every_shard(project.home))
    process, done = mid_scoring(server, project, run_id, before)
    own = process.children(recursive=True)
    process.kill()
    killed = time.time()
    assert server.ended(run_id, 30)["status"] == "FAILURE"
    failed = time.time() - killed
    second = launched_again(server, run_id)
    assert server.ended(second["runId"], 120)["status"] == "SUCCESS"
    scored = whole_once(project, before)
    assert not any(child.is_running() for child in own)
    wait_for("end of the run's process", lambda: server.run_process(run_id) is None or None, 30)
    print(
        f"\nkilled after {done} chunks: failed {failed:.1f} s later, gone on with after "
        f"{second['startTime'] - killed:.1f} s; {scored} chunks in all, none twice"
    )


def test_a_cancelled_run_stops_and_another_goes_on(project: Project, server: Server) -> None:
    before = forget_scores(project)
    run_id = server.launch("rescore", every_shard(project.home))
    process, done = mid_scoring(server, project, run_id, before)
    asked = time.time()
    server.cancel_held(run_id, process)
    assert server.ended(run_id, 30)["status"] == "CANCELED"
    stopped = time.time() - asked
    at_stop = len(chunks(project)) - before
    second = server.launch("rescore", every_shard(project.home))
    assert server.ended(second, 120)["status"] == "SUCCESS"
    scored = whole_once(project, before)
    print(
        f"\ncancelled after {done} chunks: stopped {stopped:.1f} s later with {at_stop}; "
        f"{scored} chunks in all, none twice"
    )


def test_runs_that_want_the_same_at_once_share_the_work(project: Project, server: Server) -> None:
    """Two of the web UI and one of the command line, on one device."""
    before = forget_scores(project)
    begun = time.time()
    runs = [server.launch("rescore", every_shard(project.home)) for _ in range(2)]
    by_hand(project, "rescore")
    for run_id in runs:
        assert server.ended(run_id, 120)["status"] == "SUCCESS"
    scored = whole_once(project, before)
    print(
        f"\nthree at once: all done after {time.time() - begun:.0f} s, {scored} chunks, none twice"
    )


def test_after_a_power_cut_the_next_start_puts_things_right(
    project: Project, started: list[Server]
) -> None:
    first = at_work(project, started)
    before = forget_scores(project)
    run_id = first.launch("rescore", every_shard(project.home))
    _, done = mid_scoring(first, project, run_id, before)
    first.kill()
    wait_for("free lease", lambda: None if project.home.run_is_alive(run_id) else True, 10)
    server = at_work(project, started)
    begun = time.time()
    assert server.runs()[run_id]["status"] == "STARTED"
    assert server.ended(run_id, 60)["status"] == "FAILURE"
    failed = time.time() - begun
    second = launched_again(server, run_id)
    assert server.ended(second["runId"], 120)["status"] == "SUCCESS"
    scored = whole_once(project, before)
    print(
        f"\npower cut after {done} chunks: failed {failed:.1f} s after the start; {scored} chunks "
        "in all, none twice"
    )


def test_a_run_goes_on_when_the_daemon_is_killed(project: Project, server: Server) -> None:
    before = forget_scores(project)
    run_id = server.launch("rescore", every_shard(project.home))
    process, done = mid_scoring(server, project, run_id, before)
    (daemon,) = [p for p in server.processes() if "dagster._daemon" in p.cmdline()]
    daemon.kill()
    server.process.wait(30)
    server.killed = True
    process.resume()
    wait_for("end of the run", lambda: None if project.home.run_is_alive(run_id) else True, 120)
    with dg.DagsterInstance.from_config(str(project.home.dagster)) as instance:
        run = instance.get_run_by_id(run_id)
    assert run is not None
    assert run.status == dg.DagsterRunStatus.SUCCESS
    scored = whole_once(project, before)
    print(f"\ndaemon killed after {done} chunks: the run went on; {scored} in all, none twice")
