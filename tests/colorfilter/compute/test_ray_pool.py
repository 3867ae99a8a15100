"""Calls on a real Ray cluster of three nodes: each completes exactly once, despite failures."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from colorfilter.errors import InputError, UnreachableError
from tests.three_nodes import loopback_only, ray, three_nodes

pytest.importorskip("ray")

from colorfilter.compute import ray_pool
from colorfilter.compute.ray_pool import LOSSES, Cluster, connected

pytestmark = pytest.mark.slow

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with loopback_only(), three_nodes() as nodes, connected(nodes.address):
        yield nodes


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def three(nodes: Any, said: list[str]) -> Cluster:
    return Cluster(notice=said.append)


def calls() -> tuple[Call, Call]:
    """Made here, for Ray to send by value: the nodes have no tests."""

    def twice(name: str, n: int) -> tuple[int, int]:
        from colorfilter.compute import local_pool

        for _ in range(n):
            local_pool.report(1)
        time.sleep(0.3)
        return 2 * n, os.getpid()

    def killed_once(name: str, begun: str) -> str:
        from colorfilter.compute import local_pool

        local_pool.report(1)
        path = Path(begun)
        if not path.exists():
            path.touch()
            time.sleep(1.5)  # so that what it reported is told
            os.kill(os.getpid(), signal.SIGKILL)
        return name

    return twice, killed_once


def test_every_call_is_made_once_on_every_node_and_all_progress_is_told(three: Cluster) -> None:
    told: list[int] = []
    found = list(three.run(calls()[0], [(f"call {n}", n) for n in range(40)], told.append))
    assert sorted((i, doubled) for i, (doubled, _) in found) == [(n, 2 * n) for n in range(40)]
    assert len({process for _, (_, process) in found}) == 3
    assert sum(told) == sum(range(40))


def test_no_call_needs_no_worker(three: Cluster) -> None:
    assert list(three.run(calls()[0], [])) == []


def test_no_more_workers_than_asked_for(nodes: Any) -> None:
    found = Cluster(most=1).run(calls()[0], [("", n) for n in range(6)])
    assert len({process for _, (_, process) in found}) == 1


def test_a_call_lost_with_its_worker_is_made_again(
    three: Cluster, said: list[str], tmp_path: Path
) -> None:
    told: list[int] = []
    arguments = [(f"call {n}", str(tmp_path / f"{n}")) for n in range(6)]
    for n in (0, 1, 2, 3, 5):
        (tmp_path / f"{n}").touch()
    found = list(three.run(calls()[1], arguments, told.append))
    assert sorted(found) == [(n, f"call {n}") for n in range(6)]
    assert sum(told) == 6
    (lost,) = [line for line in said if "lost with its worker on 127.0.0.1/" in line]
    assert lost.startswith("call 4: ")


def test_a_call_that_kills_its_workers_is_given_up(three: Cluster) -> None:
    def kill_itself(name: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=f"call 0: its worker was lost {LOSSES} times"):
        list(three.run(kill_itself, [("call 0",)]))


def test_what_a_call_raises_is_raised_here(three: Cluster) -> None:
    def refuse(name: str) -> None:
        from colorfilter.errors import InputError

        raise InputError(f"{name}: no good")

    with pytest.raises(InputError, match="call 0: no good") as caught:
        list(three.run(refuse, [("call 0",)]))
    assert type(caught.value) is InputError


@pytest.mark.parametrize("n_calls", [12, 1])
def test_a_device_that_fails_is_left_out(
    three: Cluster, said: list[str], tmp_path: Path, n_calls: int
) -> None:
    """That which a worker met first: whatever comes to its node fails."""

    def where(name: str, first: str) -> str:
        import ray

        from colorfilter.compute import local_pool

        local_pool.report(1)
        node = ray.get_runtime_context().get_node_id()
        try:
            Path(first).touch(exist_ok=False)
            Path(first).write_text(node, encoding="utf-8")
        except FileExistsError:
            time.sleep(0.5)
        if Path(first).read_text(encoding="utf-8") == node:
            raise RuntimeError("the device has fallen off the bus")
        return node

    told: list[int] = []
    first = tmp_path / "first"
    arguments = [(f"call {n}", str(first)) for n in range(n_calls)]
    found = list(three.run(where, arguments, told.append))
    assert sorted(i for i, _ in found) == list(range(n_calls))
    assert first.read_text(encoding="utf-8") not in {node for _, node in found}
    assert sum(told) == n_calls
    (line,) = said
    assert (
        "(the device has fallen off the bus), which gets no more calls; retrying elsewhere" in line
    )


def test_what_a_call_raises_on_two_devices_is_raised_here(three: Cluster, said: list[str]) -> None:
    def fail(name: str) -> None:
        if name == "call 4":
            raise ZeroDivisionError(name)

    with pytest.raises(ZeroDivisionError, match="call 4"):
        list(three.run(fail, [(f"call {n}",) for n in range(6)]))
    assert len(said) == 1


def test_where_there_is_one_device_what_a_call_raises_is_raised_at_once(
    three: Cluster, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = {three.resource: 1.0}
    monkeypatch.setattr(ray_pool.ray, "cluster_resources", lambda: devices)

    def fail(name: str) -> None:
        raise ZeroDivisionError(name)

    with pytest.raises(ZeroDivisionError):
        list(three.run(fail, [("call 0",)]))
    assert said == []


def test_stragglers_are_begun_again_where_that_is_wanted(
    nodes: Any, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two, so that one worker is left to do all the rest and both of them."""

    def slow_at_first(name: str, begun: str) -> str:
        from colorfilter.compute import local_pool

        local_pool.report(10)
        path = Path(f"{begun} {name}")
        if name in {"call 0", "call 1"} and not path.exists():
            path.touch()
            time.sleep(60)
            return "too late"
        return name

    monkeypatch.setattr(ray_pool, "STRAGGLE_SECONDS", 1.0)
    told: list[int] = []
    arguments = [(f"call {n}", str(tmp_path / "begun")) for n in range(5)]
    begun = time.monotonic()
    both = Cluster(begin_twice=True, notice=said.append)
    found = list(both.run(slow_at_first, arguments, told.append))
    assert time.monotonic() - begun < 55
    assert sorted(found) == [(n, f"call {n}") for n in range(5)]
    again = [line for line in said if "also started elsewhere" in line]
    assert sorted(line.split(":")[0] for line in again) == ["call 0", "call 1"]
    assert sum(told) - 50 in {0, 10, 20}  # of those that were given up too


