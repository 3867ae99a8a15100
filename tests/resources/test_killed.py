"""Scoring killed at random moments: each loss is recorded exactly once, bit for bit.

Two kills; COLORFILTER_TEST_KILLS=20 for more.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from resources.home import Home

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("COLORFILTER_TEST_KILLS", "2"))
LENGTH, VOCAB = 128, 2048
SCORE = """
import sys
from pathlib import Path
from colorfilter.scoring import chunks
from resources.gpu import Gpu, ScoreJob

root, flops = Path(sys.argv[1]), float(sys.argv[2])
chunks.FLOPS_PER_CHUNK = {"cpu": flops}
models = {name: root / name for name in ("one", "two")}
outs = {name: root / "home" / sys.argv[3] / name for name in models}
job = ScoreJob(models, outs, 10**6, root / "tokens", "web", "float32")
done = [receipt for _, _, receipts in Gpu(home=str(root / "home")).score(
    [job], lambda n: n and print("scored", flush=True)) for receipt in receipts]
print(len(done), "chunks", flush=True)
"""
BATCH_FLOPS = 2 * 10**6 * 2_048


def test_a_scoring_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    import torch

    from colorfilter.config.recipe import Model
    from colorfilter.models import attention, checkpoints
    from colorfilter.scoring.scoring import Scorer, score_shard

    config = {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": LENGTH,
    }
    for seed, name in enumerate(("one", "two")):
        built = checkpoints.build(Model(type="gpt_neox", config=config), VOCAB, LENGTH, seed)
        built.save_pretrained(tmp_path / name)
    home = Home(tmp_path / "home").claim("tests").root
    # Half a second of one core to a chunk, and more chunks than what kills let through.
    batches = 3
    n = 16 * batches * (4 + 2 * KILLS)
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    rng = np.random.default_rng(0)
    np.save(tokens / "tokens.npy", rng.integers(0, VOCAB, size=(n, LENGTH), dtype=np.uint16))
    pl.DataFrame(
        {"position": range(n), "n_tokens": [LENGTH] * n},
        schema={"position": pl.Int64, "n_tokens": pl.Int32},
    ).write_parquet(tokens / "sequences.parquet")

    flops = batches * BATCH_FLOPS
    moments, killed_at = random.Random(0), []
    for _ in range(KILLS):
        process = start(tmp_path, flops, "killed")
        assert process.stdout is not None
        assert process.stdout.readline() == "scored\n"
        time.sleep(moments.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(len(list((home / "killed").rglob("*.parquet"))))
    assert sorted(killed_at) == killed_at
    finished = start(tmp_path, flops, "killed").communicate(timeout=600)[0]
    chunks = 2 * (4 + 2 * KILLS)
    assert finished.endswith(f"{chunks} chunks\n")
    assert killed_at[-1] < chunks, "all was scored before the last kill"
    cpu = torch.device("cpu")
    scorers = {
        m: Scorer(attention.prepare(checkpoints.load(tmp_path / m), cpu)) for m in ("one", "two")
    }
    outs = {name: home / "whole" / name for name in scorers}
    torch.set_num_threads(1)
    score_shard(scorers, tokens, "web", outs, n)
    for name in scorers:
        table, wanted = (read(home / folder / name) for folder in ("killed", "whole"))
        assert table["position"].to_list() == list(range(n))
        assert table.equals(wanted)
        assert not list((home / "killed" / name).glob("*.tmp"))


def start(root: Path, flops: float, out: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCORE, str(root), str(flops), out]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def read(folder: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(p) for p in sorted(folder.glob("*.parquet"))])
