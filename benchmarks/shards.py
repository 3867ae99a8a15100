"""How the time of a run and the size of Dagster's records grow with the number of shards.

    python benchmarks/shards.py [--shards 50 500] [--folder DIR] [--keep]

For each number, creates a corpus of that many files, pieces of the standard library of 8,000
characters, each of which becomes a shard. Then runs the complete pipeline with tiny models through
the command line: from nothing, again when everything exists, and again after one new file; then
`status`. Prints the wall times, the times of the slowest steps as recorded by Dagster, and the size
of Dagster's records.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from dagster import DagsterInstance

ROOT = Path(__file__).resolve().parent.parent
CHARS = 8_000
CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
TRAINING = {"learning_rate": 6.0e-3, "batch_sequences": 8}


def recipe(files: Path) -> dict[str, object]:
    """Return a recipe with tiny models over these files, with one shard per file."""
    model = {"type": "gpt_neox", "config": CONFIG}
    topics = {
        "name": "topics",
        "files": "{stdlib}/pydoc_data/topics.py",
        "format": "python_dict",
    }
    return {
        "name": "shards",
        "sequence_length": 64,
        "corpus": {
            "sources": [{"name": "pieces", "files": f"{files}/*.txt", "format": "text"}],
            "shard_bytes": 1,
        },
        "tokenizer": {"vocab_size": 600},
        "prior": {"sample_chars": 80_000, "model": model, "training": TRAINING},
        "domains": [
            {
                "name": "reference",
                "sources": [topics],
                "held_out": 0.05,
                "probe": 0.6,
                "training": TRAINING,
            }
        ],
        "arms": [{"method": "color", "tau": 8}, {"method": "random"}],
        "target": {"model": model, "training": TRAINING, "training_tokens": 10_000},
        "evaluation": {"seeds": [1]},
    }


def pieces(n: int) -> list[str]:
    """Return n pieces of the source code of the standard library."""
    text = ""
    for path in sorted(Path(os.__file__).parent.glob("**/*.py")):
        if "site-packages" not in path.parts and "test" not in path.parts:
            text += path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= n * CHARS:
            return [text[i * CHARS : (i + 1) * CHARS] for i in range(n)]
    raise SystemExit(f"the standard library is too small for {n} pieces of {CHARS} characters")


def timed(folder: Path, command: str) -> float:
    """Run a `colorfilter` command and return the seconds."""
    begun = time.monotonic()
    place = ["--recipe", str(folder / "recipe.yaml"), "--home", str(folder / "home")]
    subprocess.run(
        [sys.executable, "-m", "commands.cli", command, *place],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.monotonic() - begun


def steps(folder: Path) -> dict[str, float]:
    """Return the seconds of every step of the last run, longest first."""
    with DagsterInstance.from_config(str(folder / "home" / "dagster")) as instance:
        run = instance.get_runs(limit=1)[0]
        found = {
            s.step_key: s.end_time - s.start_time
            for s in instance.get_run_step_stats(run.run_id)
            if s.end_time and s.start_time
        }
    return dict(sorted(found.items(), key=lambda step: -step[1]))


def size(folder: Path) -> float:
    """Return the size of the files in a folder, in MB."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6


def measure(folder: Path, n: int) -> None:
    """Run over n shards and print the results."""
    files = folder / "pieces"
    files.mkdir()
    made = pieces(n + 1)
    for i in range(n):
        (files / f"{i:05d}.txt").write_text(made[i], encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(files)), encoding="utf-8")
    print(f"{n} shards", flush=True)
    records = folder / "home" / "dagster"
    for what in ("from nothing", "everything exists", "one new file"):
        if what == "one new file":
            (files / f"{n:05d}.txt").write_text(made[n], encoding="utf-8")
        before = size(records) if records.exists() else 0.0
        seconds = timed(folder, "run")
        longest = ", ".join(f"{k} {v:.1f}" for k, v in list(steps(folder).items())[:12])
        grown = size(records) - before
        print(f"  {what}: {seconds:.1f} s, records +{grown:.1f} MB; {longest}", flush=True)
    print(f"  status: {timed(folder, 'status'):.1f} s", flush=True)
    ledger = (folder / "home" / "ledger.jsonl").stat().st_size / 1e6
    print(f"  ledger {ledger:.1f} MB, Dagster's records {size(records):.1f} MB", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark for each number of shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--folder", type=Path, help="parent folder of homes (default: temporary)")
    parser.add_argument("--keep", action="store_true", help="do not delete the homes")
    options = parser.parse_args(arguments)
    for n in options.shards:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            measure(folder, n)
        finally:
            if not options.keep:
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