def test_the_slower_of_two_that_fails_changes_nothing(
    nodes: Any, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_late(name: str, begun: str) -> str:
        path = Path(begun)
        if name == "call 0" and not path.exists():
            path.touch()
            time.sleep(5)
            raise RuntimeError("gone wrong")
        time.sleep(12 if name == "call 4" else 0.5)
        return name

    monkeypatch.setattr(ray_pool, "STRAGGLE_SECONDS", 2.0)
    arguments = [(f"call {n}", str(tmp_path / "begun")) for n in range(5)]
    found = list(Cluster(begin_twice=True, notice=said.append).run(fail_late, arguments))
    assert sorted(found) == [(n, f"call {n}") for n in range(5)]
    assert any("call 0: failed on" in line and "gets no more calls" in line for line in said)


def test_workers_end_where_the_caller_leaves(three: Cluster) -> None:
    def process(name: str) -> int:
        return os.getpid()

    run = three.run(process, [(f"call {n}",) for n in range(100)])
    _, one = next(run)
    run.close()
    gone(one)
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def gone(process: int) -> None:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{process}/cmdline").exists() and "ray::" in Path(
        f"/proc/{process}/cmdline"
    ).read_text(encoding="utf-8"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_node_that_is_lost_is_done_without_and_one_that_comes_is_used(
    nodes: Any, said: list[str]
) -> None:
    def where(name: str) -> str:
        from colorfilter.compute import local_pool

        time.sleep(0.4)
        return local_pool.node()

    used: list[str] = []
    run = Cluster(notice=said.append).run(where, [(f"call {n}",) for n in range(80)])
    seen: set[int] = set()
    added = None
    for i, node in run:
        assert i not in seen
        seen.add(i)
        used.append(node)
        if len(seen) == 12:
            assert len(set(used)) == 3
            nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)
        if len(seen) == 20:
            added = nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    assert seen == set(range(80))
    assert any("lost with its worker" in line for line in said)
    assert added is not None
    assert any(node.endswith(added.node_id[:8]) for node in used)


