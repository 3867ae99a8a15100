"""Explanations of documents, sequences and datasets match the Parquet record."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest

from colorfilter.errors import InputError
from colorfilter.selection.sql import fetch_frame
from commands.explain.decisions import COLORS, Records
from commands.explain.documents import explain
from pipelines.settings import Job
from resources.artifacts import ArtifactStore
from resources.lineage import Lineage
from resources.score_store import ScoreStore
from tests.assets.results import places, run_select
from tests.conftest import Project, copy_of

ARM = "reference/color_tau4"


class Told(dict):
    """An object of the JSON, its values by attribute too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def told(value: Any) -> Any:
    if isinstance(value, dict):
        return Told({name: told(part) for name, part in value.items()})
    return [told(part) for part in value] if isinstance(value, list) else value


def explained(project: Project, what: str) -> Told:
    home = str(project.home.root)
    artifacts = ArtifactStore(home=home)
    with ScoreStore(home=home).read() as connection:
        found = explain(Records(artifacts, Lineage(artifacts), connection), what)
    json.dumps(found)  # it is what `--json` prints
    return told(found)


def document(project: Project, what: str) -> Told:
    found = explained(project, what)
    assert found.sequence is None
    assert found.document is not None
    return found.document


def sequence(project: Project, shard: str, position: int) -> Told:
    found = explained(project, f"{shard}:{position}")
    assert found.document is None
    assert found.sequence is not None
    return found.sequence


def dataset(project: Project, name: str = ARM) -> Told:
    found = explained(project, name)
    assert found.now.name == name
    return found


def stand(facts: Told, arm: str = "color_tau4") -> Told:
    (found,) = [s for s in facts.standing.selections if s.arm == arm and s.current]
    return found


def current(project: Project, asset: str, partition: str | None = None) -> Path:
    return ArtifactStore(home=str(project.home.root)).current(asset, partition).path


def corpus(project: Project) -> pl.DataFrame:
    """Losses of the corpus as recorded, in the order of color: the candidates alone."""
    tables = []
    seen: set[str] = set()
    for shard in sorted(s.name for s in project.home.shards()):
        packed = current(project, "corpus_tokens", shard)
        texts = pl.read_parquet(current(project, "raw_corpus", shard) / "documents.parquet")
        copies = texts.filter(pl.col("sha256").is_in(list(seen)))["doc_id"].to_list()
        seen |= set(texts["sha256"])
        spans = pl.read_parquet(packed / "spans.parquet")
        carrying = spans.filter(pl.col("doc_id").is_in(copies))["position"].unique().to_list()
        losses = [
            pl.read_parquet(list(current(project, asset, shard).glob("losses-*.parquet"))).select(
                "position", pl.col("loss").alias(name), pl.col("precision").alias(f"by_{name}")
            )
            for asset, name in (
                ("prior_scores", "prior"),
                ("reference/conditional_scores", "conditional"),
            )
        ]
        whole = pl.read_parquet(packed / "sequences.parquet").filter(
            pl.col("n_tokens") == 32, ~pl.col("position").is_in(carrying)
        )
        table = whole.join(losses[0], on="position").join(losses[1], on="position")
        tables.append(table.with_columns(shard=pl.lit(shard)))
    color = pl.col("conditional").cast(pl.Float64) - pl.col("prior").cast(pl.Float64)
    return pl.concat(tables).with_columns(color=color).sort("color", "shard", "position")


def kept(project: Project, name: str = ARM) -> pl.DataFrame:
    folder = current(project, f"{name}/filtered_dataset")
    return pl.read_parquet(folder / "tokens" / "sequences.parquet")


