"""Time and memory to write a filtered dataset: a million sequences of 512 tokens and their text.

    python benchmarks/dataset.py [--selected 1000000] [--tau 2 16] [--folder DIR]

Creates a corpus of twice `--selected` sequences in 16 shards: random tokens, documents of 482
tokens on average with text from the standard library, spans, and the sha256 of every sequence. Then
writes a random 1/tau of it like the asset `filtered_dataset`: `tokens/` and `documents/`, each in
its own process, whose peak memory includes its imports. Two values of tau on the same corpus
separate the cost of reading it from the cost of writing the selection.
"""

import argparse
import shutil
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from scale import LENGTH, make
from selection import alone

from colorfilter.selection.dataset import write_selected_text, write_tokens
from colorfilter.selection.decontamination import without_leaks
from resources.score_parts import Part

SHARDS, CHARS = 16, 4


def shard_folders(folder: Path) -> dict[str, Path]:
    """Return the folder of each shard."""
    return {f"webtext-{i:010x}": folder / f"webtext-{i:010x}" for i in range(SHARDS)}


def make_corpus(folder: Path, sequences: int) -> None:
    """Write the packed tokens and documents of every shard."""
    size = sequences // SHARDS
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(p.read_text(encoding="utf-8") for p in library)
    text = text.encode("ascii", "replace").decode()
    rng = np.random.default_rng(0)
    for number, (shard, place) in enumerate(shard_folders(folder).items()):
        make(Part(shard, "1", documents=place, tokens=place), number, size, "full")
        np.save(place / "tokens.npy", rng.integers(0, 50_000, (size, LENGTH), dtype=np.uint16))
        documents = pl.read_parquet(place / "documents.parquet")
        starts = rng.integers(0, len(text) - 50_000, len(documents)).tolist()
        lengths = documents["n_chars"].to_list()
        texts = [text[s : s + n] for s, n in zip(starts, lengths, strict=True)]
        documents.with_columns(text=pl.Series(texts)).write_parquet(
            place / "documents.parquet", compression="zstd", row_group_size=4_096
        )


def draw(folder: Path, sequences: int, tau: int) -> None:
    """Write a random selection of 1/tau of the corpus, in random order."""
    size = sequences // SHARDS
    rng = np.random.default_rng(tau)
    chosen = np.sort(rng.choice(size * SHARDS, size * SHARDS // tau, replace=False))
    names = pl.Series("shard", list(shard_folders(folder)))
    color = np.sort(rng.normal(size=len(chosen)))
    chosen = rng.permutation(chosen)
    pl.DataFrame(
        {
            "rank": np.arange(1, len(chosen) + 1),
            "shard": names.gather(chosen // size),
            "position": chosen % size,
            "score": color,
            "color": color,
        }
    ).write_parquet(folder / "selection.parquet", compression="zstd")


def read(folder: Path) -> pl.DataFrame:
    """Read the selection like the asset does, with no leaks to exclude."""
    leaks = pl.DataFrame(schema={"shard": pl.String, "positions": pl.List(pl.Int64)})
    return without_leaks(pl.scan_parquet(folder / "selection.parquet"), leaks)


def tokens(folder: Path) -> float:
    """Write `tokens/` and return the seconds."""
    chosen = read(folder).drop("color")
    begun = time.monotonic()
    write_tokens(chosen, shard_folders(folder), 0, folder / "out" / "tokens")
    return time.monotonic() - begun


def documents(folder: Path) -> float:
    """Write `documents/` and return the seconds."""
    chosen, places = read(folder), shard_folders(folder)
    texts = {shard: place / "documents.parquet" for shard, place in places.items()}
    begun = time.monotonic()
    write_selected_text(chosen, places, texts, None, folder / "out" / "documents")
    return time.monotonic() - begun


def main() -> None:
    """Create the corpus, write datasets from it, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--selected", type=int, default=1_000_000)
    parser.add_argument("--tau", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--folder", type=Path, help="working folder (default: temporary)")
    parser.add_argument("--keep", action="store_true", help="keep the corpus for a later call")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp()) if options.folder is None else options.folder
    sequences = 2 * options.selected
    try:
        if not any(place.exists() for place in shard_folders(folder).values()):
            # In its own process, because child processes start with their parent's peak memory.
            alone(make_corpus, folder, sequences)
        for tau in options.tau:
            alone(draw, folder, sequences, tau)
            print(f"1/{tau} of {sequences:,}", flush=True)
            for measured in (tokens, documents):
                shutil.rmtree(folder / "out", ignore_errors=True)
                taken = alone(measured, folder)
                size = sum(p.stat().st_size for p in (folder / "out").rglob("*.*")) / 1e9
                print(f"  {measured.__name__}: {taken}; {size:.2f} GB written", flush=True)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
