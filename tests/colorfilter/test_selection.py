import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from colorfilter import selection
from colorfilter.documents import write_documents
from colorfilter.errors import InputError
from colorfilter.recipe import Source
from colorfilter.selection import (
    count_candidates,
    n_to_keep,
    select,
    select_by_batch,
    write_card,
    write_selected_text,
    write_tokens,
)
from colorfilter.shards import list_files
from colorfilter.tables import fetch
from colorfilter.tokens import Encoder, open_tokens, pack, real_tokens

LENGTH = 16
SHARDS = ["web-b", "web-a", "books-z"]


def fill(store: Any, n: int = 40, seed: int = 0) -> dict[tuple[str, int], float]:
    """Shards of n full sequences and a short one, colors with many ties; returns the colors."""
    rng = random.Random(seed)
    colors = {}
    for shard in SHARDS:
        store.add_sequences(shard, [LENGTH] * n + [5])
        mine = {i: rng.choice([-1.5, -1.0, -0.5, 0.0, 0.25]) for i in range(n)}
        store.add_colors(shard, {**mine, n: -9.0})
        colors |= {(shard, i): c for i, c in mine.items()}
    store.add_sequences("_probe_books", [LENGTH] * 5)
    store.add_colors("_probe_books", dict.fromkeys(range(5), -8.0))
    store.publish()
    return colors


def places(table: pl.DataFrame) -> list[tuple[str, int]]:
    return table.select("shard", "position").rows()


# What is selected ----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 17, 60, 120, 1_000])
def test_the_lowest_colors_are_kept_in_order_of_color_shard_and_position(
    store: Any, keep: int
) -> None:
    colors = fill(store)
    expected = sorted((c, shard, i) for (shard, i), c in colors.items())[:keep]
    table = select(store.connection, "color", "books", keep, seed=0)
    assert table.select("score", "shard", "position").rows() == expected
    assert table["rank"].to_list() == list(range(1, len(expected) + 1))
    assert table["color"].equals(table["score"], check_names=False)
    assert table.schema["score"] == pl.Float64


