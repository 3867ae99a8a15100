"""Scoring on a Ray cluster compared with this machine alone, and Ray's overhead for many chunks.

    python benchmarks/cluster.py [--rounds 2] [--chunks 4] [--flops 1e13] [--many 10000]

Scores random tokens with random weights (42 M parameters) on CPU cores through `Gpu.score`, in
chunks of `--flops` operations, about a minute on a core with native bf16 products. The local
backend and Ray take turns, each with one worker and with two. Then `--many` calls that do nothing
run on two workers, to measure the time per call and the memory of the process that submits them.
Starts a cluster on the cores of this machine, or uses the one at RAY_ADDRESS.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil

from colorfilter.scoring import chunks

LENGTH, VOCABULARY = 512, 16_384
CONFIG = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "intermediate_size": 2_048,
    "max_position_embeddings": LENGTH,
}
WAYS = [("local", 1), ("local", 2), ("ray", 1), ("ray", 2)]


def write_work(root: Path, chunks: int) -> int:
    """Write a model and tokens for `chunks` chunks to the home `root`. Return its parameters."""
    from colorfilter.config.recipe import Model
    from colorfilter.models import checkpoints
    from colorfilter.scoring.chunks import chunk_sequences

    built = checkpoints.build(Model(type="gpt_neox", config=CONFIG), VOCABULARY, LENGTH, 0)
    built.save_pretrained(root / "model")
    parameters = sum(p.numel() for p in built.parameters())
    n = chunks * chunk_sequences(parameters, LENGTH, "cpu")
    (root / "tokens").mkdir()
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (n, LENGTH)).astype(np.uint16)
    np.save(root / "tokens" / "tokens.npy", rows)
    facts = {"position": np.arange(n), "n_tokens": np.full(n, LENGTH)}
    pl.DataFrame(facts).write_parquet(root / "tokens" / "sequences.parquet")
    return parameters


def score(root: Path, name: str, backend: str, workers: int, parameters: int) -> None:
    """Score everything and print tokens/s, seconds per chunk, and seconds of overhead."""
    from resources.gpu import Gpu, ScoreJob

    os.sched_setaffinity(0, set(range(workers if backend == "local" else os.cpu_count() or 1)))
    more: dict[str, Any] = {"backend": "ray", "workers": workers} if backend == "ray" else {}
    job = ScoreJob(
        {"model": root / "model"}, {"model": root / name}, parameters, root / "tokens", "s", "bf16"
    )
    begun = time.monotonic()
    ((_, _, receipts),) = Gpu(home=str(root), **more).score([job])
    wall = time.monotonic() - begun
    busy = sum(r.seconds for r in receipts)
    tokens = sum(r.tokens for r in receipts)
    print(tokens / wall, busy / len(receipts), wall - busy / workers, flush=True)


def measure(root: Path, options: argparse.Namespace) -> None:
    """Measure every backend and number of workers in turn, each in its own process."""
    parameters = write_work(root, options.chunks)
    found: dict[tuple[str, int], list[list[float]]] = {}
    for round_ in range(options.rounds):
        for backend, workers in WAYS:
            own = ["--root", str(root), "--only", f"{backend}{round_}{workers}", backend]
            own += [str(workers), str(parameters), "--flops", str(options.flops)]
            command = [sys.executable, __file__, *own]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            figures = [float(f) for f in done.stdout.split()]
            found.setdefault((backend, workers), []).append(figures)
            print(backend, workers, figures, flush=True)
    base = statistics.median(rate for rate, *_ in found["local", 1])
    print("backend, workers: tokens/s (ratio), seconds per chunk, seconds of overhead")
    for (backend, workers), rounds in found.items():
        rate, chunk, beside = (statistics.median(f) for f in zip(*rounds, strict=True))
        print(f"{backend}, {workers}: {rate:,.0f} ({rate / base:.2f}x), {chunk:.1f}, {beside:.1f}")


def nothing(_what: str) -> None:
    """Do nothing: a chunk without work."""


def many(n: int) -> None:
    """Run `n` calls that do nothing and print their overhead."""
    from colorfilter.compute.ray_pool import Cluster, connected

    with connected(None):
        calls = [(f"chunk {i}",) for i in range(n)]
        process = psutil.Process()
        begun, seen = time.monotonic(), 0
        before = process.memory_info().rss
        first = 0.0
        for _ in Cluster(most=2).run(nothing, calls):
            seen += 1
            if seen == 1:
                first = time.monotonic() - begun
        assert seen == n
        taken = time.monotonic() - begun
        more = (process.memory_info().rss - before) / 1e6
    print(
        f"{n:,} empty calls, two workers: first after {first:.1f} s, "
        f"{(taken - first) / n * 1e3:.2f} ms each, {more:.1f} MB more in the driver"
    )


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--flops", type=float, default=1e13, help="FLOPs of a chunk")
    parser.add_argument("--many", type=int, default=10_000, help="number of empty calls")
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chunks.FLOPS_PER_CHUNK["cpu"] = options.flops
    if options.only:
        name, backend, workers, parameters = options.only
        score(options.root, name, backend, int(workers), int(parameters))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options)
    many(options.many)


if __name__ == "__main__":
    main()
