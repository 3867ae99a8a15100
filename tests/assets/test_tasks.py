"""The complete pipeline over a small domain of tasks."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest

from colorfilter.data.tokens import Encoder, open_tokens, real_tokens
from colorfilter.selection.sql import fetch
from pipelines.graph import build_definitions
from resources.artifacts import Artifact, ArtifactStore
from tests.conftest import Project, recipe_facts, write_corpus
from tests.reads import assert_declared, recorded

pytest.importorskip("lm_eval")

WORDS = ["return", "import", "class", "yield", "raise", "with", "while", "lambda", "assert"]


def piqa(n: int, first: int) -> list[dict[str, Any]]:
    return [
        {
            "goal": f"Name {WORDS[i % 9]} {i}",
            "sol1": f"{WORDS[i % 9]} it {i}",
            "sol2": f"{WORDS[(i + 1) % 9]} all",
            "label": i % 2,
        }
        for i in range(first, first + n)
    ]


def openbookqa(n: int) -> list[dict[str, Any]]:
    return [
        {
            "query": f"Question: The keyword {i} is {WORDS[i % 9]} or\nAnswer:",
            "choices": [f"{WORDS[(i + k) % 9]} {i}" for k in range(4)],
            "gold": i % 4,
        }
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished project over two tasks: one with files for train and test, one with one file."""
    root = tmp_path_factory.mktemp("quiz")
    write_corpus(root / "corpus", ["argparse", "ast", "enum"])
    for name, rows in {
        "piqa_train": piqa(90, 0),
        "piqa_test": piqa(12, 500),
        "openbookqa": openbookqa(60),
    }.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = recipe_facts(root / "corpus")
    both = str(root / "openbookqa.jsonl")
    facts["prior"]["sample_chars"] = 30_000
    facts["domains"] = [
        {
            "name": "quiz",
            "tasks": [
                {
                    "name": "piqa",
                    "train": str(root / "piqa_train.jsonl"),
                    "test": str(root / "piqa_test.jsonl"),
                },
                {"name": "openbookqa", "train": both, "test": both},
            ],
            "held_out": 0.3,
            "test_items": 10,
            "training": facts["domains"][0]["training"],
        }
    ]
    facts["target"]["training_tokens"] = 1_500
    facts["arms"] = [{"method": "color", "tau": 4}, {"method": "random"}]
    facts["evaluation"] = {"seeds": [2], "random_multiples": [1, 1.5], "finetune": True}
    project = Project(root, facts)
    with pytest.MonkeyPatch.context() as monkeypatch:
        failure = project.run(monkeypatch)
    assert failure is None, failure
    return project


def current(project: Project, asset: str, partition: str | None = None) -> Artifact:
    return ArtifactStore(home=str(project.home.root)).current(asset, partition)


def test_every_example_of_d_down_and_held_out_is_a_sequence(quiz: Project) -> None:
    text, packed = current(quiz, "quiz/domain_text"), current(quiz, "quiz/domain_tokens")
    encoder = Encoder(current(quiz, "tokenizer").path)
    for split in ("down", "held_out"):
        texts = pl.read_parquet(text.path / split / "documents.parquet")["text"].to_list()
        rows, n_tokens = open_tokens(packed.path / split), real_tokens(packed.path / split)
        assert len(rows) == len(texts) == packed.facts[f"{split}_sequences"]
        for row, n, example in zip(rows, n_tokens, texts, strict=True):
            ids = [*encoder.encode([example])[0].ids, encoder.end_of_text]
            assert row[:n].tolist() == ids[-32:]
    assert text.facts["held_out_documents"] == 20


def test_evaluations_hold_the_tasks_of_every_seed_and_end_point(quiz: Project) -> None:
    with duckdb.connect(str(quiz.home.results), read_only=True) as results:
        rows = fetch(
            results,
            "SELECT arm, seed, tokens, metric, value FROM evaluations WHERE seed IS NOT NULL "
            "AND (starts_with(metric, 'piqa') OR starts_with(metric, 'openbookqa'))",
        )
    metrics = {
        f"{task}_{metric}{suffix}"
        for task in ("piqa", "openbookqa")
        for metric in ("acc", "acc_norm", "loss")
        for suffix in ("", "_stderr")
    } | {"piqa_items", "openbookqa_items"}
    places = {(arm, seed, tokens) for arm, seed, tokens, _, _ in rows}
    assert {(arm, seed) for arm, seed, _ in places} == {("color_tau4", 2), ("random", 2)}
    assert len(places) == 3  # random has two end points
    least = min(tokens for *_, tokens in places)
    for place in places:
        found = {metric: value for *where, metric, value in rows if tuple(where) == place}
        tuned = {f"{metric}_finetuned" for metric in metrics} if place[2] == least else set()
        assert found.keys() == metrics | tuned
        assert found["piqa_items"] == found["openbookqa_items"] == 10
        assert 0 <= found["piqa_acc"] <= 1
        assert 0 < found["piqa_loss"] < 10


def test_the_metrics_are_those_of_the_checkpoint(quiz: Project) -> None:
    from colorfilter.evaluation import harness
    from colorfilter.models import checkpoints

    target = current(quiz, "quiz/color_tau4/target_model", "seed_2")
    ((tokens, place),) = target.facts["checkpoints"].items()
    evaluation = current(quiz, "quiz/color_tau4/evaluation")
    rows = pl.read_parquet(evaluation.path / "evaluations.parquet").filter(
        (pl.col("seed") == 2) & (pl.col("tokens") == int(tokens))
    )
    recorded = dict(rows.select("metric", "value").rows())
    checkpoint = target.path / place
    scored = harness.ScoredModel(checkpoints.load(checkpoint), Encoder(checkpoint))
    found = harness.evaluate(scored, current(quiz, "quiz/domain_text").path / "tasks")
    assert {m: recorded[m] for m in found} == pytest.approx(found, abs=1e-5)


def test_nothing_is_computed_twice(
    quiz: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path, quiz.facts)
    shutil.copytree(quiz.home.root, project.home.root)
    before = len(project.ledger())
    assert project.run(monkeypatch) is None
    assert all(entry["reused"] for entry in project.ledger()[before:])


def test_a_recipe_with_tasks_wants_the_harness_before_anything_is_computed(
    quiz: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    project = Project(tmp_path, quiz.facts)
    failure = project.run(monkeypatch)
    assert failure is not None
    assert failure.input_is_wrong
    assert "pip install '.[eval]'" in failure.message
    assert [entry["asset"] for entry in project.ledger()] == ["recipe"]


def test_assets_of_tasks_and_finetuned_models_read_exactly_what_they_declare(
    quiz: Project,
) -> None:
    definitions = build_definitions(quiz.recipe, str(quiz.home.root))
    assert_declared(definitions, recorded(quiz.reads))
