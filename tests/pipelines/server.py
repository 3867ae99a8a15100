"""Start `colorfilter ui` for tests, query it by GraphQL, and stop or kill it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from resources.home import Home
from tests.program import command

ENDED = {"SUCCESS", "FAILURE", "CANCELED"}
T = TypeVar("T")


def wait_for(what: str, look: Callable[[], T | None], seconds: float) -> T:
    """The first thing that `look` finds. Fails after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = look()
        if found is not None:
            return found
        time.sleep(0.5)
    pytest.fail(f"no {what} after {seconds:.0f} s")


@dataclass
class Server:
    """`colorfilter ui` at work over a home."""

    process: psutil.Process
    port: int
    home: Path
    log: Path
    killed: bool = False  # by a test

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def processes(self) -> list[psutil.Process]:
        if not self.process.is_running():
            return []
        return [self.process, *self.process.children(recursive=True)]

    def answers(self) -> bool | None:
        """True once it does; None until then."""
        assert self.process.is_running(), self.log.read_text()
        assert self.process.status() != psutil.STATUS_ZOMBIE, self.log.read_text()
        try:
            with urllib.request.urlopen(self.address, timeout=10) as response:
                return True if response.status == 200 else None
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """Answer to a GraphQL query."""
        request = urllib.request.Request(
            f"{self.address}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer
        return answer["data"]

    def locations(self) -> list[dict[str, Any]] | None:
        """The code locations once all are loaded."""
        query = """
            {workspaceOrError {... on Workspace {locationEntries {
                name loadStatus locationOrLoadError {__typename ... on PythonError {message}}
            }}}}
        """
        entries = self.ask(query)["workspaceOrError"]["locationEntries"]
        return entries if entries and all(e["loadStatus"] == "LOADED" for e in entries) else None

    def runs(self) -> dict[str, dict[str, Any]]:
        query = """
            {runsOrError {... on Runs {results {
                runId status jobName startTime endTime assetSelection {path} tags {key value}
            }}}}
        """
        return {run["runId"]: run for run in self.ask(query)["runsOrError"]["results"]}

    def ticks(self, sensor: str) -> list[dict[str, Any]]:
        """The ticks of a sensor that have ended. Fails where one of them failed."""
        query = """
            query($it: SensorSelector!) {sensorOrError(sensorSelector: $it) {
                ... on Sensor {sensorState {ticks(limit: 20) {status error {message}}}}
            }}
        """
        found = self.ask(query, it={**self.repository(), "sensorName": sensor})
        ticks = found["sensorOrError"]["sensorState"]["ticks"]
        assert not [tick for tick in ticks if tick["status"] == "FAILURE"], ticks
        return [tick for tick in ticks if tick["status"] in {"SUCCESS", "SKIPPED"}]

    def new_run_succeeds(self, known: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The one run not known yet, once it has succeeded."""

        def ended() -> dict[str, Any] | None:
            new = [run for name, run in self.runs().items() if name not in known]
            assert len(new) <= 1
            if not new or new[0]["status"] not in ENDED:
                return None
            return new[0]

        run = wait_for("ended run", ended, seconds)
        assert run["status"] == "SUCCESS", self.log.read_text()[-5000:]
        return run

    def repository(self) -> dict[str, str]:
        """What GraphQL knows the code by."""
        (location,) = self.locations() or []
        return {
            "repositoryLocationName": location["name"],
            "repositoryName": "__repository__",
        }

    def launch(self, job: str, tags: Mapping[str, str], assets: Sequence[str] = ()) -> str:
        """Launch a run of a job, or of some assets of it, as the web UI does; returns its id."""
        selector: dict[str, Any] = {**self.repository(), "jobName": job}
        if assets:
            selector["assetSelection"] = [{"path": asset.split("/")} for asset in assets]
        parameters = {
            "selector": selector,
            "runConfigData": {},
            "executionMetadata": {"tags": [{"key": k, "value": v} for k, v in tags.items()]},
        }
        query = """
            mutation($it: ExecutionParams!) {launchRun(executionParams: $it) {
                __typename ... on LaunchRunSuccess {run {runId}}
            }}
        """
        launched = self.ask(query, it=parameters)["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return str(launched["run"]["runId"])

    def ended(self, run_id: str, seconds: float) -> dict[str, Any]:
        """A run once it has ended."""
        return wait_for(
            f"end of run {run_id}",
            lambda: run if (run := self.runs()[run_id])["status"] in ENDED else None,
            seconds,
        )

    def run_process(self, run_id: str) -> psutil.Process | None:
        """The process of a run at work, known by its lease."""
        lease = str(Home(self.home).run_lease(run_id))
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(file.path == lease for file in process.open_files()):
                    return process
        return None

    def cancel_held(self, run_id: str, process: psutil.Process) -> None:
        """Cancel a run whose process is suspended, and resume it.

        Resumed first, the run could end before Dagster hears of the cancellation.
        """
        terminate = "mutation($id: String!) {terminateRun(runId: $id) {__typename}}"
        with ThreadPoolExecutor(1) as thread:
            # Answered only once the process has taken notice, so after it was resumed.
            asked = thread.submit(self.ask, terminate, id=run_id)
            try:
                wait_for(
                    "cancellation",
                    lambda: self.runs()[run_id]["status"] == "CANCELING" or None,
                    30,
                )
            finally:
                process.resume()
            asked.result()

    def kill(self) -> None:
        """End everything at once, as a power cut does."""
        self.killed = True
        there = self.processes()
        for process in there:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(there, timeout=10)

    def stop_as_by_ctrl_c(self) -> list[psutil.Process]:
        """Interrupt the foreground group; returns what had to be killed after half a minute."""
        there = self.processes()
        if there:
            os.killpg(self.process.pid, signal.SIGINT)
        _, left = psutil.wait_procs(there, timeout=30)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=10)
        return left


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def start(recipe: Path, home: Path, port: int) -> Server:
    """`colorfilter ui` from outside the repository, its code loaded."""
    arguments = "--recipe", str(recipe), "--home", str(home), "--port", str(port)
    return start_by(command("ui", *arguments), home.parent, home, port)


def start_by(
    command: Sequence[str],
    folder: Path,
    home: Path,
    port: int,
    environment: Mapping[str, str] | None = None,
) -> Server:
    """A server by a command that is called in a folder, its code loaded."""
    log = home.parent / f"ui-{port}.log"
    # Where these tests run in the background of a shell, they and what they start ignore SIGINT.
    command = ["env", "--default-signal=INT", *command]
    with log.open("ab") as output:
        started = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(psutil.Process(started.pid), port, home, log)
    try:
        wait_for("answer", server.answers, 90)
        (location,) = wait_for("loaded code location", server.locations, 60)
        loaded = location["locationOrLoadError"]
        assert loaded["__typename"] == "RepositoryLocation", loaded
    except BaseException:
        server.kill()
        raise
    return server


@contextlib.contextmanager
def serving(recipe: Path, home: Path) -> Iterator[Server]:
    """A server; in the end nothing of it may be left."""
    server = start(recipe, home, free_port())
    try:
        yield server
    finally:
        left = server.stop_as_by_ctrl_c()
    assert not left, f"Ctrl-C did not end {left}"
