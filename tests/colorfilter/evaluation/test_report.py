import base64
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from colorfilter.config.recipe import Arm
from colorfilter.evaluation import figures, report
from colorfilter.evaluation.examples import Example
from colorfilter.evaluation.html import Section, Table
from colorfilter.evaluation.metrics import Summary, TokensToMatch
from colorfilter.evaluation.report import (
    COMPARISON_HEADER,
    EVALUATIONS,
    arm_lines,
    comparison_in_a_sentence,
    comparison_in_brief,
    comparison_rows,
    interval,
    match_rows,
    sections,
    write_report,
)


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


def test_the_best_stand_first_among_equals_whatever_the_order_of_the_rows() -> None:
    losses = {"a": 5.5, "b": 5.2, "c": 5.9, "random": 5.7}
    rows = [r for arm, loss in losses.items() for r in losses_and_bits(arm, 1, 100, loss)]
    rows += losses_and_bits("random", 1, 200, 5.0)
    for shuffled in (rows, rows[::-1], sorted(rows, key=lambda r: r[4])):
        lines = [(line.arm, line.tokens) for line in arm_lines(evaluations(*shuffled))]
        assert lines == [("b", 100), ("a", 100), ("random", 100), ("c", 100), ("random", 200)]


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
        "-0.750 ± 3.176",
        "inconclusive",
        "1.41 2.00",
    ]
    assert rows["best_tau8", "100"][-3:-1] == ["-2.100 ± 1.271", "better"]
    assert rows["random", "100"][-2] == "-"
    assert rows["random", "100"][-1] == "-"
    assert rows["best_tau8", "100"][-1] == ">2.00 x2"


def test_in_brief_equal_matches_are_told_once() -> None:
    header, rows = comparison_in_brief(arm_lines(COMPARED))
    by_arm = {(row[0], row[1]): dict(zip(header, row, strict=True)) for row in rows}
    assert by_arm["best_tau8", "100"] == {
        "arm": "best_tau8",
        "tokens": "100",
        "mean ± 95% CI": "4.000 ± 0.000",
        "vs. random": "better",
        "tokens-to-match": ">2.00 x2",
    }
    assert by_arm["color_tau8", "100"]["tokens-to-match"] == "1.41 2.00"
    assert list(by_arm["random", "100"].values())[3:] == ["-", "-"]


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ((4.0, 4.0), "at 100 tokens, random needs more than 200 tokens with each of 2 seeds."),
        ((5.5, 5.49), "at 100 tokens, random needs at least 141 tokens with each of 2 seeds."),
        ((5.99, 6.01), "At 100 tokens, no arm is significantly better than random."),
    ],
)
def test_the_sentence_says_what_the_seed_that_gains_least_does(
    losses: tuple[float, float], sentence: str
) -> None:
    random = [(100, 6.0), (200, 5.0)]
    rows = [
        row
        for seed in (1, 2)
        for n, loss in random
        for row in losses_and_bits("random", seed, n, loss)
    ]
    for seed, loss in enumerate(losses, 1):
        rows += losses_and_bits("color_tau8", seed, 100, loss)
    assert sentence in comparison_in_a_sentence(arm_lines(evaluations(*rows)))


def sentence_of(losses: dict[str, list[float]]) -> str:
    """For losses of arms by seed, at 100 tokens."""
    rows = [
        row
        for arm, values in losses.items()
        for seed, loss in enumerate(values, 1)
        for row in losses_and_bits(arm, seed, 100, loss)
    ]
    return comparison_in_a_sentence(arm_lines(evaluations(*rows)))


RANDOM = {"random": [6.0, 6.1, 5.9]}
BETTER = {"color": [5.0, 5.1, 4.9]}
NONE_BETTER = "At 100 tokens, no arm is significantly better than random."
OF_COLOR = "To match color at 100 tokens, random needs more than 100 tokens with each of 3 seeds."


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        (RANDOM | BETTER, OF_COLOR),
        (RANDOM | BETTER | {"solo": [4.0]}, OF_COLOR),
        (RANDOM | BETTER | {"wide": [1.0, 7.0, 4.0]}, OF_COLOR),
        (RANDOM | BETTER | {"broken": [math.nan, 1.0, 1.0]}, OF_COLOR),
        (RANDOM | {"worse": [7.0, 7.1, 6.9]}, NONE_BETTER),
        ({"random": [6.0], "color": [5.0]}, "One seed is too few to compare an arm with random."),
        (BETTER, ""),
        (RANDOM, ""),
    ],
)
def test_the_sentence_is_of_an_arm_that_is_better_whatever_others_are(
    losses: dict[str, list[float]], sentence: str
) -> None:
    assert sentence_of(losses) == sentence


