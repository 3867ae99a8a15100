import math
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from colorfilter.evaluation import Summary, TokensToMatch
from colorfilter.report import (
    EVALUATIONS,
    arm_lines,
    comparison_rows,
    draw_colors,
    draw_curves,
    excerpts,
    extremes,
    interval,
    markdown_table,
    match_rows,
    write_report,
)

PNG = b"\x89PNG\r\n\x1a\n"


def evaluations(*rows: tuple[str, int, int, str, float]) -> pl.DataFrame:
    return pl.DataFrame([("books", *row) for row in rows], schema=EVALUATIONS, orient="row")


def losses_and_bits(arm: str, seed: int, tokens: int, loss: float) -> list[tuple[Any, ...]]:
    return [
        (arm, seed, tokens, "held_out_loss", loss),
        (arm, seed, tokens, "bits_per_byte", loss / 4),
    ]


COMPARED = evaluations(
    *losses_and_bits("random", 2, 200, 5.2),
    *losses_and_bits("random", 1, 100, 6.0),
    *losses_and_bits("random", 1, 200, 5.0),
    *losses_and_bits("random", 2, 100, 6.2),
    *losses_and_bits("color_tau8", 2, 100, 5.2),
    *losses_and_bits("color_tau8", 1, 100, 5.5),
    *losses_and_bits("worse_tau8", 1, 100, 6.1),
    *losses_and_bits("worse_tau8", 2, 100, 6.9),
    *losses_and_bits("best_tau8", 1, 100, 4.0),
    *losses_and_bits("best_tau8", 2, 100, 4.0),
)


# Numbers -------------------------------------------------------------------------------------


def test_there_is_a_line_per_arm_and_number_of_tokens_with_losses_by_seed() -> None:
    lines = {(line.arm, line.tokens): line for line in arm_lines(COMPARED)}
    assert {key: line.losses for key, line in lines.items()} == {
        ("random", 100): [6.0, 6.2],
        ("random", 200): [5.0, 5.2],
        ("color_tau8", 100): [5.5, 5.2],
        ("worse_tau8", 100): [6.1, 6.9],
        ("best_tau8", 100): [4.0, 4.0],
    }
    color = lines["color_tau8", 100]
    assert color.loss.mean == pytest.approx(5.35)
    assert color.loss.half_width == pytest.approx(12.706 * 0.15, rel=1e-3)
    assert color.bits_per_byte.mean == pytest.approx(5.35 / 4)


def test_tokens_to_match_are_taken_seed_by_seed_and_not_for_random() -> None:
    matches = {(line.arm, line.tokens): line.matches for line in arm_lines(COMPARED)}
    first, second = matches["color_tau8", 100]
    assert (first.ratio, first.bound) == (pytest.approx(math.sqrt(2)), "=")
    assert (second.ratio, second.bound) == (pytest.approx(2), "=")
    assert matches["worse_tau8", 100] == [TokensToMatch(1.0, "<")] * 2
    assert matches["best_tau8", 100] == [TokensToMatch(2.0, ">")] * 2
    assert matches["random", 100] == matches["random", 200] == []


def test_without_a_random_arm_nothing_is_matched() -> None:
    rows = COMPARED.filter(pl.col("arm") != "random")
    assert all(line.matches == [] for line in arm_lines(rows))
    assert match_rows(rows) == []


def test_matches_are_evaluations_whose_metric_says_whether_they_are_bounds() -> None:
    rows = match_rows(COMPARED)
    assert {(r["arm"], r["seed"], r["metric"]) for r in rows} == {
        ("color_tau8", 1, "tokens_to_match"),
        ("color_tau8", 2, "tokens_to_match"),
        ("worse_tau8", 1, "tokens_to_match_less_than"),
        ("worse_tau8", 2, "tokens_to_match_less_than"),
        ("best_tau8", 1, "tokens_to_match_more_than"),
        ("best_tau8", 2, "tokens_to_match_more_than"),
    }
    assert {(r["domain"], r["tokens"]) for r in rows} == {("books", 100)}
    color = {r["seed"]: r["value"] for r in rows if r["arm"] == "color_tau8"}
    assert color == {1: pytest.approx(math.sqrt(2)), 2: pytest.approx(2)}
    assert pl.DataFrame(rows, schema=EVALUATIONS, orient="row").height == 6