def test_the_place_of_one_that_is_left_out_is_free_when_its_node_is_gone(
    nodes: Any, said: list[str]
) -> None:
    def where(name: str, bad: str) -> str:
        import ray

        time.sleep(0.4)
        node: str = ray.get_runtime_context().get_node_id()
        if node == bad:
            raise RuntimeError("no good")
        return node

    bad = nodes.worker_nodes.copy().pop()
    run = Cluster(notice=said.append).run(where, [(f"call {n}", bad.node_id) for n in range(80)])
    used = set()
    for done, (_, node) in enumerate(run):
        used.add(node)
        if done == 12:
            assert "gets no more calls" in said[0]
            nodes.remove_node(bad, allow_graceful=False)
        if done == 20:
            added = nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    assert added.node_id in used


def test_more_devices_together_than_there_are_is_refused(nodes: Any) -> None:
    with pytest.raises(UnreachableError, match="devices_per_model: 9 are requested"):
        list(Cluster(together=9).run(calls()[0], [("", 1)]))


def test_what_a_group_raises_is_raised_here_and_ends_the_others(
    nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end with the connection, so this is the last test but those that begin without one."""
    from colorfilter.compute import ray_train

    monkeypatch.setattr(ray_train, "FAILURES", 1)

    def refuse_or_wait(name: str, seconds: int) -> None:
        from colorfilter.errors import InputError

        if not seconds:
            raise InputError(f"{name}: no good")
        time.sleep(seconds)

    nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)  # for two groups
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"^call 0: no good$") as caught:
        list(Cluster(together=2).run(refuse_or_wait, [("call 0", 0), ("call 1", 600)]))
    assert type(caught.value) is InputError
    assert time.monotonic() - begun < 300
    assert not ray.is_initialized()


def test_where_there_is_no_cluster_is_said_in_a_line() -> None:
    ray.shutdown()
    said = r"compute\.address: no Ray cluster at 127\.0\.0\.1:1 "
    with pytest.raises(InputError, match=said), connected("127.0.0.1:1"):
        pass


STARTS = """
import ray, sys, time
from colorfilter.compute.ray_pool import Cluster, connected
with connected(None):
    assert list(Cluster().run(abs, [(-2,), (-3,)])) in ([(0, 2), (1, 3)], [(1, 3), (0, 2)])
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""
STRANGER = """
import sys
from colorfilter.compute.ray_pool import connected
with connected(sys.argv[1]):
    print("let in")
"""


def test_a_cluster_that_is_started_here_takes_its_user_only(nodes: Any, tmp_path: Path) -> None:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}

    def of(user: str) -> dict[str, str]:
        return {**plain, "HOME": str(tmp_path / user)}

    command = [sys.executable, "-c", STARTS]
    with subprocess.Popen(
        command, env=of("own"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdin
        assert started.stdout
        address = started.stdout.readline().strip()
        command = [sys.executable, "-c", STRANGER, address]
        done = subprocess.run(command, env=of("other"), capture_output=True, text=True, check=False)
        started.stdin.close()
    assert started.returncode == 0
    assert done.returncode != 0
    assert "let in" not in done.stdout
    assert "requires its token; set RAY_AUTH_MODE=token" in done.stderr