def test_a_seed_that_is_worse_is_told_where_the_arm_is_better() -> None:
    rows = []
    for seed, (own, other) in enumerate([(4.0, 6.0), (3.9, 5.9), (4.1, 6.1), (6.05, 6.0)] * 3, 1):
        rows += losses_and_bits("random", seed, 100, other)
        rows += losses_and_bits("color_tau8", seed, 100, own)
    told = comparison_in_a_sentence(arm_lines(evaluations(*rows)))
    assert told == (
        "At 100 tokens, color_tau8 is better than random on average, but not with each of 12 seeds."
    )


def test_an_interval_is_shown_only_where_there_is_one() -> None:
    assert interval(Summary(1.23456, 0.5, 3)) == "1.235 ± 0.500"
    assert interval(Summary(1.23456, math.nan, 1)) == "1.235"


# What the report says ------------------------------------------------------------------------

ARMS = [
    Arm(method="color", tau=8),
    Arm(method="color", tau=32),
    Arm(method="color", tau=8, batch=64),
    Arm(method="color", tau=8, leaks="keep"),
    Arm(method="random"),
]
CURVE = pl.DataFrame({"endpoint": [None, 300], "tokens": [100, 300], "held_out_loss": [6.0, 5.0]})


def example(text: str = "some text") -> Example:
    span = {"doc_id": "d1", "source_file": "/data/books.jsonl", "source_line": 7, "doc_start": 0}
    span |= {"n_tokens": 1, "char_start": 0, "char_end": 9, "closes": False}
    loss = np.ones(1, dtype=np.float32)
    return Example("best", "a", 0, -1.25, [span], [text], loss, loss)


def report_of(evaluations: pl.DataFrame, **changed: Any) -> dict[str, Section]:
    facts: dict[str, Any] = {
        "arms": ARMS,
        "curves": {"random": [CURVE]},
        "colors": {"corpus": [0.1, 0.2, 0.5], "probe": [-1.0]},
        "cutoffs": {},
        "examples": [example()],
    }
    return {s.title: s for s in sections(evaluations, **facts | changed)}


def test_the_report_has_its_sections_in_the_order_of_reading() -> None:
    added = [
        *losses_and_bits("color_tau32", 1, 100, 5.0),
        ("color_tau8", None, None, "probe_auc", 0.98765),
    ]
    probed = pl.concat([COMPARED, evaluations(*added)])
    made = report_of(probed)
    assert list(made) == [
        "Comparison",
        "tokens-to-match",
        "Loss by tau",
        "Learning curves",
        "Scores",
        "What was selected",
    ]
    pictures = [s.picture.name for s in made.values() if s.picture]
    assert pictures == ["matches", "tau", "curves", "color"]
    comparison, scores = made["Comparison"].table, made["Scores"].table
    assert comparison == Table(COMPARISON_HEADER, comparison_rows(arm_lines(probed)))
    assert scores == Table(["arm", "metric", "value"], [["color_tau8", "probe_auc", "0.9877"]])
    assert len(made["What was selected"].examples) == 1


def test_the_report_begins_with_the_sentence_that_a_run_ends_with() -> None:
    told = report_of(COMPARED)["Comparison"].text
    assert told.startswith(
        "To match best_tau8 at 100 tokens, random needs more than 200 tokens with each of 2 seeds."
        "\n\nHeld-out loss, in nats per token"
    )


def test_one_tau_is_no_sweep() -> None:
    assert "Loss by tau" not in report_of(COMPARED)


def test_tokens_to_match_are_drawn_at_the_tokens_that_all_arms_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = [*losses_and_bits("full", 1, 100, 5.5), *losses_and_bits("full", 1, 400, 4.0)]
    given: dict[str, Any] = {}
    picture = figures.Picture("matches", "", b"", b"")
    monkeypatch.setattr(figures, "match_plot", lambda found: given.update(found) or picture)
    report_of(pl.concat([COMPARED, evaluations(*full)]))
    assert given.keys() == {"best_tau8", "color_tau8", "worse_tau8", "full"}
    (match,) = given["full"]
    assert (match.ratio, match.bound) == (pytest.approx(math.sqrt(2)), "=")


def test_cost_and_leakage_are_tables_where_there_are_any() -> None:
    cost = [{"stage": "prior", "forwards": 3_100_000_000, "hours": 1.5, "measured": None}]
    flips = [{"arm": "color_tau8", "sampled": 9, "selected": 3, "flips": 1}]
    made = report_of(
        COMPARED, confidence=flips, cost=cost, leakage=[{"arm": "random", "overlaps": 12}]
    )
    assert list(made)[-4:] == ["Confidence at the cutoff", "Leakage", "Cost", "What was selected"]
    assert made["Cost"].table == Table(
        ["stage", "forwards", "hours", "measured"],
        [["prior", "3,100,000,000", "1.5000", "-"]],
    )
    assert made["Leakage"].table == Table(["arm", "overlaps"], [["random", "12"]])


