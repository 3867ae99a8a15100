import itertools
import json
import random
from pathlib import Path

import polars as pl
import pytest

from colorfilter.config.recipe import Source
from colorfilter.data.documents import write_documents
from colorfilter.data.sampling import draw_sample, shared_documents, split_domain
from colorfilter.data.shards import list_files
from colorfilter.errors import InputError


def documents_table(folder: Path, texts: list[str], name: str = "a") -> Path:
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    path = folder / "raw" / f"{name}.jsonl"
    path.write_bytes(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts))
    source = Source(name="web", files=str(path))
    write_documents(list_files([source]), [source], folder)
    return folder


def sample_texts(folder: Path) -> set[str]:
    return set(pl.read_parquet(folder / "documents.parquet")["text"])


CORPUS = [f"{i} " + "x" * (i % 17) for i in range(200)]


def drawn(shards: dict[str, Path], seed: int, chars: int, folder: Path) -> set[str]:
    folder.mkdir()
    counts = draw_sample(shards, seed, chars, folder)
    table = pl.read_parquet(folder / "documents.parquet")
    assert counts == {"documents": len(table), "chars": table["text"].str.len_chars().sum()}
    assert set(table["shard"]) <= set(shards)
    assert table["sha256"].is_unique().all()
    return sample_texts(folder)


def test_a_sample_does_not_depend_on_how_documents_lie_in_shards(tmp_path: Path) -> None:
    whole = {"one": documents_table(tmp_path / "one", CORPUS)}
    mixed = list(CORPUS)
    random.Random(3).shuffle(mixed)
    parts = {
        f"part{i}": documents_table(tmp_path / f"part{i}", [*mixed[i::3], *mixed[: 40 * i]])
        for i in range(3)
    }
    first = drawn(whole, 0, 500, tmp_path / "sample1")
    assert drawn(parts, 0, 500, tmp_path / "sample2") == first
    assert drawn(whole, 1, 500, tmp_path / "sample3") != first


def test_a_sample_holds_what_was_asked_for_and_at_most_one_document_more(tmp_path: Path) -> None:
    shards = {"one": documents_table(tmp_path / "one", CORPUS)}
    texts = drawn(shards, 0, 500, tmp_path / "sample")
    assert 500 <= sum(map(len, texts)) < 500 + max(map(len, CORPUS))


def test_a_sample_names_the_shard_of_each_document(tmp_path: Path) -> None:
    shards = {
        "x": documents_table(tmp_path / "x", CORPUS[:100]),
        "y": documents_table(tmp_path / "y", CORPUS[100:]),
    }
    drawn(shards, 0, 500, tmp_path / "sample")
    table = pl.read_parquet(tmp_path / "sample" / "documents.parquet")
    shard_of = {t: "x" if t in CORPUS[:100] else "y" for t in CORPUS}
    assert set(table["shard"]) == {"x", "y"}
    assert table["shard"].to_list() == [shard_of[t] for t in table["text"]]


def test_short_and_long_places_in_the_corpus_are_drawn_alike(tmp_path: Path) -> None:
    shards = {"one": documents_table(tmp_path / "one", [f"{i:03d}" for i in range(400)])}
    places = [int(t) for t in drawn(shards, 0, 600, tmp_path / "sample")]
    assert len(places) == 200
    assert 160 < sum(places) / len(places) < 240


@pytest.mark.parametrize("excess", [0, 1])
def test_a_corpus_too_small_for_the_sample_is_refused(tmp_path: Path, excess: int) -> None:
    shards = {"one": documents_table(tmp_path / "one", CORPUS)}
    chars = sum(map(len, CORPUS)) + excess
    with pytest.raises(InputError, match=r"prior\.sample_chars: "):
        draw_sample(shards, 0, chars, tmp_path)


def split_texts(folder: Path) -> dict[str, list[str]]:
    return {
        split: pl.read_parquet(folder / split / "documents.parquet")["text"].to_list()
        for split in ("held_out", "probe", "down")
    }


@pytest.mark.parametrize(("held_out", "probe"), [(0.15, 0.15), (0.3, 0.1)])
def test_a_split_is_disjoint_complete_and_in_proportion(
    tmp_path: Path, held_out: float, probe: float
) -> None:
    table = documents_table(tmp_path / "all", CORPUS) / "documents.parquet"
    counts = split_domain(table, 0, held_out, probe, tmp_path)
    splits = split_texts(tmp_path)
    assert sorted(itertools.chain(*splits.values())) == sorted(CORPUS)
    total = sum(map(len, CORPUS))
    share = {split: sum(map(len, texts)) / total for split, texts in splits.items()}
    assert share["held_out"] == pytest.approx(held_out, abs=0.03)
    assert share["probe"] == pytest.approx(probe, abs=0.03)
    for split, texts in splits.items():
        assert counts[f"{split}_documents"] == len(texts)
        assert counts[f"{split}_chars"] == sum(map(len, texts))


def test_a_split_is_fixed_by_the_seed(tmp_path: Path) -> None:
    table = documents_table(tmp_path / "all", CORPUS) / "documents.parquet"
    splits = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        split_domain(table, seed, 0.15, 0.15, tmp_path / name)
        splits.append(split_texts(tmp_path / name))
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_documents_for_a_split_are_refused(tmp_path: Path, n: int) -> None:
    table = documents_table(tmp_path / "all", CORPUS[:n]) / "documents.parquet"
    with pytest.raises(InputError, match=f"^{n} documents are too few"):
        split_domain(table, 0, 0.15, 0.15, tmp_path)


def test_shared_documents_are_found_with_their_place(tmp_path: Path) -> None:
    corpus = {
        "s1": documents_table(tmp_path / "s1", ["alpha", "beta"]) / "documents.parquet",
        "s2": documents_table(tmp_path / "s2", ["gamma", "delta", "eps"]) / "documents.parquet",
    }
    known = {
        "held_out": documents_table(tmp_path / "h", ["delta", "omega"]) / "documents.parquet",
        "probe": documents_table(tmp_path / "p", ["alpha"]) / "documents.parquet",
    }
    found = shared_documents(corpus, known)
    places = {(r["text"], r["source_file"], r["source_line"]) for r in found}
    assert places == {
        ("probe", str(tmp_path / "s1/raw/a.jsonl"), 1),
        ("held_out", str(tmp_path / "s2/raw/a.jsonl"), 2),
    }
    del corpus["s1"], known["held_out"]
    assert shared_documents(corpus, known) == []


def test_where_no_text_was_read_none_is_shared(tmp_path: Path) -> None:
    table = documents_table(tmp_path / "one", CORPUS) / "documents.parquet"
    assert shared_documents({"one": table}, {}) == []
