import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from colorfilter.data.tokens import Encoder, open_tokens, pack
from colorfilter.evaluation.examples import (
    examples,
    excerpts,
    extremes,
    sequence_tokens,
    sequences,
    token_texts,
)
from tests.colorfilter.conftest import LENGTH, as_documents

# Sequences -----------------------------------------------------------------------------------


def in_order(colors: dict[tuple[str, int], float]) -> list[tuple[str, int]]:
    return sorted(colors, key=lambda place: (colors[place], place))


@pytest.fixture
def scored(store: Any) -> tuple[Any, dict[tuple[str, int], float]]:
    """Two shards with ties, a copy, a padded sequence and a probe; the candidates' colors."""
    rng = random.Random(1)
    colors = {}
    for shard in ("b", "a"):
        mine = {p: rng.randint(-40, 40) / 8 for p in range(50)}
        store.add_sequences(shard, [LENGTH] * 49 + [LENGTH - 1])
        mine |= {0: -9.0, 49: -9.0}  # to be left out, as a copy and as padded
        store.add_colors(shard, mine)
        for p in range(50):
            sha256 = "same" if p == 0 else f"{shard}{p}"
            store.add_document(shard, f"{shard}{p:02d}", sha256, [(p, LENGTH)])
        kept = range(0 if shard == "a" else 1, 49)
        colors |= {(shard, p): mine[p] for p in kept}
    store.add_sequences("_probe_books", [LENGTH])
    store.add_colors("_probe_books", {0: -50.0})
    store.add_document("_probe_books", "p", "p", [(0, LENGTH)])
    store.publish()
    return store.connection, colors


def chosen_at(table: pl.DataFrame, place: str) -> list[tuple[str, int]]:
    return table.filter(pl.col("place") == place).select("shard", "position").rows()


def test_the_best_and_the_worst_candidates_are_chosen_in_canonical_order(
    scored: tuple[Any, dict[tuple[str, int], float]],
) -> None:
    connection, colors = scored
    table = sequences(connection, "books", {}, [])
    assert table["place"].unique(maintain_order=True).to_list() == ["best", "worst"]
    assert chosen_at(table, "best") == in_order(colors)[:5]
    worst = sorted(colors, key=lambda place: (-colors[place], place))[:5]
    assert chosen_at(table, "worst") == in_order({place: colors[place] for place in worst})
    assert table["color"].to_list() == [
        colors[row] for row in table.select("shard", "position").rows()
    ]


