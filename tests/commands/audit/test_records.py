"""The audit reports every kind of tampering with tables, selections and the ledger."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import duckdb
import polars as pl
import pytest

from tests.commands.audit.tampering import (
    append,
    audited,
    folder,
    forge,
    found,
    lines,
    rewrite,
)
from tests.conftest import Project, copy_of


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """The finished project, to be tampered with."""
    return copy_of(finished, tmp_path)


# Score tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            "UPDATE losses SET loss = loss + 1e-3 WHERE rowid = 5",
            r"losses of model \w+, shard \S+: expected [\d,]+ rows, position \d+, loss [\d.]+",
        ),
        (
            "DELETE FROM losses WHERE rowid = 5",
            r"losses of model \w+, shard \S+: ex.* [\d,]+ rows, position \d+, .*, found [\d,]+ r",
        ),
        (
            "INSERT INTO sequences SELECT * FROM sequences WHERE rowid = 5",
            r"sequences of shard \S+: expected [\d,]+ rows, found [\d,]+ rows, position",
        ),
        ("DELETE FROM spans WHERE rowid = 0", r"spans of shard \S+: expected"),
        ("DELETE FROM paired_losses WHERE rowid = 0", r"paired_losses of domain reference, shard"),
        (
            "INSERT INTO excluded SELECT shard, 0, 'copy' FROM sequences LIMIT 1",
            r"excluded of shard",
        ),
        (
            "UPDATE documents SET source_line = 7 WHERE rowid = 0",
            r"documents of shard \S+: expected",
        ),
        ("UPDATE models SET model = 'ab' WHERE role = 'prior'", r"models of role prior: expected"),
    ],
)
def test_a_row_of_the_score_tables_is_changed(project: Project, change: str, line: str) -> None:
    with duckdb.connect(str(project.home.scores)) as scores:
        scores.execute(change)
    found(project, rf"^score_tables: scores.duckdb, {line}")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            "UPDATE selections SET rank = 3 - rank WHERE rank < 3",
            r"selections of selection \w+: expected [\d,]+ rows",
        ),
        (
            "UPDATE selection_versions SET cutoff = cutoff + 1",
            r"selection_versions of domain reference, arm \w+, selection \w+: expected 1 r",
        ),
    ],
)
def test_a_row_of_the_selections_is_changed(project: Project, change: str, line: str) -> None:
    with duckdb.connect(str(project.home.selections)) as selections:
        selections.execute(change)
    found(project, rf"^score_tables: selections.duckdb, {line}")


def test_the_scores_of_two_shards_are_swapped(project: Project) -> None:
    """In the tables, and in the record."""
    one, two = (s.name for s in project.home.shards()[:2])
    with duckdb.connect(str(project.home.scores)) as scores:
        for table in ("losses", "paired_losses"):
            scores.execute(
                f"UPDATE {table} SET shard = CASE shard WHEN $one THEN $two ELSE $one END "
                "WHERE shard IN ($one, $two)",
                {"one": one, "two": two},
            )
    tables = [
        rf"{t} of .*shard {s}: expected" for t in ("losses", "paired_losses") for s in (one, two)
    ]
    found(project, *tables)


def test_the_record_of_two_shards_is_swapped(project: Project) -> None:
    paths = {e["partition"]: e["path"] for e in project.ledger() if e["asset"] == "prior_scores"}
    places = [project.home.root / path for path in list(paths.values())[:2]]
    aside = places[0].with_name("aside")
    places[0].rename(aside)
    places[1].rename(places[0])
    aside.rename(places[1])
    there = lines(project)
    for shard in list(paths)[:2]:
        assert any(line.startswith(f"prior_scores[{shard}]: ") for line in there)


def test_the_published_evaluations_are_changed(project: Project) -> None:
    with duckdb.connect(str(project.home.results)) as results:
        results.execute("UPDATE evaluations SET value = value - 1 WHERE arm = 'color_tau4'")
    found(
        project, r"^evaluations: results.duckdb, evaluations: expected the \d+ rows of the reports"
    )


def test_another_selection_is_made_the_current_one(project: Project) -> None:
    with duckdb.connect(str(project.home.selections)) as selections:
        selections.execute("UPDATE selection_versions SET current = false WHERE arm = 'color_tau4'")
    found(
        project,
        r"^reference/color_tau4/selection: .*expected \w{16} current, found not current$",
        r"selection_versions of domain reference, arm color_tau4.*expected 1 rows, current True",
    )


# Repeating -------------------------------------------------------------------------------------


def test_the_selection_is_re_ordered(project: Project) -> None:
    """With all that says what it is, and the manifests of all that was made from it."""

    def reorder(place: Path) -> None:
        rows = pl.read_parquet(place / "selection.parquet")
        turned = rows.with_columns(
            shard=rows["shard"].reverse(), position=rows["position"].reverse()
        )
        turned.write_parquet(place / "selection.parquet", compression="zstd")

    forge(project, "reference/color_tau4/selection", reorder)
    there = lines(project, again=True)
    first = pl.read_parquet(folder(project, "reference/color_tau4/selection") / "selection.parquet")
    assert any(
        re.match(r"reference/color_tau4/selection: .*: expected at rank 1 \S+ with", line)
        and f"found at rank 1 {first['shard'][0]}:{first['position'][0]}" in line
        for line in there
    )
    assert any("the ledger before line" in line for line in there)


def test_losses_are_forged_wherever_they_are_on_record(project: Project) -> None:
    """Only scoring again finds that out; here with the chain broken as well."""

    def lower(place: Path) -> None:
        (chunk,) = place.glob("losses-*.parquet")
        rows = pl.read_parquet(chunk)
        rows.with_columns(loss=pl.col("loss") - 1e-3).write_parquet(chunk)

    forge(project, "prior_scores", lower)
    shard = max(str(e["partition"]) for e in project.ledger() if e["asset"] == "prior_scores")
    with duckdb.connect(str(project.home.scores)) as scores:
        scores.execute(
            "UPDATE losses SET loss = loss - 1e-3 WHERE shard = ? AND model = "
            "(SELECT model FROM models WHERE role = 'prior')",
            [shard],
        )
    there = lines(project, sample=2)
    again = [line for line in there if line.startswith(f"prior_scores[{shard}]: position")]
    assert len(again) == 2
    assert re.search(r": expected a loss of [\d.]+ within 2e-05, found [\d.]+$", again[0])


# The ledger ------------------------------------------------------------------------------------


def drop(entries: list[dict], i: int) -> list[dict]:
    return entries[:i] + entries[i + 1 :]


def edit(entries: list[dict], i: int) -> list[dict]:
    return [*entries[:i], {**entries[i], "seed": 7}, *entries[i + 1 :]]


def move(entries: list[dict], i: int) -> list[dict]:
    return [*entries[: i - 1], entries[i], entries[i - 1], *entries[i + 1 :]]


@pytest.mark.parametrize("change", [drop, edit, move])
@pytest.mark.parametrize("chained", [False, True], ids=["as it was", "with the chain made anew"])
def test_the_ledger_is_changed(
    project: Project, change: Callable[[list[dict], int], list[dict]], chained: bool
) -> None:
    entries = project.ledger()
    i = next(i for i, e in enumerate(entries) if e["asset"] == "prior_model")
    if chained:
        rewrite(project, change(entries, i))
    else:
        text = [json.dumps(e, ensure_ascii=False) + "\n" for e in change(entries, i)]
        project.home.ledger.write_text("".join(text))
    there = lines(project)
    if chained:
        later = [line for line in there if "expected the entry before it" in line]
        assert len(later) > 5  # every artifact made after has the head that was
    else:
        broken = (
            i + 1 if change is not edit else i + 2
        )  # the line whose hash of the one before is off
        broken -= change is move
        assert any(line.startswith(f"ledger: line {broken} ") for line in there)


@pytest.mark.parametrize("change", [drop, edit])
def test_the_last_entry_is_changed_with_the_chain_made_anew(
    project: Project, change: Callable[[list[dict], int], list[dict]]
) -> None:
    head = audited(project).head
    entries = project.ledger()
    rewrite(project, change(entries, len(entries) - 1))
    there = lines(project, head=head)
    assert any(
        line.startswith(f"ledger: the head: expected an entry with the sha256 {head[:16]}")
        for line in there
    )
    last = entries[-1]["asset"]
    assert any(line.startswith(f"{last}") for line in there)


def test_a_head_that_was_noted_down_is_found_as_the_ledger_grows(project: Project) -> None:
    head = audited(project).head
    append(project, {**project.ledger()[0], "reused": True})
    assert not lines(project, head=head[:12].upper())
    found(project, "^ledger: the head: expected an entry", head="0123456789ab")
