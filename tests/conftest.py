"""Shared fixtures: a little real text, a recipe over it, and a home in which it has run."""

import json
import os
import pkgutil
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.storage.event_log.sqlite import sqlite_event_log
from dagster._core.storage.runs.sqlite import sqlite_run_storage

from colorfilter.config.load import load
from colorfilter.config.recipe import Recipe
from colorfilter.storage.files import lock
from pipelines.graph import build_definitions
from pipelines.run import Failure, bring_in, execute
from pipelines.settings import Job
from resources.home import Home
from tests.reads import recorded_in

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
# Triton reads this once, when torch or transformers first import it.
os.environ.setdefault("TRITON_INTERPRET", "0" if shutil.which("nvidia-smi") else "1")


def once(create: Callable[..., Any]) -> Callable[..., Any]:
    """Give the engine that was made for a database before."""
    engines: dict[str, Any] = {}

    def engine(url: str, **options: Any) -> Any:
        if url not in engines:
            engines[url] = create(url, **options)
        return engines[url]

    return engine


# Dagster makes an SQLAlchemy engine for each event, which then compiles its statements anew: a
# third of the time of a run that finds everything standing.
for storage in (sqlite_event_log, sqlite_run_storage):
    storage.create_engine = once(storage.create_engine)

STDLIB = Path(sysconfig.get_path("stdlib"))
MODEL = {
    "type": "gpt_neox",
    "config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    },
}


def recipe_facts(corpus: Path) -> dict:
    """Return a recipe over the files of `write_corpus`; it runs in seconds.

    The auxiliary models train by large batches: small ones would take most of a run's time.
    """
    training = {"learning_rate": 5e-3, "batch_sequences": 8}
    auxiliary = {"learning_rate": 1e-2, "batch_sequences": 32}
    return {
        "name": "tests",
        "sequence_length": 32,
        "corpus": {
            "sources": [{"name": "code", "files": str(corpus / "*.jsonl")}],
            "shard_bytes": 60_000,
        },
        "tokenizer": {"vocab_size": 320},
        "prior": {"sample_chars": 60_000, "model": MODEL, "training": auxiliary},
        "domains": [
            {
                "name": "reference",
                "sources": [
                    {
                        "name": "topics",
                        "files": str(corpus / "topics.py"),
                        "format": "python_dict",
                    }
                ],
                "held_out": 0.1,
                "probe": 0.1,
                "training": {**auxiliary},
            }
        ],
        "arms": [
            {"method": "color", "tau": 4},
            {"method": "conditional_only", "tau": 4, "seeds": [1]},
            {"method": "random"},
        ],
        "target": {"model": MODEL, "training": training, "training_tokens": 8_000},
        "evaluation": {"seeds": [1, 2], "random_multiples": [1, 1.5]},
    }


def write_corpus(folder: Path, names: list[str]) -> None:
    """A JSON Lines file per standard library module, a document per block of lines.

    Also `topics.py`, the first 4,000 characters of each topic of the language reference.
    """
    folder.mkdir(parents=True, exist_ok=True)
    topics = pkgutil.resolve_name("pydoc_data.topics:topics")
    begun = {name: text[:4_000] for name, text in topics.items()}
    (folder / "topics.py").write_text(f"topics = {begun!r}\n", encoding="utf-8")
    os.utime(folder / "topics.py", (1e9, 1e9))
    for name in names:
        text = (STDLIB / f"{name}.py").read_text(encoding="utf-8")
        blocks = [b for b in text.split("\n\n\n") if b.strip()]
        lines = [json.dumps({"text": b, "url": f"{name}#{i}"}) for i, b in enumerate(blocks)]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.utime(path, (1e9, 1e9))  # the same file wherever it is written


MODULES = ["argparse", "ast", "calendar", "codecs", "enum", "locale"]


class Project:
    """A recipe file and a home, to run in this process as the command line does."""

    def __init__(self, root: Path, facts: dict) -> None:
        self.root = root
        self.facts = facts
        self.path = root / "recipe.yaml"
        self.home = Home(root / "home")
        self.reads = root / "reads.jsonl"  # what assets read in its runs
        self.write()

    def write(self) -> None:
        self.path.write_text(yaml.safe_dump(self.facts))

    @property
    def recipe(self) -> Recipe:
        return load(self.path)

    def run(self, monkeypatch: pytest.MonkeyPatch, job: Job = Job.EVERYTHING) -> Failure | None:
        self.home.claim(self.recipe.name)
        monkeypatch.setenv("DAGSTER_HOME", str(self.home.dagster))
        bring_in(self.recipe, self.home)
        with recorded_in(self.reads):
            return execute(self.recipe, self.home, lambda _: None, job)

    def materialize(self, monkeypatch: pytest.MonkeyPatch, assets: list[str]) -> None:
        """These unsharded assets alone, as from the web UI."""
        monkeypatch.setenv("DAGSTER_HOME", str(self.home.dagster))
        keys = [dg.AssetKey(asset.split("/")) for asset in assets]
        defs = build_definitions(self.recipe, str(self.home.root))
        with dg.DagsterInstance.get() as instance:
            job = defs.resolve_implicit_global_asset_job_def()
            assert job.execute_in_process(instance=instance, asset_selection=keys).success

    def ledger(self) -> list[dict]:
        return [json.loads(line) for line in self.home.ledger.read_text().splitlines()]

    def kernel_runs(self) -> list[dict]:
        return [json.loads(line) for line in self.home.kernel_runs.read_text().splitlines()]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Project:
    """A project that has been run to the end. Read it; change a copy only.

    The processes of pytest-xdist share it: the first that wants it makes it.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "finished"
    root.mkdir(exist_ok=True)
    project = Project(root, recipe_facts(root / "corpus"))
    with lock(root / "lock"):
        if not (root / "made").exists():
            write_corpus(root / "corpus", MODULES)
            with pytest.MonkeyPatch.context() as monkeypatch:
                failure = project.run(monkeypatch)
            assert failure is None, failure
            (root / "made").touch()
    return project


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that two processes end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    pipelines = {"assets", "commands", "pipelines"}
    items.sort(key=lambda i: (i.path not in slow, pipelines.isdisjoint(i.path.parts)))


_exit_status = 0


def pytest_sessionfinish(exitstatus: int) -> None:
    global _exit_status  # noqa: PLW0603
    _exit_status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Leave without teardown, as the command line does: DuckDB 2.0 would print leak reports."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_exit_status)


def copy_of(project: Project, root: Path) -> Project:
    """The same project elsewhere, sharing its corpus."""
    copied = Project(root, project.facts)
    shutil.copytree(project.home.root, copied.home.root)
    return copied


@pytest.fixture
def movable(finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The finished project over a corpus of its own, which a test may change."""
    write_corpus(tmp_path / "corpus", MODULES)
    project = copy_of(finished, tmp_path)
    project.facts = recipe_facts(tmp_path / "corpus")
    project.write()
    monkeypatch.setenv("DAGSTER_HOME", str(project.home.claim(project.recipe.name).dagster))
    bring_in(project.recipe, project.home)
    return project


def made_since(project: Project, before: int) -> dict[str, set[str | None]]:
    """Partitions made anew per asset since the ledger had `before` entries.

    But not the recipe, which each run keeps.
    """
    made: dict[str, set[str | None]] = {}
    for entry in project.ledger()[before:]:
        if not entry["reused"] and entry["asset"] != "recipe":
            made.setdefault(entry["asset"], set()).add(entry["partition"])
    return made
