"""The complete pipeline on a little real text: what is computed or reused, what checks find."""

import json
import os
import shutil
from pathlib import Path

import dagster as dg
import duckdb
import numpy as np
import polars as pl
import pytest
import torch

from assets.auxiliary.models import auxiliary_checks
from assets.corpus.corpus import corpus_checks
from assets.scores.scores import score_checks
from colorfilter.data.tokens import Encoder, open_tokens
from colorfilter.evaluation import html
from colorfilter.evaluation.examples import Example
from colorfilter.models import checkpoints
from colorfilter.selection.sql import fetch, fetch_row
from resources.artifacts import ArtifactStore
from resources.score_store import ScoreStore
from resources.tally import Tally
from tests.assets.results import selection
from tests.conftest import Project, copy_of, made_since, recipe_facts, write_corpus


def test_a_second_run_computes_nothing(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_of(finished, tmp_path)
    before, kernels = len(project.ledger()), len(project.kernel_runs())
    assert project.run(monkeypatch) is None
    assert made_since(project, before) == {}
    assert len(project.kernel_runs()) == kernels


def touch(corpus: Path, time: int) -> None:
    for file in corpus.glob("*.jsonl"):
        os.utime(file, (time, time))


def test_a_new_file_costs_its_own_scoring_and_a_touched_one_its_reading(
    movable: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(movable.ledger())
    write_corpus(tmp_path / "corpus", ["textwrap"])
    touch(tmp_path / "corpus", 1)  # so what was read elsewhere is read here
    standing = {s.name for s in movable.home.shards()}
    assert movable.run(monkeypatch) is None
    (new,) = {s.name for s in movable.home.shards()} - standing
    made = made_since(movable, before)
    for asset in ("prior_scores", "reference/conditional_scores"):
        assert made[asset] == {new}
    trained = {"sample_plan", "tokenizer", "prior_model", "reference/conditional_model"}
    assert not trained & made.keys()
    assert made["reference/cutoff_confidence"] == {None}  # and no second conditional

    before = len(movable.ledger())
    touch(tmp_path / "corpus", 2)
    assert movable.run(monkeypatch) is None
    assert set(made_since(movable, before)) == {"raw_corpus"}


def shown_examples(monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """Return a list that the next report adds its examples to."""
    shown: list[Example] = []
    monkeypatch.setattr(html, "html", lambda _, found: shown.extend(found[-1].examples) or "")
    return shown


def check_examples(project: Project, shown: list[Example], labels: str) -> None:
    """Check that the losses of the tokens shown add up to each sequence's color."""
    store = ArtifactStore(home=str(project.home.root))
    encoder = Encoder(store.current("tokenizer").path)
    assert len(shown) == 5 * len({example.place for example in shown}) == 30
    for example in shown:
        difference = example.conditional.astype(np.float64) - example.prior
        assert np.nanmean(difference) == pytest.approx(example.color, abs=1e-4)
        tokens = open_tokens(store.current("corpus_tokens", example.shard).path)[example.position]
        closed = (tokens[:-1] == encoder.end_of_text).sum()
        assert np.isnan(difference).sum() == 1 + (closed if labels == "within_documents" else 0)
        decoded = encoder.decode(t for t in tokens if t != encoder.end_of_text)
        assert "".join(example.texts) == decoded


def test_the_losses_of_the_tokens_shown_make_up_their_color(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_of(finished, tmp_path)
    shown = shown_examples(monkeypatch)
    shutil.rmtree(project.home.artifacts / "reference" / "report")
    project.materialize(monkeypatch, ["reference/report"])
    check_examples(project, shown, "all")


def test_other_labels_cost_the_scoring_alone(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_of(finished, tmp_path)
    project.facts = {**finished.facts, "scoring": {"labels": "within_documents"}}
    project.write()
    before = len(project.ledger())
    shown = shown_examples(monkeypatch)
    assert project.run(monkeypatch) is None
    check_examples(project, shown, "within_documents")
    made = made_since(project, before)
    assert {"prior_scores", "reference/conditional_scores", "score_tables"} <= made.keys()
    assert not {"corpus_tokens", "prior_model", "reference/conditional_model"} & made.keys()
    # What random chose has another color now, and is the same tokens.
    assert "reference/random/filtered_dataset" in made
    assert "reference/random/target_model" not in made
    with duckdb.connect(str(project.home.scores), read_only=True) as connection:
        (fewer,) = fetch_row(
            connection,
            "SELECT count(*) FROM losses JOIN sequences USING (shard, position) "
            "WHERE losses.n_tokens < sequences.n_tokens - 1",
        )
    assert fewer > 0


def test_another_home_that_was_killed_while_scoring_ends_the_same(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path, finished.facts)
    add = Tally.add
    finished_chunks: list[str] = []

    def dies(self: Tally, shard: str, node: str | None) -> None:
        """Called before a chunk is recorded."""
        if len(finished_chunks) == 2:
            raise KeyboardInterrupt
        add(self, shard, node)
        finished_chunks.append(shard)

    monkeypatch.setattr(Tally, "add", dies)
    assert project.run(monkeypatch) is not None
    monkeypatch.setattr(Tally, "add", add)
    before = len(project.ledger())
    assert project.run(monkeypatch) is None
    made = made_since(project, before)
    assert not set(finished_chunks) & made["prior_scores"]
    chunks = [(r["model"], r["chunk"]) for r in project.kernel_runs() if r["verb"] == "score"]
    assert len(chunks) == len(set(chunks))
    for arm in ("color_tau4", "random"):
        assert selection(project, arm).equals(selection(finished, arm))
    fingerprints, undisturbed = (
        {(e["asset"], e["partition"]): e["fingerprint"] for e in home.ledger()}
        for home in (project, finished)
    )
    differ = {asset for (asset, part), f in undisturbed.items() if fingerprints[asset, part] != f}
    assert differ == {"reference/report"}  # which says when, and where


def test_the_filter_finds_the_domain(finished: Project) -> None:
    with duckdb.connect(str(finished.home.results), read_only=True) as results:
        rows = dict(
            fetch(results, "SELECT metric, value FROM evaluations WHERE metric LIKE 'probe%'")
        )
    assert rows["probe_auc"] > 0.8
    assert rows["probe_recall"] > 0.5


def test_no_document_of_d_prior_or_the_domain_is_selected(finished: Project) -> None:
    store = ArtifactStore(home=str(finished.home.root))
    plan = store.current("sample_plan").path / "documents.parquet"
    left_out = set(pl.read_parquet(plan)["doc_id"])
    assert left_out
    with duckdb.connect(str(finished.home.scores), read_only=True) as scores:
        spans = {row[0] for row in fetch(scores, "SELECT DISTINCT doc_id FROM spans")}
    with duckdb.connect(str(finished.home.selections), read_only=True) as selected:
        reserved = fetch(selected, "SELECT count(*) FROM selections WHERE starts_with(shard, '_')")
    assert not spans & left_out
    assert reserved == [(0,)]


def test_target_models_see_the_tokens_that_the_recipe_gives(finished: Project) -> None:
    with duckdb.connect(str(finished.home.results), read_only=True) as results:
        tokens = fetch(
            results,
            "SELECT arm, seed, tokens FROM evaluations WHERE metric = 'held_out_loss' ORDER BY ALL",
        )
    assert tokens == [
        ("color_tau4", 1, 8_000),
        ("color_tau4", 2, 8_000),
        ("conditional_only_tau4", 1, 8_000),
        ("random", 1, 8_000),
        ("random", 1, 12_000),
        ("random", 2, 8_000),
        ("random", 2, 12_000),
    ]


def test_arms_start_from_the_same_weights_per_seed(finished: Project) -> None:
    store = ArtifactStore(home=str(finished.home.root))
    plan = finished.recipe.target
    vocab_size = store.current("tokenizer").facts["vocab_size"]
    for arm in ("color_tau4", "random"):
        rows = np.load(
            store.current(f"reference/{arm}/filtered_dataset").path / "tokens/tokens.npy"
        )
        for seed in (1, 2):
            # The first loss of the curve is that of a fresh model on the first batch.
            order = np.random.default_rng(seed).permutation(len(rows))
            batch = torch.from_numpy(rows[order[: plan.training.batch_sequences]].astype(np.int64))
            fresh = checkpoints.build(plan.model, vocab_size, rows.shape[1], seed)
            with torch.no_grad():
                expected = fresh(input_ids=batch, labels=batch).loss.item()
            target = store.current(f"reference/{arm}/target_model", f"seed_{seed}")
            curve = pl.read_parquet(target.path / "curve.parquet")
            assert curve["loss"][0] == pytest.approx(expected, abs=1e-5)


def test_scores_stay_joined_to_text_and_checkpoint(finished: Project) -> None:
    with ScoreStore(home=str(finished.home.root)).read() as scores:
        rows = fetch(
            scores,
            """
            SELECT d.source_file, d.source_line, d.extra, m.path, s.rank
            FROM selected.selections AS s
            JOIN selected.selection_versions AS v USING (selection)
            JOIN spans USING (shard, position)
            JOIN documents AS d USING (shard, doc_id)
            JOIN models AS m ON m.model = v.conditional
            WHERE v.arm = 'color_tau4' AND v.current
            ORDER BY s.rank LIMIT 5
            """,
        )
    assert len(rows) == 5
    for file, line, extra, checkpoint, _ in rows:
        text = Path(file).read_text().splitlines()[line - 1]
        assert json.loads(text)["url"] == json.loads(extra)["url"]
        assert (Path(checkpoint) / "model.safetensors").is_file()


def evaluate(check: dg.AssetChecksDefinition, project: Project) -> dg.AssetCheckResult:
    home = str(project.home.root)
    resources = {"artifacts": ArtifactStore(home=home), "score_store": ScoreStore(home=home)}
    wanted = {k: v for k, v in resources.items() if k in check.required_resource_keys}
    return check(**wanted)


def change_scores(project: Project, statement: str) -> None:
    with duckdb.connect(str(project.home.scores)) as connection:
        connection.execute(statement)


@pytest.mark.parametrize(
    ("statement", "failing"),
    [
        ("DELETE FROM losses WHERE position = 0", "scores_complete"),
        ("DELETE FROM paired_losses WHERE position = 0", "scores_complete"),
        ("UPDATE losses SET loss = 'nan' WHERE position = 0", "scores_complete"),
        ("INSERT INTO losses SELECT model, 'else', 0, 1, 1, 'x' FROM models", "scores_complete"),
        (
            "UPDATE paired_losses SET loss_conditional = loss_conditional + 10 "
            "WHERE shard = '_probe_reference'",
            "reference_below_corpus",
        ),
        (
            "UPDATE paired_losses SET loss_conditional = loss_conditional - 10 "
            "WHERE shard <> '_probe_reference'",
            "reference_below_corpus",
        ),
    ],
)
def test_checks_of_the_scores_can_fail(
    finished: Project, tmp_path: Path, statement: str, failing: str
) -> None:
    project = copy_of(finished, tmp_path)
    checks = {next(iter(c.check_keys)).name: c for c in score_checks(project.recipe)}
    assert evaluate(checks[failing], project).passed
    change_scores(project, statement)
    assert not evaluate(checks[failing], project).passed


def test_a_document_in_corpus_and_domain_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus", ["argparse", "ast"])
    facts = recipe_facts(tmp_path / "corpus")
    facts["domains"][0]["sources"].append(
        {"name": "copy", "files": str(tmp_path / "corpus" / "ast.jsonl")}
    )
    project = Project(tmp_path, facts)
    failure = project.run(monkeypatch)
    assert failure is not None
    assert failure.input_is_wrong
    assert "no_shared_documents" in failure.message
    assert "ast.jsonl line" in failure.message
    (check,) = corpus_checks(project.recipe)
    assert not evaluate(check, project).passed


def test_a_conditional_that_is_no_better_fails_the_check(finished: Project, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path)
    (check,) = auxiliary_checks(project.recipe)
    assert evaluate(check, project).passed
    ledger = project.home.ledger.read_text()
    loss = ArtifactStore(home=str(project.home.root)).current("reference/conditional_model")
    worse = loss.facts["prior_held_out_loss"] + 0.1
    project.home.ledger.write_text(ledger.replace(f"{loss.facts['held_out_loss']}", f"{worse}"))
    assert not evaluate(check, project).passed


def test_losses_in_the_table_are_the_models_losses(finished: Project) -> None:
    """From the published tables back to the checkpoint, by transformers' own loss."""
    import torch
    from transformers import AutoModelForCausalLM

    store = ArtifactStore(home=str(finished.home.root))
    shard = finished.home.shards()[0].name
    tokens = store.current("corpus_tokens", shard)
    sequences = np.load(tokens.path / "tokens.npy", mmap_mode="r")
    with duckdb.connect(str(finished.home.scores), read_only=True) as scores:
        for role in ("prior", "conditional"):
            path, loss = fetch_row(
                scores,
                "SELECT m.path, l.loss FROM losses AS l JOIN models AS m USING (model) "
                "WHERE m.role = ? AND l.shard = ? AND l.position = ?",
                [role, shard, 0],
            )
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
            ids = torch.from_numpy(sequences[0].astype("int64"))[None]
            assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(loss, abs=1e-5)
