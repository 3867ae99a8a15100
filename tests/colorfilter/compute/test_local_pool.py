import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from colorfilter.compute import local_pool
from colorfilter.compute.local_pool import (
    ADDED_TO_PATH,
    SOCKET_PATH,
    Call,
    Workers,
    process_context,
)

ROOT = Path(__file__).resolve().parents[3]


def count(upto: int) -> tuple[int, int]:
    for _ in range(upto):
        local_pool.report(1)
    return upto, os.getpid()


def fail() -> None:
    raise ValueError("no good")


def go_on_for_ever(begun: Path) -> None:
    """Until it is stopped; where nobody does, it leaves a file `late` after a minute."""
    begun.touch()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        local_pool.report(1)
        time.sleep(0.01)
    begun.with_name("late").touch()


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def call(function: Callable[..., object], *arguments: object) -> object:
    return function(*arguments)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90  # of a busy machine
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def facts() -> tuple[int, set[str], dict[str, str], str]:
    """The process that forked this one, modules that were loaded before, variables, folder."""
    loaded = {"torch", "transformers.modeling_utils"} & sys.modules.keys()
    return os.getppid(), loaded, dict(os.environ), str(Path.cwd())


def which_one() -> int:
    time.sleep(0.5)
    return local_pool.index()


def test_every_call_is_made_once_in_other_processes_and_all_progress_is_told() -> None:
    told: list[int] = []
    with Workers(2) as two:
        done = dict(two.run(count, [(n,) for n in (5, 0, 100, 7)], told.append))
        assert {i: n for i, (n, _) in done.items()} == {0: 5, 1: 0, 2: 100, 3: 7}
        assert os.getpid() not in {process for _, process in done.values()}
        assert sum(told) == 112
        told.clear()
        for _ in range(50):  # reports come while they are counted
            list(two.run(count, [(100,)] * 4, told.append))
        assert sum(told) == 20_000
        told.clear()
        assert len(list(two.run(count, [(3,)], told.append))) == 1
        assert sum(told) == 3


def test_outside_a_worker_nobody_listens() -> None:
    local_pool.report(1)


def test_each_worker_knows_which_one_it_is() -> None:
    with Workers(2) as two:
        assert {i for _, i in two.run(which_one, [(), ()])} == {0, 1}


def test_a_failure_is_raised_and_the_other_calls_stop(tmp_path: Path) -> None:
    with Workers(2) as two:
        calls = two.run(call, [(go_on_for_ever, tmp_path / "begun"), (fail,)])
        with pytest.raises(ValueError, match="no good"):
            list(calls)
        assert next(two.run(count, [(1,)]))[1][0] == 1
    assert not (tmp_path / "late").exists()


def end_of_file() -> None:
    raise EOFError("Compressed file ended before the end-of-stream marker was reached")


def test_what_a_call_reads_to_its_end_is_no_failure_to_start() -> None:
    with Workers(1) as pool, pytest.raises(EOFError, match="Compressed file"):
        list(pool.run(end_of_file, [()]))


def test_who_leaves_early_stops_the_other_calls(tmp_path: Path) -> None:
    with Workers(2) as two:
        for _ in two.run(call, [(count, 1), (go_on_for_ever, tmp_path / "begun")]):
            break
        assert next(two.run(count, [(1,)]))[1][0] == 1
    assert not (tmp_path / "late").exists()


def test_a_killed_worker_is_told_of_and_the_pool_is_known_to_be_broken() -> None:
    with Workers(1) as one:
        with pytest.raises(RuntimeError, match="worker process was killed"):
            list(one.run(kill_itself, [()]))
        assert one.broken


