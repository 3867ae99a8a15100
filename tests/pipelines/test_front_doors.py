"""Dagster's own commands in a fresh checkout, and without DAGSTER_HOME."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipelines.partitions import over
from resources.home import DAGSTER_YAML, Home
from tests.pipelines.server import Server, free_port, start_by, wait_for
from tests.program import REPOSITORY

BIN = Path(sys.executable).parent
COMMANDS = {
    "dg dev": ["dg", "dev"],
    "dagster dev": ["dagster", "dev"],
    "dagster dev -w": ["dagster", "dev", "-w", "workspace.yaml"],
}
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".colorfilter", ".*_cache", "__pycache__", ".screenshots", "*.egg-info"
)


def environment(checkout: Path) -> dict[str, str]:
    """What a shell has that knows nothing of us; the checkout's code goes first."""
    ours = ("DAGSTER_", "COLORFILTER_")
    bare = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**bare, "PYTHONPATH": str(checkout)}


def checkout_in(folder: Path) -> Path:
    shutil.copytree(REPOSITORY, folder / "checkout", ignore=LEFT_OUT)
    return folder / "checkout"


def test_dg_finds_the_definitions(tmp_path: Path) -> None:
    """And says nothing of telemetry, for it is off."""
    checkout = checkout_in(tmp_path)
    before = set(checkout.rglob("*"))
    done = subprocess.run(
        [BIN / "dg", "check", "defs"],
        cwd=checkout,
        env={**environment(checkout), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All definitions loaded successfully" in done.stdout
    assert "telemetry" not in (done.stdout + done.stderr).lower()
    assert set(checkout.rglob("*")) == before  # to load makes nothing


def test_the_temporary_instance_has_the_settings_of_a_home() -> None:
    shipped = (REPOSITORY / "dagster.yaml").read_text()
    assert yaml.safe_load(shipped) == yaml.safe_load(DAGSTER_YAML)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """All of them at once, each in a checkout of its own."""
    started: dict[str, Server] = {}
    try:
        for name, command in COMMANDS.items():
            checkout = checkout_in(tmp_path_factory.mktemp("door"))
            port = free_port()
            full = [str(BIN / command[0]), *command[1:], "-h", "127.0.0.1", "-p", str(port)]
            if command[0] == "dg":
                full[-4:] = ["--host", "127.0.0.1", "--port", str(port)]
            home, shell = checkout / ".colorfilter", environment(checkout)
            started[name] = start_by(full, checkout, home, port, shell)
        yield started
    finally:
        for server in started.values():
            server.stop_as_by_ctrl_c()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_shard_is_materialized_from_nothing(servers: dict[str, Server], name: str) -> None:
    server = servers[name]

    wait_for("tick", lambda: server.ticks("arrivals") or None, 120)
    shards = [shard.name for shard in Home(server.home).shards()]
    run = server.launch("__ASSET_JOB", over(shards, shards[:1]), ["raw_corpus"])
    ended = server.ended(run, 120)
    assert ended["status"] == "SUCCESS", server.log.read_text()[-3000:]
    (made,) = {path.parent.name for path in (server.home / "artifacts/raw_corpus").glob("*/*")}
    assert made == shards[0]
    wait_for("second tick", lambda: len(server.ticks("cut_off_runs")) > 1 or None, 120)
    wait_for("second tick", lambda: len(server.ticks("arrivals")) > 1 or None, 120)


@pytest.mark.slow
def test_they_end_by_ctrl_c_and_leave_no_instance(servers: dict[str, Server]) -> None:
    for server in servers.values():
        assert not server.stop_as_by_ctrl_c()
        assert not list(server.home.parent.glob(".tmp_dagster_home_*"))
