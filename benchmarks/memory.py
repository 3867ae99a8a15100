"""Peak memory of a complete run, over all its processes, as the corpus grows.

    python benchmarks/memory.py --data DATA

DATA has `web/*.jsonl.gz` and `books/*.jsonl.gz`, JSON Lines with a `text` field. Three corpora are
created from it: a third of the web documents, all of them, and three copies of each, salted so that
none is a duplicate. The models are as small as possible, so that the pipeline is measured.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

MODEL = {
    "type": "gpt_neox",
    "config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 128,
    },
}
TRAINING = {"learning_rate": 1e-2, "batch_sequences": 16}


def write_corpus(data: Path, folder: Path, copies: int, every: int) -> int:
    """Write `copies` copies of every `every`-th web document. Return the characters written."""
    folder.mkdir()
    chars = 0
    for source in sorted((data / "web").glob("*.jsonl.gz")):
        if "noise" in source.name:
            continue
        for copy in range(copies):
            with (
                gzip.open(source, "rt", encoding="utf-8") as lines,
                gzip.open(folder / f"{copy}-{source.name}", "wt", 5, encoding="utf-8") as out,
            ):
                for i, line in enumerate(lines):
                    if i % every == 0:
                        text = json.loads(line)["text"]
                        salted = text if copy == 0 else f"Copy {copy} of {i}. {text}"
                        out.write(json.dumps({"text": salted}) + "\n")
                        chars += len(salted)
    return chars


def recipe(corpus: Path, data: Path) -> dict:
    """Return a recipe with models that cost next to nothing."""
    books = str(data / "books" / "*.jsonl.gz")
    return {
        "name": "memory",
        "sequence_length": 128,
        "corpus": {
            "sources": [{"name": "web", "files": str(corpus / "*.gz")}],
            "shard_bytes": 4_000_000,
        },
        "tokenizer": {"vocab_size": 1024},
        "prior": {"sample_chars": 1_000_000, "model": MODEL, "training": TRAINING},
        "domains": [
            {"name": "books", "sources": [{"name": "b", "files": books}], "training": TRAINING}
        ],
        "arms": [{"method": "color", "tau": 16}, {"method": "random"}],
        "target": {"model": MODEL, "training": TRAINING, "training_tokens": 100_000},
        "evaluation": {"seeds": [1], "random_multiples": [1]},
    }


def peak_memory(command: list[str]) -> tuple[float, float]:
    """Run a command. Return the peak PSS summed over its process tree, in MB, and the seconds."""
    begun = time.monotonic()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        total = 0
        for member in [process, *process.children(recursive=True)]:
            try:
                total += member.memory_full_info().pss
            except psutil.Error:
                continue
        peak = max(peak, total)
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"the run failed with exit code {process.returncode}")
    return peak / 1e6, time.monotonic() - begun


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with web/ and books/")
    data = parser.parse_args().data
    print("| corpus | million characters | peak MB | compared with the first | seconds |")
    print("|---|---|---|---|---|")
    first = None
    for name, copies, every in (("a third", 1, 3), ("all", 1, 1), ("three copies", 3, 1)):
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            chars = write_corpus(data, root / "corpus", copies, every)
            (root / "recipe.yaml").write_text(yaml.safe_dump(recipe(root / "corpus", data)))
            command = [sys.executable, "-m", "commands.cli", "run", "--recipe"]
            command += [str(root / "recipe.yaml"), "--home", str(root / "home")]
            peak, seconds = peak_memory(command)
        first = first or peak
        growth = f"{100 * (peak / first - 1):+.0f} %"
        print(f"| {name} | {chars / 1e6:.1f} | {peak:.0f} | {growth} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
