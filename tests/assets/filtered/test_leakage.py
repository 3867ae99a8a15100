"""A corpus that quotes held-out text: quotes are found, listed, and excluded unless kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from assets.filtered.leakage import leakage_checks
from colorfilter.errors import InputError
from colorfilter.selection.decontamination import words
from resources.artifacts import Artifact, ArtifactStore
from tests.conftest import Project

REMOVES, KEEPS = "color_tau1", "color_tau1_leaks"


def documents(project: Project, split: str) -> pl.DataFrame:
    text = ArtifactStore(home=str(project.home.root)).current("reference/domain_text")
    return pl.read_parquet(text.path / split / "documents.parquet")


def made(project: Project, arm: str, asset: str) -> Artifact:
    return ArtifactStore(home=str(project.home.root)).current(f"reference/{arm}/{asset}")


def written(project: Project, arm: str) -> list[str]:
    folder = made(project, arm, "filtered_dataset").path / "documents"
    return [t for f in folder.glob("*.parquet") for t in pl.read_parquet(f)["text"]]


def quotes(passage: list[str], text: str) -> bool:
    return " ".join(passage) in " ".join(words(text))


def changed(project: Project, root: Path, **sections: Any) -> Project:
    """The same project elsewhere with another recipe."""
    other = Project(root, {**project.facts, **sections})
    shutil.copytree(project.home.root, other.home.root)
    return other


@pytest.fixture(scope="module")
def passage(finished: Project) -> list[str]:
    """Twenty words from the midst of the longest held-out document."""
    held_out = documents(finished, "held_out").sort("n_chars")["text"][-1]
    return words(held_out)[100:120]


@pytest.fixture(scope="module")
def leaking(
    finished: Project, passage: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Project:
    """The finished project with a source of three documents that quote it, in prose of D_down."""
    root = tmp_path_factory.mktemp("leaking")
    down = documents(finished, "down").sort("n_chars")["text"]
    quote = ", ".join(passage).upper()
    texts = [f"{down[-i][:200]} He said: “{quote}!” {down[-i][200:400]}" for i in (1, 2, 3)]
    (root / "quoting.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    corpus = {**finished.facts["corpus"]}
    corpus["sources"] = [
        *corpus["sources"],
        {"name": "quoting", "files": str(root / "quoting.jsonl")},
    ]
    arm = {"method": "color", "tau": 1}
    arms = [arm, {**arm, "leaks": "keep"}]
    project = changed(finished, root, corpus=corpus, arms=arms, evaluation={"seeds": [1]})
    with pytest.MonkeyPatch.context() as monkeypatch:
        failure = project.run(monkeypatch)
    assert failure is None, failure
    return project


def test_what_quotes_held_out_text_is_found_and_listed(
    leaking: Project, passage: list[str]
) -> None:
    artifact = made(leaking, REMOVES, "leakage")
    leaks = pl.read_parquet(artifact.path / "leakage.parquet")
    mine = leaks.filter(pl.col("source_file").str.ends_with("quoting.jsonl"))
    assert len(mine) > 0
    held_out = documents(leaking, "held_out").sort("n_chars").row(-1, named=True)
    for leak in mine.to_dicts():
        assert quotes(passage, leak["quote"])
        assert leak["n_words"] == len(words(leak["quote"]))
        assert leak["protected"] == f"{held_out['source_file']}:{held_out['source_line']}"
        shard = ArtifactStore(home=str(leaking.home.root)).current("raw_corpus", leak["shard"])
        texts = pl.read_parquet(shard.path / "documents.parquet")
        (text,) = texts.filter(pl.col("doc_id") == leak["doc_id"])["text"]
        assert text[leak["char_start"] : leak["char_end"]] == leak["quote"]
    assert artifact.facts["matches"] == len(leaks)
    assert leaks["n_words"].is_sorted(descending=True)


def test_what_leaks_is_neither_trained_on_nor_written(leaking: Project, passage: list[str]) -> None:
    leaks = pl.read_parquet(made(leaking, REMOVES, "leakage").path / "leakage.parquet")
    places = set(leaks.explode("positions").select("shard", "positions").rows())
    n_selected = made(leaking, REMOVES, "selection").facts["selected"]
    assert made(leaking, REMOVES, "leakage").facts["sequences"] == len(places)
    for arm, kept in ((REMOVES, False), (KEEPS, True)):
        dataset = made(leaking, arm, "filtered_dataset")
        rows = pl.read_parquet(dataset.path / "tokens" / "sequences.parquet")
        there = set(rows.select("shard", "position").rows())
        assert places <= there if kept else not places & there
        assert len(rows) == n_selected - (0 if kept else len(places))
        assert dataset.facts["left_out"] == n_selected - len(rows)
        assert any(quotes(passage, text) for text in written(leaking, arm)) == kept


def evaluate(project: Project, arm: str) -> dg.AssetCheckResult:
    (check,) = (
        c
        for c in leakage_checks(project.recipe)
        if next(iter(c.check_keys)).asset_key.path[1] == arm
    )
    return check(artifacts=ArtifactStore(home=str(project.home.root)))


def test_the_check_counts_what_was_written(leaking: Project, passage: list[str]) -> None:
    assert evaluate(leaking, REMOVES).passed
    kept = evaluate(leaking, KEEPS)
    assert not kept.passed
    assert kept.severity == dg.AssetCheckSeverity.WARN
    assert passage[10].upper() in (kept.description or "")


def test_the_check_fails_where_the_written_text_leaks(
    leaking: Project, passage: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = written(leaking, REMOVES)[0] + " " + " ".join(passage)
    monkeypatch.setattr("assets.filtered.leakage.read_documents", _with_row(text))
    failed = evaluate(leaking, REMOVES)
    assert not failed.passed
    assert failed.severity == dg.AssetCheckSeverity.ERROR


def _with_row(text: str) -> Any:
    from colorfilter.data.documents import read_documents

    def read(path: Path, columns: list[str]) -> Any:
        yield from read_documents(path, columns)
        if "doc_id" in columns:
            yield {"doc_id": "planted", "text": text}

    return read


def test_whole_documents_that_leak_are_not_written(
    leaking: Project, passage: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = changed(leaking, tmp_path, filtered={"whole_documents_from": 0.5})
    for arm in (REMOVES, KEEPS):
        assets = [f"reference/{arm}/{asset}" for asset in ("leakage", "filtered_dataset")]
        project.materialize(monkeypatch, assets)
    kept, removed = written(project, KEEPS), written(project, REMOVES)
    assert set(removed) == {text for text in kept if not quotes(passage, text)} < set(kept)
    assert evaluate(project, REMOVES).passed


def test_random_selects_more_than_training_needs_in_case_some_of_it_leaks(
    finished: Project,
) -> None:
    needed = finished.facts["target"]["training_tokens"] * 1.5 / finished.facts["sequence_length"]
    assert made(finished, "random", "selection").facts["selected"] == int(needed) * 21 // 20


def test_too_little_without_leaks_is_refused(
    leaking: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = (
        leaking.facts["sequence_length"] * made(leaking, REMOVES, "selection").facts["selected"]
    )
    target = {**leaking.facts["target"], "training_tokens": tokens}
    project = changed(leaking, tmp_path, target=target)
    for arm in (KEEPS, REMOVES):
        assets = ("selection", "leakage", "filtered_dataset")
        materialized = [f"reference/{arm}/{asset}" for asset in assets]
        if arm == KEEPS:
            project.materialize(monkeypatch, materialized)
        else:
            with pytest.raises(InputError, match=r"lower target.training_tokens or tau, or set"):
                project.materialize(monkeypatch, materialized)
