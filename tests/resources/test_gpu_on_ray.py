"""The Gpu resource on a real Ray cluster gives one machine's results, despite failures."""

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from colorfilter.config.recipe import Model, Training
from colorfilter.data.tokens import train_tokenizer
from colorfilter.errors import UnreachableError
from colorfilter.models import checkpoints
from colorfilter.scoring import chunks
from colorfilter.storage.files import file_sha256
from colorfilter.training.spec import Checkpoint, TrainSpec, planned_tokens
from resources import gpu as resource
from resources.gpu import Gpu, ScoreJob
from resources.home import Home
from tests.three_nodes import loopback_only, s3_server, three_nodes, workers_at_work

pytestmark = pytest.mark.slow

LENGTH, VOCAB, BATCH, CHUNKS = 128, 2048, 16, 18

MODELS = ("one", "two")
PARAMETERS = 10**6
CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": LENGTH,
}
FLOPS = {"cpu": 6.5 * 2 * PARAMETERS * BATCH * LENGTH}  # six batches to a chunk
DRIVER = """
import sys
from pathlib import Path
from colorfilter.scoring import chunks
from resources.gpu import Gpu, ScoreJob

root, address, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
chunks.FLOPS_PER_CHUNK = {"cpu": float(sys.argv[4])}
at = root / "home" / "artifacts"
job = ScoreJob(
    {m: at / m for m in ("one", "two")}, {m: at / name / m for m in ("one", "two")}, 10**6,
    at / "tokens", "web", "float32",
)
gpu = Gpu(home=str(root / "home"), backend="ray", address=address)
list(gpu.score([job], lambda n: print(n, flush=True)))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with packed tokens, two models and a tokenizer in it."""
    root = tmp_path_factory.mktemp("ray")
    at = Home(root / "home").claim("tests").artifacts
    for seed, name in enumerate(MODELS):
        built = checkpoints.build(Model(type="gpt_neox", config=CONFIG), VOCAB, LENGTH, seed)
        built.save_pretrained(at / name)
    n = CHUNKS * 6 * BATCH - 5
    (at / "tokens").mkdir()
    rows = np.random.default_rng(0).integers(0, VOCAB, (n, LENGTH)).astype(np.uint16)
    np.save(at / "tokens" / "tokens.npy", rows)
    n_tokens = np.r_[np.full(n - 1, LENGTH), 50]
    pl.DataFrame({"position": np.arange(n), "n_tokens": n_tokens}).write_parquet(
        at / "tokens" / "sequences.parquet"
    )
    return root


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(chunks, "FLOPS_PER_CHUNK", FLOPS)
        # Before the nodes, which have their environment.
        with (
            loopback_only(),
            s3_server(monkeypatch, "colorfilter") as bucket,
            three_nodes() as found,
        ):
            found.bucket = bucket
            yield found
            resource.release()


def job(root: Path, name: str) -> ScoreJob:
    at = root / "home" / "artifacts"
    outs = {m: at / name / m for m in MODELS}
    models = {m: at / m for m in MODELS}
    return ScoreJob(models, outs, PARAMETERS, at / "tokens", "web", "float32")


def on_ray(root: Path, nodes: Any, **more: Any) -> Gpu:
    return Gpu(home=str(root / "home"), backend="ray", address=nodes.address, **more)