def test_tasks_are_what_arms_are_judged_by_where_there_are_any() -> None:
    on_tasks = [
        (arm, seed, 100, metric, value)
        for arm, loss in (("color_tau8", 3.0), ("random", 3.5))
        for seed in (1, 2)
        for metric, value in (
            ("piqa_acc", 0.5 + seed / 10),
            ("piqa_loss", loss + seed),
            ("tasks_loss", loss + seed),
            ("tasks_loss_finetuned", loss),
            ("bits_per_byte_finetuned", 1.0),
        )
    ]
    made = report_of(pl.concat([COMPARED, evaluations(*on_tasks)]))
    comparison, tasks, tuned = (made[t].table for t in ("Comparison", "Tasks", "Fine-tuned"))
    assert comparison is not None
    assert comparison.rows[0][2:4] == ["4.000 5.000", "4.500 ± 6.353"]
    assert comparison.rows[0][-3:-1] == ["-0.500 ± 0.000", "better"]
    assert tasks == Table(
        ["arm", "tokens", "piqa"],
        [["random", "100", "5.000, 65.0%"], ["color_tau8", "100", "4.500, 65.0%"]],
    )
    assert tuned is not None
    assert [row[3] for row in tuned.rows] == ["3.000 ± 0.000", "3.500 ± 0.000"]


def test_a_report_on_random_alone_has_nothing_to_match_or_sweep() -> None:
    rows = COMPARED.filter(pl.col("arm") == "random")
    made = report_of(rows, arms=[Arm(method="random")])
    assert list(made) == ["Comparison", "Learning curves", "Scores", "What was selected"]
    assert made["Comparison"].text.startswith("Held-out loss")


def test_a_report_on_one_seed_is_made() -> None:
    made = report_of(COMPARED.filter(pl.col("seed") == 1))
    table = made["Comparison"].table
    assert table is not None
    assert not [cell for row in table.rows for cell in row if "nan" in str(cell)]
    assert made["tokens-to-match"].picture


def test_the_sweep_is_of_the_color_arms_against_random_at_their_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = pl.concat(
        [
            COMPARED,
            evaluations(
                *losses_and_bits("color_tau32", 1, 100, 5.0),
                *losses_and_bits("color_tau8_batch64", 1, 100, 5.6),
                *losses_and_bits("color_tau8_leaks", 1, 100, 5.1),
            ),
        ]
    )
    given: list[Any] = []
    picture = figures.Picture("tau", "", b"", b"")
    monkeypatch.setattr(figures, "tau_sweep", lambda *a: given.extend(a) or picture)
    report_of(rows)
    series, random, loss = given
    means = {name: {tau: s.mean for tau, s in line.items()} for name, line in series.items()}
    assert means == {
        "color": {8.0: pytest.approx(5.35), 32.0: pytest.approx(5.0)},
        "color, batch 64": {8.0: pytest.approx(5.6)},
        "color, leaks kept": {8.0: pytest.approx(5.1)},
    }
    assert loss == "Held-out loss"
    assert random.mean == pytest.approx(6.1)


def test_page_markdown_and_pictures_are_written_from_the_same_sections(tmp_path: Path) -> None:
    found = list(report_of(COMPARED, examples=[example("<script>alert(1)</script>")]).values())
    write_report(tmp_path, "books", found)
    page, text = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    pictures = {s.picture.name: s.picture for s in found if s.picture}
    assert {p.name for p in tmp_path.iterdir()} == {
        *("report.html", "report.md"),
        *(f"{name}.svg" for name in pictures),
    }
    for name, picture in pictures.items():
        assert (tmp_path / f"{name}.svg").read_bytes() == picture.light
        assert f"({name}.svg)" in text
        assert base64.b64encode(picture.dark).decode() in page
    for row in comparison_rows(arm_lines(COMPARED)):
        assert "| " + " | ".join(row) + " |" in text
        for cell in row:
            assert f">{escape(cell)}</td>" in page
    assert "<script" not in page


def test_a_new_column_of_the_comparison_shows_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "COMPARISON_HEADER", [*COMPARISON_HEADER, "remark"])
    monkeypatch.setattr(
        report,
        "comparison_rows",
        lambda lines: [[*r, "remarkable"] for r in comparison_rows(lines)],
    )
    write_report(tmp_path, "books", list(report_of(COMPARED).values()))
    assert "<th>remark</th>" in (tmp_path / "report.html").read_text()
    assert "| remarkable |" in (tmp_path / "report.md").read_text()
