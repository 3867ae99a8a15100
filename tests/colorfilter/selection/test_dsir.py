import json
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from colorfilter.data.documents import DOCUMENTS, text_sha256
from colorfilter.selection.dsir import rank_documents, write_in_order

WORDS = [f"{a}{b}" for a in "bcdfgh" for b in ("an", "el", "ir", "os", "um", "at", "ek")]


def make_texts(n: int, seed: int, words: list[str], least: int = 100) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(least, 160))) for _ in range(n)]


def write(path: Path, texts: list[str]) -> Path:
    rows = {
        "doc_id": [f"{path.parent.name}-{i}" for i in range(len(texts))],
        "source_file": [str(path)] * len(texts),
        "source_line": list(range(len(texts))),
        "source": ["web"] * len(texts),
        "n_chars": [len(t) for t in texts],
        "sha256": [text_sha256(t) for t in texts],
        "extra": ["{}"] * len(texts),
        "text": texts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows).select(DOCUMENTS.names).write_parquet(path)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, Path]:
    mixed = make_texts(30, 1, WORDS) + make_texts(20, 2, WORDS[:12]) + ["too short " * 20]
    parts = {"a": mixed[0::2], "b": mixed[1::2]}
    return {s: write(tmp_path / s / "documents.parquet", t) for s, t in parts.items()}


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    return write(tmp_path / "down" / "documents.parquet", make_texts(25, 3, WORDS[:12]))


def by_hand(corpus: dict[str, Path], domain: Path, seed: int, k: int, folder: Path) -> set[str]:
    """What the package itself chooses from the same texts as JSON Lines."""
    from data_selection import HashedNgramDSIR

    def as_lines(path: Path, name: str) -> str:
        texts = pl.read_parquet(path)["text"]
        lines = folder / f"{name}.jsonl"
        lines.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        return str(lines)

    folder.mkdir()
    raw = [as_lines(path, shard) for shard, path in sorted(corpus.items())]
    package = HashedNgramDSIR(raw, [as_lines(domain, "domain")], str(folder / "cache"), num_proc=1)
    package.fit_importance_estimator()
    package.compute_importance_weights()
    np.random.seed(seed)
    package.resample(out_dir=str(folder / "out"), num_to_sample=k, cache_dir=str(folder / "re"))
    lines = [line for f in (folder / "out").glob("*.jsonl") for line in f.read_text().splitlines()]
    return {text_sha256(json.loads(line)["text"]) for line in lines}


@pytest.mark.parametrize("k", [1, 17, 40])
def test_the_first_drawn_are_the_set_that_the_package_chooses(
    corpus: dict[str, Path], domain: Path, tmp_path: Path, k: int
) -> None:
    ranked = rank_documents(corpus, domain, frozenset(), seed=7)
    assert set(ranked["sha256"][:k]) == by_hand(corpus, domain, 7, k, tmp_path / "hand")


def test_texts_like_the_domain_come_first_and_short_ones_never(
    corpus: dict[str, Path], domain: Path
) -> None:
    ranked = rank_documents(corpus, domain, frozenset(), seed=0)
    assert len(ranked) == 50
    assert ranked["score"].is_sorted()
    texts = pl.concat([pl.read_parquet(p) for p in corpus.values()])
    first = texts.filter(pl.col("sha256").is_in(ranked["sha256"][:20].to_list()))["text"]
    assert all(set(text.split()) <= set(WORDS[:12]) for text in first)


def test_another_seed_draws_otherwise(corpus: dict[str, Path], domain: Path) -> None:
    orders = [rank_documents(corpus, domain, frozenset(), seed)["doc_id"] for seed in (0, 0, 1)]
    assert orders[0].equals(orders[1])
    assert not orders[0].equals(orders[2])


def test_copies_are_drawn_once_and_what_is_left_out_never(
    corpus: dict[str, Path], domain: Path, tmp_path: Path
) -> None:
    texts = pl.read_parquet(corpus["a"])["text"].to_list()
    copies = {**corpus, "c": write(tmp_path / "c" / "documents.parquet", texts[:5])}
    gone = {text_sha256(texts[8])}
    ranked = rank_documents(copies, domain, gone, seed=0)
    assert ranked["sha256"].n_unique() == len(ranked) == 49
    assert gone.isdisjoint(ranked["sha256"])


def test_documents_are_written_in_the_order_of_the_ranks(
    corpus: dict[str, Path], domain: Path, tmp_path: Path
) -> None:
    ranked = rank_documents(corpus, domain, frozenset(), seed=0).head(33)
    write_in_order(ranked, corpus, tmp_path / "out.parquet")
    written = pl.read_parquet(tmp_path / "out.parquet")
    assert written.columns == DOCUMENTS.names
    assert written["doc_id"].to_list() == ranked["doc_id"].to_list()
    assert [text_sha256(t) for t in written["text"]] == written["sha256"].to_list()
