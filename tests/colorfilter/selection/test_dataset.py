import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from colorfilter.config.recipe import Source
from colorfilter.data.documents import write_documents
from colorfilter.data.shards import list_files
from colorfilter.data.tokens import Encoder, open_tokens, pack, real_tokens
from colorfilter.selection import dataset
from colorfilter.selection.dataset import write_card, write_selected_text, write_tokens

LENGTH = 16
TEXTS = {
    "web-a": ["größe " * 30, "kurz", "time year people way day " * 9, "😀😀 " * 12],
    "web-b": ["man thing woman " * 20, "x", "child world school state family " * 6],
    "web-c": ["life " * 40],
}


class Corpus:
    def __init__(self, root: Path, encoder: Encoder) -> None:
        self.documents: dict[str, Path] = {}
        self.tokens: dict[str, Path] = {}
        self.texts: dict[str, str] = {}
        for shard, texts in TEXTS.items():
            folder = root / shard
            folder.mkdir()
            lines = [json.dumps({"text": t, "n": i}) for i, t in enumerate(texts)]
            (folder / "in.jsonl").write_text("\n".join(lines))
            source = Source(name="web", files=str(folder / "in.jsonl"))
            write_documents(list_files([source]), [source], folder)
            self.documents[shard] = folder / "documents.parquet"
            rows = pl.read_parquet(self.documents[shard])
            pack(rows.iter_rows(named=True), encoder, LENGTH, folder / "tokens")
            self.tokens[shard] = folder / "tokens"
            self.texts |= dict(zip(rows["doc_id"], rows["text"], strict=True))

    def selection(self, chosen: list[tuple[str, int]], scored: bool = True) -> pl.DataFrame:
        rng = random.Random(0)
        colors = [rng.uniform(-2, 1) if scored else None for _ in chosen]
        return pl.DataFrame(
            {
                "rank": range(1, len(chosen) + 1),
                "shard": [s for s, _ in chosen],
                "position": [i for _, i in chosen],
                "score": [0.0] * len(chosen),
                "color": pl.Series(colors, dtype=pl.Float64),
            }
        )

    def sequences(self) -> list[tuple[str, int]]:
        return [
            (shard, i)
            for shard, folder in self.tokens.items()
            for i in range(len(open_tokens(folder)))
        ]

    def write_text(
        self, chosen: pl.DataFrame, out: Path, whole_from: float | None = None
    ) -> pl.DataFrame:
        counts = write_selected_text(chosen, self.tokens, self.documents, whole_from, out)
        table = pl.concat([pl.read_parquet(p) for p in sorted(out.glob("*.parquet"))])
        assert counts == {"texts": len(table), "chars": table["text"].str.len_chars().sum()}
        return table