def test_sequences_nearest_to_a_cutoff_and_to_the_edge_of_a_share_are_chosen(
    scored: tuple[Any, dict[tuple[str, int], float]],
) -> None:
    connection, colors = scored
    ordered = in_order(colors)
    table = sequences(connection, "books", {"color_tau3": 1.3}, [1 / 4, 1 / 2], n=4)
    edges = {
        "cutoff of color_tau3": 1.3,
        "edge of the best 1/4": colors[ordered[-(-len(ordered) // 4) - 1]],
        "edge of the best 1/2": colors[ordered[-(-len(ordered) // 2) - 1]],
    }
    places = ["best", *sorted(edges, key=lambda name: edges[name]), "worst"]
    assert table["place"].unique(maintain_order=True).to_list() == places
    for name, edge in edges.items():
        near = sorted(colors, key=lambda p: (abs(colors[p] - edge), colors[p], p))[:4]
        assert chosen_at(table, name) == in_order({p: colors[p] for p in near})


def test_spans_say_what_a_sequence_is_made_of_in_its_order(store: Any) -> None:
    store.add_sequences("a", [LENGTH])
    store.add_colors("a", {0: 1.0})
    for doc_id, offset, doc_start, n, total in (("z", 0, 30, 6, 36), ("b", 6, 0, 10, 99)):
        store.connection.execute(
            "INSERT INTO documents VALUES (?, 'a', ?, 3, 'web', 1, ?, ?, '{}')",
            [doc_id, f"/data/{doc_id}.jsonl", total, doc_id],
        )
        store.connection.execute(
            "INSERT INTO spans VALUES ('a', 0, ?, ?, ?, ?, 5, 9)", [offset, doc_id, doc_start, n]
        )
    store.publish()
    first, second = sequences(store.connection, "books", {}, [], n=1)["spans"][0]
    assert first == {
        "doc_id": "z",
        "source_file": "/data/z.jsonl",
        "source_line": 3,
        "doc_start": 30,
        "n_tokens": 6,
        "char_start": 5,
        "char_end": 9,
        "closes": True,
    }
    assert (second["doc_id"], second["doc_start"], second["closes"]) == ("b", 0, False)


# Token texts ---------------------------------------------------------------------------------

TEXTS = [
    "time 1 year",
    "d\u00e9j\u00e0 vu \u65e5\u672c\u8a9e \U0001f600\U0001f600 \u202eabc",
    "tab\t\r\nline \x00 end\n\n",
    "<script>alert('&amp;')</script> " * 3,
    "\U0001f600" * 9,
]


@pytest.fixture
def unicode_shard(encoder: Encoder, tmp_path: Path) -> tuple[pl.DataFrame, Path, Path]:
    """Texts packed into sequences of 7 tokens, all of them chosen; tokens and documents."""
    documents = tmp_path / "documents.parquet"
    rows = as_documents(TEXTS)
    pl.DataFrame(rows).write_parquet(documents)
    pack(rows, encoder, 7, tmp_path / "tokens")
    spans = pl.read_parquet(tmp_path / "tokens" / "spans.parquet").sort("position", "offset")
    chosen = (
        spans.group_by("position", maintain_order=True)
        .agg(spans=pl.struct("doc_id", "doc_start", "n_tokens", "char_start", "char_end"))
        .with_columns(shard=pl.lit("a"))
    )
    return chosen, tmp_path / "tokens", documents


def test_the_texts_of_tokens_make_up_the_documents(
    unicode_shard: tuple[pl.DataFrame, Path, Path], encoder: Encoder
) -> None:
    chosen, packed, documents = unicode_shard
    texts = token_texts(chosen, {"a": documents}, encoder)
    assert "".join(piece for pieces in texts for piece in pieces) == "".join(TEXTS)
    tokens = open_tokens(packed)
    for pieces, row in zip(texts[:-1], tokens, strict=False):
        assert len(pieces) == len(row)
        for piece, token in zip(pieces, row, strict=True):
            decoded = encoder.decode([token])
            if token == encoder.end_of_text:
                assert piece == ""
            elif "\ufffd" not in decoded:
                assert piece == decoded
            else:  # a piece of a character, which stands with its first token
                assert len(piece) <= 1


def test_a_sequence_reads_as_its_spans(
    unicode_shard: tuple[pl.DataFrame, Path, Path], encoder: Encoder
) -> None:
    chosen, _, documents = unicode_shard
    by_id = {d["doc_id"]: d["text"] for d in as_documents(TEXTS)}
    texts = token_texts(chosen[::-1], {"a": documents}, encoder)
    for pieces, spans in zip(texts, chosen["spans"][::-1], strict=True):
        cut = [by_id[s["doc_id"]][s["char_start"] : s["char_end"]] for s in spans]
        assert "".join(pieces) == "".join(cut)


def test_tokens_are_read_in_the_order_of_what_was_chosen(
    unicode_shard: tuple[pl.DataFrame, Path, Path], packed: Path
) -> None:
    _, other, _ = unicode_shard
    chosen = pl.DataFrame({"shard": ["b", "a", "b"], "position": [3, 0, 1]})
    assert open_tokens(packed).shape[1] != open_tokens(other).shape[1]
    again = {"a": packed, "b": packed}
    rows = open_tokens(packed)
    assert np.array_equal(sequence_tokens(chosen, again), rows[[3, 0, 1]])


def test_examples_hold_what_belongs_together() -> None:
    chosen = pl.DataFrame(
        {
            "place": ["best", "worst"],
            "shard": ["a", "b"],
            "position": [4, 2],
            "color": [-1.0, 2.0],
            "spans": [[{"doc_id": "x"}], [{"doc_id": "y"}]],
        }
    )
    prior, conditional = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    first, second = examples(chosen, [["a", "b"], ["c", "d"]], prior, conditional)
    assert (first.place, first.shard, first.position, first.color) == ("best", "a", 4, -1.0)
    assert (second.spans, second.texts) == ([{"doc_id": "y"}], ["c", "d"])
    assert second.prior.tolist() == [2, 3]
    assert second.conditional.tolist() == [6, 7]


# Documents -----------------------------------------------------------------------------------


def test_extremes_are_the_documents_of_lowest_middle_and_highest_color(store: Any) -> None:
    rng = random.Random(0)
    n = 60
    colors = [{i: round(rng.uniform(-3, 3), 3) for i in range(2 * n)} for _ in range(2)]
    expected = {}
    for shard, mine in zip(("a", "b"), colors, strict=True):
        store.add_sequences(shard, [LENGTH] * (2 * n))
        store.add_colors(shard, mine)
        for i in range(n):
            spans = [(2 * i, 16), (2 * i + 1, rng.randint(1, 16))]
            store.add_document(shard, f"{shard}{i:02d}", f"{shard}{i}", spans)
            total = sum(k for _, k in spans)
            expected[f"{shard}{i:02d}"] = sum(mine[p] * k for p, k in spans) / total
        store.add_document(shard, f"{shard}-short", f"{shard}short", [(0, LENGTH - 1)])
    store.add_sequences("_probe_books", [LENGTH])
    store.add_colors("_probe_books", {0: -50.0})
    store.add_document("_probe_books", "p", "p", [(0, LENGTH)])
    store.publish()
    table = extremes(store.connection, "books", LENGTH, share=0.25, n=4)
    by_color = sorted(expected, key=lambda d: expected[d])
    places = {
        str(place): part["doc_id"].to_list()
        for (place,), part in table.group_by(["place"], maintain_order=True)
    }
    assert list(places) == sorted(places, key=["best", "cutoff", "median", "worst"].index)
    assert places["best"] == by_color[:4]
    assert places["worst"] == by_color[-4:]
    edge = expected[by_color[29]]
    near = sorted(expected, key=lambda d: abs(expected[d] - edge))[:4]
    assert sorted(places["cutoff"]) == sorted(near)
    for row in table.to_dicts():
        assert row["color"] == pytest.approx(expected[row["doc_id"]], abs=1e-5)


@pytest.fixture
def sampled(tmp_path: Path) -> tuple[pl.DataFrame, dict[str, Path]]:
    texts = {"a": ["first\n\n  line | bar " + "x" * 500, "unused"], "b": ["`code`"]}
    documents = {}
    for shard, mine in texts.items():
        documents[shard] = tmp_path / f"{shard}.parquet"
        ids = [f"{shard}{i}" for i in range(len(mine))]
        pl.DataFrame({"doc_id": ids, "text": mine}).write_parquet(documents[shard])
    table = pl.DataFrame(
        {
            "place": ["best", "worst", "worst"],
            "shard": ["b", "a", "b"],
            "doc_id": ["b0", "a0", "b0"],
            "source_file": ["/data/b.jsonl", "/data/a|x.jsonl", "/data/b.jsonl"],
            "source_line": [1, 1, 1],
            "n_tokens": [20, 200, 20],
            "color": [-2.0, 1.0, 3.0],
        }
    )
    return table, documents


def test_excerpts_are_the_beginnings_of_the_texts_on_one_line(
    sampled: tuple[pl.DataFrame, dict[str, Path]],
) -> None:
    table, documents = sampled
    found = excerpts(table, documents, chars=30)
    assert found["doc_id"].to_list() == ["b0", "a0", "b0"]
    assert found["excerpt"].to_list() == ["`code`", "first line | bar " + "x" * 13, "`code`"]


def test_without_documents_there_are_no_excerpts(
    sampled: tuple[pl.DataFrame, dict[str, Path]],
) -> None:
    table, documents = sampled
    found = excerpts(table.clear(), documents)
    assert len(found) == 0
    assert "excerpt" in found.columns
