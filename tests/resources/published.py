"""Generate parts of a score store, and read what is published of them."""

from pathlib import Path

import polars as pl

from colorfilter.selection.sql import fetch
from resources.score_parts import Part, PublishedModel
from resources.score_store import ScoreStore

LENGTH = 8
MODELS = [
    PublishedModel("p", "prior", None, "/p"),
    PublishedModel("c", "conditional", "books", "/c"),
]


def parts(
    root: Path,
    shard: str,
    losses: dict[str, list[float]],
    version: str = "1",
    text: str | None = None,
) -> list[Part]:
    """The text of a shard with one document over all its sequences, and losses by models."""
    folder = root / f"{shard}-{version}"
    folder.mkdir(parents=True)
    n = len(next(iter(losses.values())))
    pl.DataFrame(
        {
            "doc_id": [f"{shard}-doc"],
            "source_file": ["f"],
            "source_line": [1],
            "source": ["s"],
            "n_chars": [9],
            "sha256": [text or shard],
            "extra": ["{}"],
            "text": ["some text"],
        }
    ).write_parquet(folder / "documents.parquet")
    pl.DataFrame(
        {"position": range(n), "n_tokens": pl.Series([8] * n, dtype=pl.Int32), "sha256": ["x"] * n}
    ).write_parquet(folder / "sequences.parquet")
    pl.DataFrame(
        {
            "position": range(n),
            "offset": [0] * n,
            "doc_id": [f"{shard}-doc"] * n,
            "doc_start": [8 * i for i in range(n)],
            "n_tokens": [8] * n,
            "char_start": [0] * n,
            "char_end": [9] * n,
        }
    ).write_parquet(folder / "spans.parquet")
    made = [Part(shard, f"text-{version}", documents=folder, tokens=folder)]
    for model, values in losses.items():
        out = folder / model
        out.mkdir()
        # Columns in another order than the table's: they must go in by name.
        pl.DataFrame(
            {
                "precision": ["float32"] * n,
                "n_tokens": pl.Series([7] * n, dtype=pl.Int32),
                "loss": pl.Series(values, dtype=pl.Float32),
                "position": range(n),
                "shard": [shard] * n,
                "model": [model] * n,
            }
        ).write_parquet(out / f"losses-0-{n}-x.parquet")
        made.append(Part(shard, f"{model}-{version}", model=model, losses=out))
    return made


def colors(store: ScoreStore) -> list[tuple]:
    with store.read() as connection:
        return fetch(connection, "SELECT shard, position, color FROM color ORDER BY ALL")


def excluded(store: ScoreStore) -> list[tuple]:
    with store.read() as connection:
        return fetch(connection, "SELECT shard, position, reason FROM excluded ORDER BY ALL")