def candidates(store: Any) -> pl.DataFrame:
    """The candidates with their scores by a plain reading of the rules, from the raw tables."""
    tables = {
        name: pl.DataFrame(store.connection.sql(f"FROM {name}").to_arrow_table())
        for name in ("documents", "spans", "sequences", "losses")
    }
    corpus = {
        name: table.filter(~pl.col("shard").str.starts_with("_")) for name, table in tables.items()
    }
    first = corpus["documents"].group_by("sha256").agg(first=pl.col("shard").min())
    copies = corpus["documents"].join(first, on="sha256").filter(pl.col("shard") > pl.col("first"))
    copied = corpus["spans"].join(copies, on=["shard", "doc_id"], how="semi")
    by = {
        model: part.select("shard", "position", pl.col("loss").cast(pl.Float64))
        for (model,), part in corpus["losses"].group_by(["model"])
    }
    return (
        corpus["sequences"]
        .filter(pl.col("n_tokens") == LENGTH)
        .join(copied, on=["shard", "position"], how="anti")
        .join(by["prior"], on=["shard", "position"])
        .join(by["conditional"], on=["shard", "position"], suffix="_conditional")
        .select("shard", "position", score=pl.col("loss_conditional") - pl.col("loss"))
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [1e-5, 1e-3, 1.0, 1e4])
def test_the_best_are_those_of_a_full_sort_wherever_copies_and_ties_lie(
    store: Any, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n = 300
    for shard in ("c", "a", "b", "_probe_books"):
        store.add_sequences(shard, [LENGTH] * n + [3])
        values = (rng.normal(size=n + 1) * spread).astype(np.float32)
        values[rng.random(n + 1) < 0.4] = np.float32(-spread / 3)
        # The copies lie lowest, among the rest, or highest: nobody may count on where.
        if shard != "a":
            values[:100] += np.float32((-spread, 0.0, spread)[seed % 3] * 2)
        store.add_colors(shard, dict(enumerate(values.tolist())), prior=0.0)
        for i in range(25):
            spans = [(4 * i + j, LENGTH) for j in range(rng.integers(1, 5))]
            store.add_document(shard, f"{shard}{i}", f"text {rng.integers(60)}", spans)
    store.publish()
    expected = candidates(store).sort("score", "shard", "position").with_row_index("rank", 1)
    assert 600 < len(expected) < 880
    assert count_candidates(store.connection) == len(expected)
    for keep in (1, 7, len(expected) // 64, 300, len(expected) - 1, len(expected), 10_000):
        found = select(store.connection, "color", "books", keep, seed=0)
        wanted = expected.head(keep).cast({"rank": pl.Int64}).select(found.columns[:4])
        assert found.drop("color").equals(wanted)


def test_equal_scores_at_the_last_place_go_by_shard_and_position(store: Any) -> None:
    for shard in ("b", "a"):
        store.add_sequences(shard, [LENGTH] * 50)
        store.add_colors(shard, {i: 0.5 if i % 5 else -0.5 for i in range(50)})
    store.publish()
    low = [(s, i) for s in ("a", "b") for i in range(0, 50, 5)]
    high = [(s, i) for s in ("a", "b") for i in range(50) if i % 5]
    for keep in (5, 10, 20, 21, 40, 61, 99):
        found = select(store.connection, "color", "books", keep, seed=0)
        assert places(found) == (low + high)[:keep]


def test_a_lot_is_the_md5_of_seed_shard_and_position(store: Any) -> None:
    fill(store)
    table = select(store.connection, "random", "books", 1_000, seed=11)
    for shard, position, score in table.select("shard", "position", "score").rows():
        digest = hashlib.md5(f"11|{shard}|{position}".encode()).digest()
        # The later eight bytes, the least significant first.
        assert score == int.from_bytes(digest[8:], "little") / 2**64
    few = select(store.connection, "random", "books", 30, seed=11)
    assert few.equals(table.head(30))
    assert few["color"].null_count() == 0


@pytest.mark.parametrize(("tau", "batch"), [(4, 5), (4, 1), (2.5, 7), (8, 100), (1, 3)])
def test_by_batch_the_lowest_of_each_random_pool_are_kept(
    store: Any, tau: float, batch: int
) -> None:
    colors = fill(store)
    lots = select(store.connection, "random", "books", len(colors), seed=3)
    pool = int(tau * batch)
    expected = []
    for start in range(0, len(lots), pool):
        places_there = places(lots[start : start + pool])
        best = sorted((colors[p], *p) for p in places_there)
        expected += best[: int(len(best) / tau)]
    table = select_by_batch(store.connection, "color", "books", tau, batch, seed=3)
    assert table.select("score", "shard", "position").rows() == sorted(expected)
    assert table["rank"].to_list() == list(range(1, len(expected) + 1))
    other = select_by_batch(store.connection, "color", "books", tau, batch, seed=4)
    assert other.equals(table) == (tau == 1 or batch == 100)


def test_the_order_does_not_depend_on_the_order_of_the_rows(store: Any) -> None:
    fill(store)
    before = select(store.connection, "color", "books", 50, seed=0)
    for name in ("sequences", "losses", "paired_losses", "excluded"):
        store.connection.execute(f"CREATE TABLE t AS FROM {name} ORDER BY hash(position, shard)")
        store.connection.execute(f"DELETE FROM {name}")
        store.connection.execute(f"INSERT INTO {name} FROM t")
        store.connection.execute("DROP TABLE t")
        if name == "losses":
            store.publish()
    assert select(store.connection, "color", "books", 50, seed=0).equals(before)


def test_the_difference_is_taken_in_float64(store: Any) -> None:
    store.add_sequences("s", [LENGTH] * 2)
    prior = {0: 4.0, 1: 1.0}
    conditional = {0: float(np.float32(5.0000005)), 1: float(np.float32(2.0000002))}
    store.add_losses("prior", "s", prior)
    store.add_losses("conditional", "s", conditional)
    store.publish()
    table = select(store.connection, "color", "books", 2, seed=0)
    expected = {i: float(np.float32(conditional[i])) - prior[i] for i in (0, 1)}
    assert dict(zip(table["position"], table["score"], strict=True)) == expected


def test_another_domain_has_its_own_colors(store: Any) -> None:
    store.add_sequences("s", [LENGTH] * 2)
    store.add_losses("prior", "s", {0: 4.0, 1: 4.0})
    store.add_losses("conditional", "s", {0: 3.0, 1: 5.0})
    store.add_losses("other", "s", {0: 5.0, 1: 3.0})
    store.publish()
    best = {
        domain: select(store.connection, "color", domain, 1, seed=0)["position"][0]
        for domain in ("books", "code")
    }
    assert best == {"books": 0, "code": 1}


def test_conditional_only_goes_by_the_conditional_loss_and_carries_the_color(store: Any) -> None:
    store.add_sequences("a", [LENGTH] * 3)
    store.add_losses("prior", "a", {0: 9.0, 1: 2.0, 2: 5.0})
    store.add_losses("conditional", "a", {0: 4.0, 1: 3.0, 2: 5.0})
    store.publish()
    table = select(store.connection, "conditional_only", "books", 2, seed=0)
    assert table["position"].to_list() == [1, 0]
    assert table["score"].to_list() == [3.0, 4.0]
    assert table["color"].to_list() == [1.0, -5.0]


@pytest.mark.parametrize("method", ["color", "conditional_only", "random", "full"])
def test_reserved_shards_and_short_sequences_are_never_selected(store: Any, method: str) -> None:
    fill(store)
    table = select(store.connection, method, "books", 10_000, seed=0)
    assert sorted(places(table)) == sorted((s, i) for s in SHARDS for i in range(40))
    assert count_candidates(store.connection) == 120


@pytest.mark.parametrize("method", ["color", "conditional_only", "random", "full"])
def test_of_copies_in_several_shards_the_first_shards_is_kept(store: Any, method: str) -> None:
    for shard in ("a", "b", "c", "_probe_books"):
        store.add_sequences(shard, [LENGTH] * 4)
        store.add_colors(shard, {i: float(i) for i in range(4)})
    store.add_document("c", "c1", "same", [(0, 16), (1, 4)])
    store.add_document("c", "c2", "own", [(1, 12), (2, 16), (3, 16)])
    store.add_document("b", "b1", "own of b", [(0, 16), (1, 8)])
    store.add_document("b", "b2", "same", [(1, 8), (2, 12)])
    store.add_document("b", "b3", "more", [(2, 4), (3, 16)])
    store.add_document("a", "a1", "more", [(0, 16), (1, 16), (2, 16), (3, 16)])
    store.add_document("_probe_books", "p1", "own of b", [(0, 16)])
    store.publish()
    expected = {("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0), ("b", 1), ("c", 2), ("c", 3)}
    table = select(store.connection, method, "books", 100, seed=0)
    assert set(places(table)) == expected - {("b", 2)}
    assert count_candidates(store.connection) == len(expected)


def test_what_is_excluded_has_one_reason(store: Any) -> None:
    store.add_sequences("a", [LENGTH] * 3 + [9])
    store.add_sequences("b", [LENGTH] * 3 + [9])
    store.add_sequences("_probe_books", [LENGTH, 9])
    store.add_document("a", "a1", "same", [(0, 16), (1, 16)])
    store.add_document("a", "a2", "twice in a shard", [(2, 8)])
    store.add_document("a", "a3", "twice in a shard", [(2, 8), (3, 9)])
    store.add_document("b", "b1", "other", [(0, 16), (1, 3)])
    store.add_document("b", "b2", "same", [(1, 4), (2, 4)])
    store.add_document("b", "b3", "same", [(2, 12), (3, 9)])
    store.add_document("_probe_books", "p1", "same", [(0, 16)])
    for _ in range(2):
        store.publish()
        assert fetch(store.connection, "FROM excluded ORDER BY ALL") == [
            ("a", 3, "padded"),
            ("b", 1, "copy"),
            ("b", 2, "copy"),
            ("b", 3, "padded"),
        ]


def test_random_is_fixed_by_the_seed(store: Any) -> None:
    fill(store)
    one, same, other = (select(store.connection, "random", "books", 60, seed=s) for s in (1, 1, 2))
    assert one.equals(same)
    assert set(places(one)) != set(places(other))


def test_random_is_even_and_does_not_look_at_color(store: Any) -> None:
    n = 3_000
    store.add_sequences("a", [LENGTH] * n)
    store.add_sequences("b", [LENGTH] * n)
    store.add_colors("a", {i: i / n - 1 for i in range(n)})
    store.publish()
    table = select(store.connection, "random", "books", n, seed=3)
    assert table["score"].is_between(0, 1, closed="left").all()
    assert table["score"].is_sorted()
    assert abs((table["shard"] == "a").sum() - n / 2) < 150
    assert abs(table["position"].mean() - n / 2) < 70
    scores = select(store.connection, "random", "books", 2 * n, seed=3)["score"]
    counts = np.histogram(scores, bins=10, range=(0, 1))[0]
    assert np.abs(counts - 2 * n / 10).max() < 110
    scored = table.filter(pl.col("color").is_not_null())
    assert set(scored["shard"]) == {"a"}
    assert abs(scored["color"].mean() + 0.5) < 0.05


def test_random_keeps_its_numbers_when_a_shard_arrives(store: Any) -> None:
    fill(store)
    before = select(store.connection, "random", "books", 1_000, seed=0)
    store.add_sequences("new", [LENGTH] * 20)
    store.publish()
    after = select(store.connection, "random", "books", 1_000, seed=0)
    kept = after.filter(pl.col("shard") != "new").select("shard", "position", "score")
    assert kept.equals(before.select("shard", "position", "score"))


@pytest.mark.parametrize(
    ("candidates", "tau", "needed", "keep"),
    [(100, 8, 12, 12), (100, 1, 100, 100), (7, 2.5, 0, 2), (1_000_000_007, 64, 5, 15_625_000)],
)
def test_the_best_1_by_tau_are_kept_rounded_down(
    candidates: int, tau: float, needed: int, keep: int
) -> None:
    assert n_to_keep(candidates, tau, needed) == keep


def test_too_few_candidates_for_the_training_are_refused() -> None:
    with pytest.raises(InputError, match=r"target\.training_tokens: needs 13 .* is 12;") as raised:
        n_to_keep(100, 8, 13)
    assert "\n" not in str(raised.value)


# The selected tokens and text ----------------------------------------------------------------

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


def test_the_written_tokens_are_the_selected_sequences_shuffled(
    corpus: Corpus, tmp_path: Path
) -> None:
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
    write_card(folder, "books: color", "One sentence.", len(chosen), LENGTH)
    (folder / "manifest.json").write_text("{}")
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == selection.FILTERED.names
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
    write_card(tmp_path, "title", "One sentence.", len(chosen), LENGTH)
    loaded = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(loaded["text"][:]) == sorted(table["text"])