def test_a_selected_sequence_is_followed_from_its_file_to_the_models_trained_on_it(
    finished: Project,
) -> None:
    known = corpus(finished)
    rows = kept(finished)
    first = rows.filter(pl.col("row") == 7).to_dicts()[0]
    facts = sequence(finished, first["shard"], first["position"])
    (row,) = (
        known.with_row_index("before")
        .filter(pl.col("shard") == first["shard"], pl.col("position") == first["position"])
        .to_dicts()
    )

    (score,) = facts.standing.scores
    assert (score.loss_prior, score.loss_conditional) == (row["prior"], row["conditional"])
    assert (score.precision_prior, score.precision_conditional) == ("float32", "float32")
    assert score.color == row["color"]
    assert (score.rank, score.candidates) == (row["before"] + 1, len(known))
    assert score.percentile == pytest.approx(100 * (row["before"] + 1) / len(known))

    found = stand(facts)
    selection = pl.read_parquet(current(finished, f"{ARM}/selection") / "selection.parquet")
    assert found.decision == "selected"
    assert found.rank == row["before"] + 1 == first["rank"]
    assert found.cutoff == selection["score"].max()
    assert found.margin == row["color"] - selection["score"].max()
    assert found.margin <= 0

    (made,) = found.datasets
    assert (made.row, made.left_out) == (7, None)
    assert [t.seed for t in made.trained] == [1, 2]
    for trained in made.trained:
        order = np.random.default_rng(trained.seed).permutation(len(rows)).tolist()
        assert trained.place == order.index(7) + 1
        assert trained.reached == {8_000: 7 in order[: 8_000 // 32]}
        assert Path(trained.path) == current(
            finished, f"{ARM}/target_model", f"seed_{trained.seed}"
        )

    shard = current(finished, "raw_corpus", first["shard"])
    texts = pl.read_parquet(shard / "documents.parquet")
    files = pl.read_parquet(shard / "files.parquet")
    assert sum(s.n_tokens for s in facts.spans) == facts.n_tokens == 32
    for span in facts.spans:
        (source,) = texts.filter(pl.col("doc_id") == span.doc_id).to_dicts()
        assert span.text == source["text"][span.char_start : span.char_end][:200]
        assert (span.source_file, span.source_line) == (
            source["source_file"],
            source["source_line"],
        )
        assert span.file_sha256 in set(files.filter(pl.col("uri") == span.source_file)["sha256"])


@pytest.mark.parametrize("candidates", [True, False])
def test_ranks_are_places_in_the_order_of_selection(candidates: bool) -> None:
    """Of several sequences at once, in two domains, with ties and without any candidate."""
    random = np.random.default_rng(0)
    places = [(shard, position) for shard in ("_probe", "a", "b") for position in range(20)]
    rows = [(d, *p, float(random.choice([-0.5, 0, 0.25]))) for d in ("one", "two") for p in places]
    excluded = {p for p in places if not candidates or random.random() < 0.2}
    with duckdb.connect() as connection:
        connection.execute(
            """
            CREATE TABLE color(domain VARCHAR, shard VARCHAR, position BIGINT, color DOUBLE,
                loss_prior FLOAT, loss_conditional FLOAT);
            CREATE TABLE excluded(shard VARCHAR, position BIGINT);
            CREATE TABLE models AS FROM (VALUES ('p', 'prior', NULL, true),
                ('c', 'conditional', 'one', true), ('d', 'conditional', 'two', true))
                AS models(model, role, domain, current);
            """
        )
        connection.executemany("INSERT INTO color VALUES (?, ?, ?, ?, 0, 0)", rows)
        connection.executemany("INSERT INTO excluded VALUES (?, ?)", list(excluded))
        connection.execute(
            "CREATE TABLE losses AS SELECT DISTINCT model, shard, position, '' AS precision "
            "FROM color, models"
        )
        for shard in ("_probe", "a", "b"):
            wanted = {"shard": shard, "positions": [0, 3, 19, 20], "candidates": 1}
            found = fetch_frame(connection, COLORS, wanted).select("domain", "position", "rank")
            assert sorted(found.rows()) == [
                (
                    domain,
                    position,
                    1
                    + sum(
                        (other, *place) < (color, shard, position)
                        for d, *place, other in rows
                        if d == domain and place[0] != "_probe" and tuple(place) not in excluded
                    ),
                )
                for domain, of, position, color in rows
                if of == shard and position in wanted["positions"]
            ]


def test_of_random_every_end_point_is_told_by_itself(finished: Project) -> None:
    rows = kept(finished, "reference/random")
    seen = set()
    for row in rows.head(40).to_dicts():
        found = stand(sequence(finished, row["shard"], row["position"]), "random")
        assert found.decision == "selected"
        for trained in found.datasets[-1].trained:
            order = np.random.default_rng(trained.seed).permutation(len(rows))
            ends = {250 * 32: order[:250], 375 * 32: order[:375]}
            assert trained.reached == {t: row["row"] in end.tolist() for t, end in ends.items()}
            seen.add(tuple(trained.reached.values()))
    assert {(True, True), (False, True)} <= seen


def test_a_refused_sequence_is_told_by_how_much(finished: Project) -> None:
    known = corpus(finished)
    row = known.row(len(known) // 2, named=True)
    facts = sequence(finished, row["shard"], row["position"])
    assert facts.standing.scores[0].rank == len(known) // 2 + 1
    for arm, score in (("color_tau4", "color"), ("conditional_only_tau4", "conditional")):
        found = stand(facts, arm)
        folder = current(finished, f"reference/{arm}/selection")
        cutoff = pl.read_parquet(folder / "selection.parquet")["score"].max()
        assert found.score == row[score]
        assert found.decision == ("refused" if row[score] > cutoff else "selected")
        assert found.margin == row[score] - cutoff
    assert stand(facts).decision == "refused"
    assert stand(facts).datasets == []


def test_the_lot_of_a_sequence_that_random_passed_over_lies_above_its_cutoff(
    finished: Project,
) -> None:
    drawn = pl.read_parquet(current(finished, "reference/random/selection") / "selection.parquet")
    others = corpus(finished).join(drawn, on=["shard", "position"], how="anti")
    for row in others.head(5).to_dicts():
        found = stand(sequence(finished, row["shard"], row["position"]), "random")
        assert found.decision == "refused"
        assert found.margin is not None
        assert found.margin > 0


def test_a_line_of_a_domain_names_its_documents(finished: Project) -> None:
    """Several here, for the domain's text is one file, cut into documents at its first line."""
    text = current(finished, "reference/domain_text") / "held_out" / "documents.parquet"
    rows = pl.read_parquet(text)
    place = f"{rows['source_file'][0]}:{rows['source_line'][0]}"
    with pytest.raises(InputError, match="several documents match") as refused:
        explained(finished, place)
    told_ids = set(re.findall(r"[0-9a-f]{20}", str(refused.value)))
    domain = pl.scan_parquet(text.parents[1] / "*" / "documents.parquet").collect()
    assert told_ids
    assert told_ids <= set(domain["doc_id"])


def test_the_models_are_followed_to_what_they_were_trained_on(finished: Project) -> None:
    shard = finished.home.shards()[0].name
    prior, conditional = explained(finished, f"{shard}:0").models
    artifacts = ArtifactStore(home=str(finished.home.root))
    plan, packed = artifacts.current("sample_plan"), artifacts.current("reference/domain_tokens")
    assert prior.role == "prior"
    assert prior.trained_on["what"] == "D_prior"
    sample = pl.read_parquet(plan.path / "documents.parquet")
    assert prior.trained_on["documents"] == len(sample)
    assert prior.trained_on["sample_plan"] == plan.fingerprint
    assert conditional.trained_on["what"] == "D_down"
    assert conditional.trained_on["tokens"] == packed.facts["down_tokens"]
    text = current(finished, "reference/domain_text") / "down" / "documents.parquet"
    assert conditional.trained_on["documents"] == len(pl.read_parquet(text))
    assert conditional.trained_on["started_from"] == prior.fingerprint
    for model in (prior, conditional):
        assert (Path(model.path) / "model.safetensors").exists()


def test_the_probe_is_scored_and_never_selected(finished: Project) -> None:
    facts = sequence(finished, "_probe_reference", 0)
    assert {s.decision for s in facts.standing.selections} == {"never"}
    assert "probe" in str(stand(facts).why)
    (score,) = facts.standing.scores
    below = corpus(finished).filter(pl.col("color") < score.color)
    assert score.rank == len(below) + 1
    text = document(finished, facts.spans[0].doc_id)
    assert text.became.startswith("the probe")
    assert text.file_sha256 is not None


def test_a_document_of_d_prior_is_explained_as_left_out(finished: Project) -> None:
    sample = pl.read_parquet(current(finished, "sample_plan") / "documents.parquet")
    row = sample.row(3, named=True)
    found = document(finished, row["doc_id"][:12])
    assert found.became.startswith("D_prior")
    assert (found.doc_id, found.sequences) == (row["doc_id"], [])
    assert found.text == row["text"][:200]
    line = f"{Path(row['source_file']).name}:{row['source_line']}"
    assert document(finished, line) == found


def test_text_that_only_the_domain_has_is_told_as_such(finished: Project) -> None:
    for split, words in (("down", "D_down"), ("held_out", "held-out")):
        path = current(finished, "reference/domain_text") / split / "documents.parquet"
        row = pl.read_parquet(path).row(0, named=True)
        found = document(finished, row["doc_id"])
        assert words in found.became
        assert found.sha256 == row["sha256"]


def test_a_documents_sequences_are_told_together_as_each_by_itself(finished: Project) -> None:
    selected = kept(finished).select("shard", "position")
    shard = selected["shard"][0]
    spans = pl.read_parquet(current(finished, "corpus_tokens", shard) / "spans.parquet")
    of_selected = spans.join(selected.filter(shard=shard), on="position", how="semi")["doc_id"]
    documents = spans.filter(pl.col("doc_id").is_in(of_selected.to_list())).group_by("doc_id")
    several = documents.agg(pl.col("position").unique().sort()).filter(
        pl.col("position").list.len().is_between(2, 12)
    )
    doc_id, mine = several.sort("doc_id").row(-1)
    found = document(finished, doc_id)
    assert [s.position for s in found.sequences] == mine
    assert found.sequences == [sequence(finished, shard, p) for p in mine]


def test_a_padded_sequence_is_told_to_be_excluded(finished: Project) -> None:
    for shard in finished.home.shards():
        packed = current(finished, "corpus_tokens", shard.name) / "sequences.parquet"
        last = pl.read_parquet(packed).row(-1, named=True)
        if last["n_tokens"] < 32:
            facts = sequence(finished, shard.name, last["position"])
            assert facts.standing.excluded == "padded"
            assert stand(facts).decision == "excluded"
            return
    raise AssertionError("no shard ends in a padded sequence")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("0123456789abcdef0123", "no document in the corpus or a domain has it"),
        ("abc", "at least 6 of its hex digits"),
        ("nowhere-0123456789:3", "not found, neither in a shard nor in a raw file"),
        ("_probe_reference:100000", "no such position; the shard has positions 0 to "),
        ("reference/color_tau99", "give one of reference/color_tau4, reference/conditional"),
    ],
)
def test_what_names_nothing_is_refused_in_a_line(finished: Project, what: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        explained(finished, what)
    assert "\n" not in str(refused.value)


def test_dagsters_history_is_not_needed(finished: Project, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path)
    row = kept(finished).row(0, named=True)
    for folder in project.home.dagster.iterdir():
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    here = stand(sequence(project, row["shard"], row["position"]))
    there = stand(sequence(finished, row["shard"], row["position"]))
    assert (here.decision, here.rank, here.margin) == (there.decision, there.rank, there.margin)
    assert [t.reached for d in here.datasets for t in d.trained] == [
        t.reached for d in there.datasets for t in d.trained
    ]
    assert dataset(project).last is None


def test_the_first_dataset_says_what_it_is_made_of(finished: Project) -> None:
    found = dataset(finished)
    assert found.last is None
    assert (found.entering, found.leaving) == ([], [])
    assert found.now.sequences == len(kept(finished))
    assert found.now.candidates == len(corpus(finished))
    assert found.now.shards == len(finished.home.shards())
    assert found.now.recipe["tau"] == 4


def test_another_tau_is_told_with_its_old_and_new_value(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_of(finished, tmp_path)
    assert isinstance(run_select(project, monkeypatch, tau=6), dict)
    found = dataset(project, "reference/color_tau6")
    assert found.last is not None
    assert found.last.name == ARM
    assert [(d.was, d.now) for d in found.recipe if d.name == "tau"] == [(4, 6)]
    assert found.inputs == []
    now, last = places(kept(project, "reference/color_tau6")), places(kept(project))
    assert found.both == len(now & last)
    assert sum(c.sequences for c in found.entering) == len(now - last)
    (change,) = found.leaving
    assert (change.why, change.sequences) == ("tau 4.0 -> 6.0", len(last - now))
    assert {(e.shard, e.position) for e in found.examples_leaving} <= last - now
    assert len(found.examples_leaving) == 5


def arrive(project: Project) -> None:
    """A file of a copy, a document that quotes held-out text, the same again, and no JSON."""
    (path,) = project.root.glob("corpus/ast.jsonl")
    sample = pl.read_parquet(current(project, "sample_plan") / "documents.parquet")["text"]
    lines = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    copy = next(t for t in lines if len(t) > 600 and t not in set(sample))
    text = current(project, "reference/domain_text") / "held_out" / "documents.parquet"
    quote = f"As it is said elsewhere:\n{pl.read_parquet(text).row(0, named=True)['text']}"
    rows = [json.dumps({"text": t}) for t in (copy, quote, quote)]
    (project.root / "corpus" / "zz.jsonl").write_text("\n".join([*rows, "no JSON"]) + "\n")


def test_what_arrives_is_told_with_copies_leaks_and_rejects(
    movable: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kept(movable)
    selected = current(movable, f"{ARM}/selection")
    was_selected = places(pl.read_parquet(selected / "selection.parquet"))
    arrive(movable)
    assert movable.run(monkeypatch, Job.REFRESH) is None
    (new,) = [s.name for s in movable.home.shards() if s.files[0].path.endswith("zz.jsonl")]

    assert document(movable, "zz.jsonl:4").became == "rejected: not JSON"
    again, quoting = document(movable, "zz.jsonl:3"), document(movable, "zz.jsonl:2")
    assert again.became.startswith("a duplicate of a document of its own shard")
    assert str(quoting.doc_id) in again.became
    assert (again.doc_id, again.text) == (None, quoting.text)

    one = document(movable, "zz.jsonl:1")
    (other,) = one.copies
    pair = sorted([one, document(movable, other["doc_id"])], key=lambda d: str(d.shard))
    assert "a copy of a document of" not in pair[0].became
    assert f"a copy of a document of {pair[0].shard}" in pair[1].became
    assert {stand(s).decision for s in pair[1].sequences} == {"excluded"}

    leaking = [s for s in quoting.sequences if stand(s).decision == "selected"]
    left_out = [stand(s).datasets[-1].left_out for s in leaking]
    assert any("quotes held-out text of" in str(words) for words in left_out)
    assert [d.row for s in leaking for d in stand(s).datasets if d.left_out] == [None] * sum(
        words is not None for words in left_out
    )
    older = [s for s in quoting.sequences[0].standing.selections if not s.current]
    assert {s.decision for s in older} == {"not there"}

    found = dataset(movable)
    assert found.last is not None
    assert [d.name for d in found.inputs] == [f"corpus_tokens[{new}]"]
    assert found.recipe == []
    now, last = places(kept(movable)), places(before)
    entering, leaving = now - last, last - now
    assert sum(c.sequences for c in found.entering) == len(entering)
    assert sum(c.sequences for c in found.leaving) == len(leaving)
    by_why = {c.why: c.sequences for c in found.entering}
    assert by_why.get("new data", 0) == len({p for p in entering if p[0] == new})
    assert found.both == len(now & last)

    # The last dataset's folder may be gone: its selection is still in the tables.
    shutil.rmtree(movable.home.root / found.last.path)
    shutil.rmtree(selected)
    pruned = dataset(movable)
    assert pruned.last is not None
    assert not pruned.last.stands
    assert pruned.both >= found.both
    assert pruned.both <= len(now & was_selected)


@pytest.mark.slow
def test_other_models_are_told_as_the_cause_and_a_new_sample_as_other_sequences(
    movable: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kept(movable)
    row = before.row(0, named=True)
    movable.facts["domains"][0]["training"] = {"learning_rate": 2e-3, "batch_sequences": 64}
    movable.facts["target"]["training_tokens"] = 800  # no target model is looked at
    movable.write()
    assert movable.run(monkeypatch) is None
    found = dataset(movable)
    assert [d.name for d in found.inputs] == ["reference/conditional_model"]
    now, last = places(kept(movable)), places(before)
    assert found.both == len(now & last)
    for changes, moved in ((found.entering, now - last), (found.leaving, last - now)):
        by_why = {c.why: c.sequences for c in changes}
        assert sum(by_why.values()) == len(moved)
        assert by_why["another conditional"] > len(moved) / 2
    facts = sequence(movable, row["shard"], row["position"])
    (old,) = [s for s in facts.standing.selections if s.arm == "color_tau4" and not s.current]
    assert (old.decision, old.score) == ("selected", row["score"])
    refused = sequence(movable, *next(iter(now - last)))
    (old,) = [s for s in refused.standing.selections if s.arm == "color_tau4" and not s.current]
    assert (old.decision, old.score) == ("refused", None)
    assert "no longer in the tables" in str(old.why)

    movable.facts["prior"] = {**movable.facts["prior"], "sample_chars": 20_000}
    movable.write()
    assert movable.run(monkeypatch, Job.RETRAIN) is None
    found = dataset(movable)
    packed = [f"corpus_tokens[{s.name}]" for s in movable.home.shards()]
    models = ["prior_model", "reference/conditional_model"]
    assert [d.name for d in found.inputs] == [*packed, *models]
    assert {c.why for c in found.entering} == {"its shard was packed anew"}
    assert found.both == 0
    facts = sequence(movable, row["shard"], 0)
    older = [s for s in facts.standing.selections if not s.current]
    assert {s.why for s in older} == {"its shard was packed otherwise then"}