def files(root: Path, name: str) -> dict[str, str]:
    """sha256 of all chunks by model and name."""
    at = root / "home" / "artifacts" / name
    return {str(p.relative_to(at)): file_sha256(p) for p in sorted(at.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def local(root: Path, nodes: Any) -> dict[str, str]:
    """What this machine alone gives."""
    list(Gpu(home=str(root / "home")).score([job(root, "local")]))
    made = files(root, "local")
    assert len(made) == CHUNKS * len(MODELS)
    return made


def test_scores_are_those_of_one_machine(
    root: Path, nodes: Any, local: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[int] = []
    caplog.set_level(logging.INFO)
    found = list(on_ray(root, nodes).score([job(root, "three")], told.append))
    assert files(root, "three") == local
    assert sorted(model for _, model, _ in found) == list(MODELS)
    receipts = [r for _, _, rs in found for r in rs]
    assert sum(told) == sum(r.tokens for r in receipts)
    at_work = {str(r.node) for r in receipts}
    assert len(at_work) == 3
    first, *_, last = [r.getMessage() for r in caplog.records if "by node" in r.getMessage()]
    assert f"chunks: {CHUNKS} of {CHUNKS}; shards: 1 of 1 complete; by node: " in last
    assert all(node in last for node in at_work)
    assert f"shards: 0 of 1 complete, web 1 of {CHUNKS};" in first
    lines = (root / "home" / "kernel_runs.jsonl").read_text().splitlines()
    assert sum('"artifacts/three/' in line and '"node": "127.0.0.1/' in line for line in lines) == (
        CHUNKS * len(MODELS)
    )
    again = list(on_ray(root, nodes).score([job(root, "three")]))
    assert all(r.seconds == 0 for _, _, rs in again for r in rs)


def test_neither_a_killed_node_nor_a_late_worker_changes_a_loss(
    root: Path, nodes: Any, local: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """The late worker was given up, and its device gives other bits."""
    work = job(root, "killed")
    staged = root / "home" / "staged" / "artifacts" / "killed" / "one"
    staged.mkdir(parents=True)
    first = min(local)
    assert first.startswith("one/")
    table = pl.read_parquet(root / "home" / "artifacts" / "local" / first)
    other = table.with_columns(loss=pl.col("loss") + 1)
    killed: list[str] = []
    done = 0

    def disturb(amount: int) -> None:
        nonlocal done
        done += amount
        other.write_parquet(staged / f"{Path(first).stem[:-16]}{'0' * 16}.parquet")
        if done > 0 and not killed:
            node = next(iter(nodes.worker_nodes))
            killed.append(node.node_id)
            nodes.remove_node(node, allow_graceful=False)

    list(on_ray(root, nodes).score([work], disturb))
    nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    assert killed
    assert files(root, "killed") == local
    assert "retrying" in caplog.text


def test_a_driver_that_is_killed_loses_no_chunk_that_was_committed(
    root: Path, nodes: Any, local: dict[str, str]
) -> None:
    name, flops = "driver", str(FLOPS["cpu"])
    command = [sys.executable, "-c", DRIVER, str(root), nodes.address, name, flops]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        staged = root / "home" / "staged" / "artifacts" / name
        deadline = time.monotonic() + 120

        def committed() -> set[str]:
            return {p.name for p in (root / "home").rglob(f"{name}/*/losses-*.parquet")}

        while not committed():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        driver.send_signal(signal.SIGSTOP)  # which takes nothing in any more
        while len(committed()) < 6:  # by two models, the first call of each of three workers
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert workers_at_work()
        driver.kill()
    while workers_at_work():
        assert time.monotonic() < deadline + 60
        time.sleep(0.2)
    before = committed()
    assert len(before) >= 6
    found = list(on_ray(root, nodes, workers=1).score([job(root, name)]))
    scored = {r.file for _, _, rs in found for r in rs if r.seconds}
    assert files(root, name) == local
    assert not scored & before
    assert not list(staged.rglob("*.parquet"))


def test_everything_by_way_of_s3(root: Path, nodes: Any, local: dict[str, str]) -> None:
    import fsspec

    gpu = on_ray(root, nodes, storage=f"{nodes.bucket}/pool", workers=2)
    list(gpu.score([job(root, "s3")]))
    assert files(root, "s3") == local
    there = fsspec.filesystem("s3").find("colorfilter/pool")
    own = f"colorfilter/pool/{Home(root / 'home').identity()}/artifacts/tokens@"
    assert any(path.startswith(own) and path.endswith("tokens.npy") for path in there)
    assert not any("@staged" in path for path in there)
    at = root / "home" / "artifacts"
    alone = Gpu(home=str(root / "home"))
    checkpoints = [at / MODELS[0]]
    ((nll, n),) = gpu.evaluate(checkpoints, at / "tokens", at / "s3")
    ((nll_alone, n_alone),) = alone.evaluate(checkpoints, at / "tokens", at / "s3")
    assert np.array_equal(nll, nll_alone, equal_nan=True)
    assert np.array_equal(n, n_alone)
    for place in ("tokens", *MODELS):
        gpu.discard_copies(at / place)
    assert not fsspec.filesystem("s3").find("colorfilter/pool")


def test_where_nothing_is_to_be_done_no_cluster_is_asked_for(root: Path) -> None:
    resource.release()
    gpu = Gpu(home=str(root / "home"), backend="ray", address="127.0.0.1:1")
    at = root / "home" / "artifacts"
    assert list(gpu.score([])) == list(gpu.train([])) == []
    assert gpu.evaluate([], at / "tokens", at / "none") == []
    with pytest.raises(UnreachableError, match=r"compute\.address"):
        list(gpu.score([job(root, "none")]))


@pytest.fixture(scope="module")
def spec(root: Path) -> TrainSpec:
    """A training of the first model on a few of the sequences, to two end points."""
    at = root / "home" / "artifacts"
    (at / "tokenizer").mkdir()
    train_tokenizer([f"{i} word" for i in range(3000)], 300, at / "tokenizer")
    (at / "few").mkdir()
    np.save(at / "few" / "tokens.npy", np.load(at / "tokens" / "tokens.npy")[:100])
    facts = pl.read_parquet(at / "tokens" / "sequences.parquet")
    facts[:100].write_parquet(at / "few" / "sequences.parquet")
    return TrainSpec(
        start=str(at / "one"),
        tokens=at / "few",
        tokenizer=at / "tokenizer",
        training=Training(learning_rate=1e-3, batch_sequences=8),
        seed=3,
        endpoints=(48, 64),
        out=at / "alone" / "3",
        held_out=at / "few",
    )


@pytest.fixture(scope="module")
def trained(root: Path, nodes: Any, spec: TrainSpec) -> dict[int, list[Checkpoint]]:
    """What this machine makes of it, by seed."""
    specs = [replace(spec, seed=n, out=spec.out.with_name(str(n))) for n in (3, 4)]
    made = Gpu(home=str(root / "home")).train(specs, share=os.cpu_count() or 1)
    return {specs[i].seed: checkpoints for i, checkpoints in made}


def assert_same(ours: list[Checkpoint], theirs: list[Checkpoint], out: Path, devices: int) -> None:
    """To the bit on a device, and to the last digits of a loss on two."""
    curve, other = (pl.read_parquet(c[0].path.parent / "curve.parquet") for c in (ours, theirs))
    assert (curve["loss"] - other["loss"]).abs().max() < (1e-9 if devices == 1 else 2e-5)
    for one, two in zip(ours, theirs, strict=True):
        assert one.path.parent == out
        assert one.tokens == two.tokens
        weights = [file_sha256(c.path / "model.safetensors") for c in (one, two)]
        assert (weights[0] == weights[1]) == (devices == 1)
        assert (one.path / "tokenizer.json").exists()


@pytest.fixture(params=[(None, 1), ("s3", 2)])
def trainer(request: pytest.FixtureRequest, root: Path, nodes: Any) -> tuple[Gpu, Path]:
    """By way of the home or of a storage, on a device or two; and a folder to train in."""
    storage, devices = request.param
    more: dict[str, Any] = {"storage": f"{nodes.bucket}/trained"} if storage else {}
    name = f"{request.function.__name__}_{storage}_{devices}"
    gpu = on_ray(root, nodes, devices_per_model=devices, **more)
    return gpu, root / "home" / "artifacts" / name


def test_training_gives_what_one_machine_gives_even_where_a_worker_is_killed(
    trainer: tuple[Gpu, Path],
    root: Path,
    spec: TrainSpec,
    trained: dict[int, list[Checkpoint]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It goes on from its state; beside it trains one that nothing happens to, if there is room."""
    gpu, out = trainer
    begun = tmp_path / "begun"

    def train_and_die(spec: TrainSpec, *arguments: Any) -> Any:
        """Once, in the sixth step of the first seed; of a group the one that writes states."""
        from torch import distributed

        from colorfilter.compute import local_pool, worker_calls
        from colorfilter.training import training

        training.CHECKPOINT_SECONDS = training.SAVING_PAUSE = 0.0
        report, steps = local_pool.report, itertools.count(1)
        writes = not distributed.is_initialized() or distributed.get_rank() == 0

        def count(amount: int) -> None:
            if writes and spec.seed == 3 and next(steps) == 6 and not begun.exists():
                begun.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            report(amount)

        local_pool.report = count
        return worker_calls.train(spec, *arguments)

    monkeypatch.setattr(resource, "TRAIN", train_and_die)
    seeds = (3, 4)[: 3 - gpu.devices_per_model]
    specs = [replace(spec, seed=seed, out=out / str(seed)) for seed in seeds]
    for i, made in gpu.train(specs):
        assert_same(made, trained[specs[i].seed], specs[i].out, gpu.devices_per_model)
    assert begun.exists()
    lines = map(json.loads, (root / "home" / "kernel_runs.jsonl").read_text().splitlines())
    tokens = {n["folder"]: n["tokens"] for n in lines if n["verb"] == "train"}
    stood = {3: 5 * 8 * LENGTH, 4: 0}
    for one in specs:
        folder = f"artifacts/{out.name}/{one.seed}"
        assert tokens[folder] == planned_tokens(one) - stood[one.seed]