@pytest.fixture(scope="module")
def corpus(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus"), encoder)


@pytest.mark.parametrize("block", [1, 7, 30, 1_000])
def test_the_written_tokens_are_the_selected_sequences_shuffled(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(dataset, "BLOCK_BYTES", block * LENGTH * 2)
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "0").write_bytes(b"of an attempt that was killed")
    chosen = corpus.selection(random.Random(1).sample(corpus.sequences(), 30))
    counts = write_tokens(chosen, corpus.tokens, seed=7, out=tmp_path)
    rows = np.load(tmp_path / "tokens.npy")
    table = pl.read_parquet(tmp_path / "sequences.parquet")
    assert rows.dtype == np.uint16
    assert rows.shape == (30, LENGTH)
    assert table["row"].to_list() == list(range(30))
    assert sorted(table["rank"]) == list(range(1, 31))
    assert table["rank"].to_list() != sorted(table["rank"])
    for row, facts in zip(rows, table.to_dicts(), strict=True):
        source = corpus.tokens[facts["shard"]]
        assert (row == open_tokens(source)[facts["position"]]).all()
        assert facts["n_tokens"] == real_tokens(source)[facts["position"]]
        given = chosen.filter(pl.col("rank") == facts["rank"]).row(0, named=True)
        assert {k: facts[k] for k in given} == given
    assert counts == {"sequences": 30, "tokens": int(real_tokens(tmp_path).sum())}
    assert {p.name for p in tmp_path.iterdir()} == {"tokens.npy", "sequences.parquet"}


def test_the_seed_fixes_the_order_of_the_written_tokens(corpus: Corpus, tmp_path: Path) -> None:
    chosen = corpus.selection(corpus.sequences())
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tokens(chosen, corpus.tokens, seed, tmp_path / name)
        files.append((tmp_path / name / "tokens.npy").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def expected_runs(corpus: Corpus, chosen: pl.DataFrame) -> dict[tuple[str, int], dict[str, Any]]:
    """Runs by document and beginning, found span by span in plain Python."""
    colors = {(s, i): c for s, i, c in chosen.select("shard", "position", "color").rows()}
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for shard, folder in corpus.tokens.items():
        spans = pl.read_parquet(folder / "spans.parquet").to_dicts()
        for doc_id in {s["doc_id"] for s in spans}:
            mine = sorted((s for s in spans if s["doc_id"] == doc_id), key=lambda s: s["doc_start"])
            kept = [s for s in mine if (shard, s["position"]) in colors]
            share = sum(s["n_tokens"] for s in kept) / sum(s["n_tokens"] for s in mine)
            run: list[dict] = []
            for span in [*mine, None]:
                if span and (shard, span["position"]) in colors:
                    run.append(span)
                    continue
                if run and run[-1]["char_end"] > run[0]["char_start"]:
                    n = sum(s["n_tokens"] for s in run)
                    weighted = [s["n_tokens"] * colors[shard, s["position"]] for s in run]
                    runs[doc_id, run[0]["char_start"]] = {
                        "char_end": run[-1]["char_end"],
                        "n_tokens": n,
                        "color": sum(weighted) / n,
                        "fraction": share,
                        "shard": shard,
                    }
                run = []
    return runs


@pytest.mark.parametrize("seed", range(5))
def test_the_written_text_is_the_original_characters_of_unbroken_runs(
    corpus: Corpus, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    chosen = corpus.selection([s for s in corpus.sequences() if rng.random() < 0.6])
    table = corpus.write_text(chosen, tmp_path)
    expected = expected_runs(corpus, chosen)
    assert {(r["doc_id"], r["char_start"]) for r in table.to_dicts()} == expected.keys()
    for row in table.to_dicts():
        run = expected[row["doc_id"], row["char_start"]]
        assert row["text"] == corpus.texts[row["doc_id"]][row["char_start"] : run["char_end"]]
        assert row["color"] == pytest.approx(run["color"], abs=1e-12)
        assert row["fraction"] == pytest.approx(run["fraction"], abs=1e-12)
        assert (row["n_tokens"], row["shard"]) == (run["n_tokens"], run["shard"])
        assert row["source"] == "web"
        assert "n" in json.loads(row["extra"])


def test_a_corpus_selected_whole_is_its_documents(corpus: Corpus, tmp_path: Path) -> None:
    table = corpus.write_text(corpus.selection(corpus.sequences()), tmp_path)
    assert dict(zip(table["doc_id"], table["text"], strict=True)) == corpus.texts
    assert table["fraction"].to_list() == [1.0] * len(corpus.texts)


def test_texts_stand_in_a_file_per_shard_in_the_order_of_the_documents(
    corpus: Corpus, tmp_path: Path
) -> None:
    corpus.write_text(corpus.selection(corpus.sequences()[::2]), tmp_path)
    assert sorted(p.stem for p in tmp_path.iterdir()) == list(TEXTS)
    for shard in TEXTS:
        order = pl.read_parquet(corpus.documents[shard])["doc_id"].to_list()
        found = pl.read_parquet(tmp_path / f"{shard}.parquet")
        keys = [(order.index(d), s) for d, s in found.select("doc_id", "char_start").rows()]
        assert keys == sorted(keys)


@pytest.mark.parametrize("least", [0.3, 0.7, 1.0])
def test_whole_documents_are_those_of_which_enough_was_selected(
    corpus: Corpus, tmp_path: Path, least: float
) -> None:
    rng = random.Random(2)
    chosen = corpus.selection([s for s in corpus.sequences() if rng.random() < 0.6])
    table = corpus.write_text(chosen, tmp_path, least)
    runs = expected_runs(corpus, chosen)
    share = {doc_id: run["fraction"] for (doc_id, _), run in runs.items()}
    assert set(table["doc_id"]) == {d for d, s in share.items() if s >= least}
    assert table["doc_id"].is_unique().all()
    for row in table.to_dicts():
        assert row["text"] == corpus.texts[row["doc_id"]]
        assert (row["char_start"], row["char_end"]) == (0, len(row["text"]))
        assert row["fraction"] == pytest.approx(share[row["doc_id"]])


def test_whole_documents_that_are_left_out_are_not_written(corpus: Corpus, tmp_path: Path) -> None:
    chosen = corpus.selection(corpus.sequences())
    every = corpus.write_text(chosen, tmp_path / "every", 0.5)
    gone = every["doc_id"][::2]
    write_selected_text(chosen, corpus.tokens, corpus.documents, 0.5, tmp_path / "some", gone)
    some = pl.concat([pl.read_parquet(p) for p in sorted((tmp_path / "some").glob("*.parquet"))])
    assert some.equals(every.filter(~pl.col("doc_id").is_in(gone.to_list())))


@pytest.mark.parametrize("whole_from", [None, 0.1])
def test_text_that_was_not_scored_has_no_color(
    corpus: Corpus, tmp_path: Path, whole_from: float | None
) -> None:
    chosen = corpus.selection(corpus.sequences(), scored=False)
    table = corpus.write_text(chosen, tmp_path, whole_from)
    assert table["color"].null_count() == len(table)


def test_a_filtered_dataset_loads_with_datasets_and_polars(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    chosen = corpus.selection(corpus.sequences()[1::2])
    folder = tmp_path / "dataset"
    table = corpus.write_text(chosen, folder / "documents")
    write_tokens(chosen, corpus.tokens, 0, folder / "tokens")
    write_card(folder, "books: color", "One sentence.", len(table), len(chosen), LENGTH)
    (folder / "manifest.json").write_text("{}")
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == dataset.FILTERED.names
    assert loaded["text"][:] == table["text"].to_list()
    assert loaded["color"][:] == table["color"].to_list()
    assert pl.read_parquet(folder / "documents" / "*.parquet").equals(table)
    card = (folder / "README.md").read_text()
    assert "One sentence." in card
    assert f"{len(chosen)} sequences of {LENGTH} tokens" in card


def test_a_dataset_with_a_shard_of_no_text_loads(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    chosen = corpus.selection(
        [("web-a", 0), ("web-c", 0), *[s for s in corpus.sequences() if s[0] == "web-b"]]
    )
    table = corpus.write_text(chosen, tmp_path / "documents", 1.0)
    assert set(table["shard"]) == {"web-b"}
    write_card(tmp_path, "title", "One sentence.", len(table), len(chosen), LENGTH)
    loaded = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(loaded["text"][:]) == sorted(table["text"])


@pytest.mark.parametrize(
    ("rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (123_456, "100K<n<1M"), (10**12, "n>1T")],
)
def test_sizes_have_the_words_of_the_hub(rows: int, category: str) -> None:
    assert dataset.size_category(rows) == category