@pytest.mark.parametrize("lacking", ["random", "color_tau8"])
def test_a_match_keeps_its_seed_where_an_arm_lacks_another(lacking: str) -> None:
    rows = COMPARED.filter(
        pl.col("arm").is_in(["random", "color_tau8"])
        & ~((pl.col("arm") == lacking) & (pl.col("seed") == 1))
    )
    (match,) = match_rows(rows)
    assert (match["arm"], match["seed"]) == ("color_tau8", 2)
    assert match["value"] == pytest.approx(2)


def test_the_comparison_is_in_words() -> None:
    rows = {(r[0], r[1]): r for r in comparison_rows(arm_lines(COMPARED))}
    assert rows["color_tau8", "100"][2:] == [
        "5.500 5.200",
        "5.350 ± 1.906",
        "1.337 ± 0.476",
        "-0.750 ± 3.176, not told apart",
        "1.41 2.00",
    ]
    assert rows["best_tau8", "100"][-2] == "-2.100 ± 1.271, better"
    assert rows["random", "100"][-2] == "-"
    assert rows["random", "100"][-1] == "-"
    assert rows["best_tau8", "100"][-1] == ">2.00 >2.00"


def test_an_interval_is_shown_only_where_there_is_one() -> None:
    assert interval(Summary(1.23456, 0.5, 3)) == "1.235 ± 0.500"
    assert interval(Summary(1.23456, math.nan, 1)) == "1.235"


# Documents -----------------------------------------------------------------------------------

LENGTH = 16


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


# Markdown and pictures -----------------------------------------------------------------------


def test_a_table_has_a_rule_and_escaped_bars() -> None:
    text = markdown_table(["a", "b|c"], [["x|y", 1], ["|", None]])
    assert text.splitlines() == [
        "| a | b\\|c |",
        "| --- | --- |",
        "| x\\|y | 1 |",
        "| \\| | None |",
    ]


def a_curve(seed: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "endpoint": [None, None, 300, 300],
            "tokens": [100, 200, 250, 300],
            "held_out_loss": [6.0 + seed, 5.5, None, 5.0],
        }
    )


def test_pictures_are_written(tmp_path: Path) -> None:
    draw_curves({"color": [a_curve(0), a_curve(1)], "random": [a_curve(2)]}, tmp_path / "a.png")
    draw_colors({"corpus": [0.1, 0.2, 0.5], "probe": [-1.0]}, tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_the_report_holds_comparison_probe_documents_and_pictures(
    sampled: tuple[pl.DataFrame, dict[str, Path]], tmp_path: Path
) -> None:
    table, documents = sampled
    rows = pl.concat([COMPARED, evaluations(("color_tau8", None, None, "probe_auc", 0.98765))])
    colors = {"corpus": [0.1, 0.2, 0.5], "probe": [-1.0, -0.5]}
    curves = {"color": [a_curve(0)]}
    write_report(tmp_path, "books", rows, excerpts(table, documents, 40), curves, colors)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# books\n")
    assert (
        "| color_tau8 | 100 | 5.500 5.200 | 5.350 ± 1.906 | 1.337 ± 0.476 | -0.750 ± 3.176" in text
    )
    assert "| color_tau8 | probe_auc | 0.9877 |" in text
    assert "| best | -2.000 | b.jsonl | `'code'` |" in text
    assert "| a\\|x.jsonl | `first line \\| bar xxx" in text
    for name in ("curves.png", "color.png"):
        assert f"({name})" in text
        assert (tmp_path / name).read_bytes().startswith(PNG)
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in (4, 5, 8), line