PROGRAM = """
import sys
from pathlib import Path
from colorfilter.compute.local_pool import Call, Workers
from tests.colorfilter.compute.test_local_pool import go_on_for_ever
if __name__ == "__main__":
    list(Workers(1).run(go_on_for_ever, [(Path(sys.argv[1]),)]))
"""


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    begun, script = tmp_path / "begun", tmp_path / "program.py"
    script.write_text(PROGRAM)
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    parent = subprocess.Popen([sys.executable, script, begun], env=environment)
    until(begun.exists)
    started = psutil.Process(parent.pid).children(recursive=True)
    assert started
    parent.kill()
    parent.wait()
    until(lambda: not any(p.is_running() and p.status() != "zombie" for p in started))


_kept: list[Workers] = []


def keep_workers() -> None:
    """As a run that the web UI launched does, which is a child of multiprocessing itself."""
    _kept.append(Workers(1))
    list(_kept[0].run(count, [(1,)]))


def test_a_process_that_keeps_its_workers_ends_and_they_with_it() -> None:
    run = multiprocessing.get_context("spawn").Process(target=keep_workers)
    run.start()
    until(lambda: bool(psutil.Process(run.pid).children()))
    workers_of_it = psutil.Process(run.pid).children(recursive=True)
    run.join(30)
    assert run.exitcode == 0
    until(lambda: not any(worker.is_running() for worker in workers_of_it))


# The pool's own thread dies of that in Python 3.11.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_work_that_is_called_off_as_its_workers_die_ends(tmp_path: Path) -> None:
    """As by a signal to the whole group. Of calls that wait a broken pool says nothing more."""
    others = set(multiprocessing.active_children())
    ended: list[str] = []

    def interrupted(_: int) -> None:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise KeyboardInterrupt

    def work() -> None:
        try:
            list(
                Workers(1).run(
                    go_on_for_ever, [(tmp_path / str(i),) for i in range(8)], interrupted
                )
            )
        except KeyboardInterrupt:
            ended.append("called off")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert ended == ["called off"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every worker is a fresh process")
def test_workers_are_forks_of_one_process_that_has_loaded_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = set()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLORFILTER_ONE", "here")
    monkeypatch.delenv("COLORFILTER_OTHER", raising=False)
    for _ in range(2):
        with Workers(1) as one:
            ((_, (server, loaded, environment, folder)),) = one.run(facts, [()])
        servers.add(server)
        assert loaded == {"torch", "transformers.modeling_utils"}
        assert environment["COLORFILTER_ONE"] == "here"
        assert "COLORFILTER_OTHER" not in environment
        assert folder == str(tmp_path)
    (server,) = servers
    assert server != os.getpid()
    assert psutil.Process(server).ppid() == os.getpid()
    # Threads of OpenBLAS, which ends them before a fork, and no others.
    names = {t.id for t in psutil.Process(server).threads()}
    commands = {Path(f"/proc/{server}/task/{i}/comm").read_text().strip() for i in names}
    assert commands == {Path(f"/proc/{server}/comm").read_text().strip()}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are fresh processes")
def test_below_a_long_temporary_folder_workers_are_fresh_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert process_context().get_start_method() == "forkserver"
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert process_context().get_start_method() == "spawn"
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * (SOCKET_PATH - ADDED_TO_PATH - 1))
    assert process_context().get_start_method() == "forkserver"
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * (SOCKET_PATH - ADDED_TO_PATH))
    assert process_context().get_start_method() == "spawn"


def test_what_cannot_be_loaded_for_workers_is_named(tmp_path: Path) -> None:
    """In a process of its own, whose server fails."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise OSError('half a package')")
    code = "from colorfilter.compute.local_pool import Workers\nlist(Workers(1).run(print, [()]))\n"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "OSError: half a package" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "RuntimeError: no worker process could be started: loading colorfilter or torch or"
    )


def test_a_call_is_imported_by_the_worker_alone() -> None:
    with Workers(1) as one:
        ((_, found),) = one.run(
            Call("colorfilter.training.schedule:planned_sequences.__name__.upper"), [()]
        )
    assert found == "PLANNED_SEQUENCES"
