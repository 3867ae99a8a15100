"""Launch runs that score, pause them midway, and read which chunks they scored."""

import shutil
import time
from collections import Counter

import dagster as dg
import psutil

from assets.common import SHARDS
from pipelines.partitions import over
from resources.artifacts import ArtifactStore
from resources.home import Home
from tests.conftest import STDLIB, Project
from tests.pipelines.server import Server, wait_for
from tests.program import colorfilter

# Enough to score for some seconds, a chunk to each shard.
MANY = sorted(p.stem for p in STDLIB.glob("*.py") if p.stat().st_size > 70_000)


def every_shard(home: Home) -> dict[str, str]:
    """Tags of a run over all shards."""
    with dg.DagsterInstance.from_config(str(home.dagster)) as instance:
        shards = instance.get_dynamic_partitions(str(SHARDS.name))
    return over(shards, shards)


def chunks(project: Project) -> list[tuple[str, str]]:
    """Model and file of every chunk that was scored, as often as it was."""
    return [(r["model"], r["chunk"]) for r in project.kernel_runs() if r["verb"] == "score"]


def by_hand(project: Project, job: str) -> None:
    """Run a job by the command line, without the daemon."""
    where = "--recipe", str(project.path), "--home", str(project.home.root)
    done = colorfilter("run", "--job", job, *where)
    assert done.returncode == 0, done.stderr
    assert "lock" not in done.stdout + done.stderr


def forget_scores(project: Project) -> int:
    """Lose the prior's losses, so that there is something to score; returns the chunks so far."""
    shutil.rmtree(project.home.artifacts / "prior_scores")
    return len(chunks(project))


def mid_scoring(
    server: Server, project: Project, run_id: str, before: int
) -> tuple[psutil.Process, int]:
    """The process of a run, held in the middle of scoring, and how many chunks it has scored."""
    process = wait_for("run at work", lambda: server.run_process(run_id), 60)
    end = time.monotonic() + 90
    # Counted without reading each: all is scored within some seconds.
    while project.home.kernel_runs.read_bytes().count(b'"verb": "score"') == before:
        assert time.monotonic() < end, "nothing was scored in 90 s"
        time.sleep(0.002)
    process.suspend()
    done = len(chunks(project)) - before
    assert 0 < done < len(project.home.shards()), "it was not held in the middle"
    assert server.runs()[run_id]["status"] == "STARTED"
    return process, done


def whole_once(project: Project, before: int) -> int:
    """Every loss of the prior stands again, and no chunk was scored twice; how many were."""
    store = ArtifactStore(home=str(project.home.root))
    for shard in project.home.shards():
        assert store.current("prior_scores", shard.name).path.exists()
    scored = Counter(chunks(project)[before:])
    assert set(scored.values()) == {1}
    return len(scored)
