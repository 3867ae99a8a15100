import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from colorfilter.config.recipe import Arm, Recipe
from tests.colorfilter.recipes import (
    MISSING,
    PIQA,
    VALID,
    changed,
    load_content,
    problem,
    with_tasks,
)


def test_a_valid_recipe_loads_with_its_values_and_defaults(tmp_path: Path) -> None:
    recipe = load_content(tmp_path, VALID)
    assert recipe.name == "mine"
    assert recipe.seed == 0
    assert recipe.scoring.precision == "float32"
    assert recipe.evaluation.random_multiples == [1.0, 1.5, 2.0]
    assert {d.name: d for d in recipe.domains}["books"].held_out == 0.15
    assert [a.name for a in recipe.arms] == ["color_tau8", "random"]
    assert recipe.arm("random").tau is None


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("colour", 1, "colour: unknown key"),
        ("corpus.sources.0.fils", "x", "corpus.sources.0.fils: unknown key"),
        ("prior.training.lerning_rate", 1, "prior.training.lerning_rate: unknown key"),
        ("target.training_tokens", MISSING, "target.training_tokens: missing"),
        ("domains.0.training", MISSING, "domains.0.training: missing"),
        ("domains.0.name", "forgotten", "domains.0.name: 'forgotten' is the name of an asset"),
        ("domains.0.name", "report", "domains.0.name: 'report' is the name of an asset"),
        ("sequence_length", MISSING, "sequence_length: missing"),
        ("arms.0.tau", 0.5, "arms.0.tau: "),
        ("arms.0.tau", MISSING, "arms.0: tau is required"),
        ("arms.1.tau", 8, "arms.1: tau is required"),
        ("arms.1.batch", 8, "arms.1: batch works with"),
        ("arms.0.seeds", [1, 1], "arms.0: seeds must differ"),
        ("arms.0.seeds", [], "arms.0.seeds: "),
        ("arms.0.method", "colour", "arms.0.method: "),
        ("arms.1.leaks", "drop", "arms.1.leaks: "),
        ("tokenizer.path", "gpt2", "tokenizer: give either vocab_size"),
        ("tokenizer.vocab_size", MISSING, "tokenizer: give either vocab_size"),
        ("tokenizer.vocab_size", 256, "tokenizer.vocab_size: "),
        ("prior.path", "EleutherAI/pythia-160m", "prior: give either model and training"),
        ("prior.model", MISSING, "prior: give either model and training"),
        ("prior.sample_chars", MISSING, "prior.sample_chars: "),
        ("prior.sample_chars", -1, "prior.sample_chars: "),
        ("domains.0.held_out", 1.0, "domains.0.held_out: "),
        ("domains.0.held_out", 0.8, "domains.0: held_out + probe"),
        ("evaluation.seeds", [], "evaluation.seeds: "),
        ("evaluation.seeds", [1, 1], "evaluation: seeds must differ"),
        ("evaluation.seeds", [-1], "evaluation.seeds.0: "),
        ("evaluation.random_multiples", [1.5, 2], "evaluation: random_multiples must start"),
        ("evaluation.random_multiples", [1, 3, 2], "evaluation: random_multiples must start"),
        ("target.training.schedule", "cosine", "target.training.schedule"),
        ("target.training.learning_rate", math.nan, "target.training.learning_rate: "),
        ("name", "Has Spaces", "name: "),
        ("scoring.precision", "fp8", "scoring.precision: "),
        ("arms", [], "arms: "),
        ("corpus.sources", [], "corpus.sources: "),
        ("domains.1", VALID["domains"][0], "domains: duplicate name books;"),
        ("arms.2", {"method": "color", "tau": 8.0}, "arms: duplicate name color_tau8;"),
        (
            "corpus.sources.1",
            {"name": "web", "files": "b"},
            "corpus: sources: duplicate name web;",
        ),
        (
            "domains.0.sources.1",
            {"name": "pages", "files": "b"},
            "domains.0: sources: duplicate name pages;",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_the_path_of_its_field(
    tmp_path: Path, path: str, value: object, where: str
) -> None:
    assert where in problem(tmp_path, changed(path, value))


def test_a_proxy_wants_to_know_how_the_prior_is_trained(tmp_path: Path) -> None:
    content = changed("prior", {"path": "EleutherAI/pythia-160m"})
    content["tokenizer"] = {"path": "EleutherAI/pythia-160m"}
    content["arms"].append({"method": "rho_down", "tau": 8})
    assert "arms: rho_down_tau8 trains a proxy" in problem(tmp_path, content)


def test_an_arm_may_have_seeds_of_its_own(tmp_path: Path) -> None:
    recipe = load_content(tmp_path, changed("arms.0.seeds", [7]))
    assert [recipe.seeds(arm) for arm in recipe.arms] == [[7], recipe.evaluation.seeds]


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (with_tasks(), "domains.0: give either sources (text) or tasks"),
        (with_tasks(PIQA, sources=VALID["domains"][0]["sources"]), "domains.0: give either"),
        (with_tasks({**PIQA, "name": "lambada"}), "domains.0.tasks.0.name: "),
        (with_tasks({"name": "piqa"}), "domains.0.tasks.0: give the task's files: train, test"),
        (with_tasks({**PIQA, "dev": "x"}), "domains.0.tasks.0.dev: unknown key"),
        (with_tasks(PIQA, PIQA), "domains.0: tasks: duplicate name piqa;"),
        (with_tasks({"name": "piqa", "train": "a"}), "domains.0: tasks: no task has a test file"),
        (with_tasks({"name": "piqa", "test": "a"}), "domains.0: tasks: no task has a train file"),
        (with_tasks(PIQA, test_items=1), "domains.0.test_items: "),
        (changed("domains.0.test_items", 9), "domains.0: test_items requires tasks"),
    ],
)
def test_a_wrong_domain_of_tasks_is_refused(
    tmp_path: Path, content: dict[str, Any], where: str
) -> None:
    assert where in problem(tmp_path, content)


def test_a_task_may_lack_one_of_its_files(tmp_path: Path) -> None:
    only = [{"name": "arc_easy", "train": "a"}, {"name": "boolq", "test": "b"}]
    arc, boolq = load_content(tmp_path, with_tasks(*only)).domains[0].tasks
    assert (arc.train, arc.source("test")) == (str(tmp_path / "a"), None)
    assert (boolq.source("train"), boolq.test) == (None, str(tmp_path / "b"))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize(
    "path", ["target.training.learning_rate", "target.training.weight_decay", "arms.0.tau"]
)
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, path: str, value: float) -> None:
    assert path in problem(tmp_path, changed(path, value))


@pytest.mark.parametrize("betas", [[1.5, 0.9], [0.9, 1.0], [-0.1, 0.9]])
def test_moment_decays_outside_0_to_1_are_refused(tmp_path: Path, betas: list[float]) -> None:
    assert "prior.training.betas" in problem(tmp_path, changed("prior.training.betas", betas))


@pytest.mark.parametrize("where", ["prior", "target"])
def test_sequences_longer_than_a_models_context_are_refused(tmp_path: Path, where: str) -> None:
    content = changed(f"{where}.model.config.max_position_embeddings", 64)
    message = problem(tmp_path, content)
    assert "sequence_length: 128" in message
    assert f"{where}.model.config.max_position_embeddings (64)" in message


def test_facts_are_plain_values_that_load_again(tmp_path: Path) -> None:
    recipe = load_content(tmp_path, VALID)
    assert Recipe.model_validate(recipe.facts()) == recipe
    assert yaml.safe_load(yaml.safe_dump(recipe.facts())) == recipe.facts()


@pytest.mark.parametrize("tau", [1, 2.5, 16, 1_000_000])
def test_an_arms_name_can_name_an_asset(tau: float) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_.]+", Arm(method="color", tau=tau).name)


def test_arms_with_cutoffs_are_each_choice_once(tmp_path: Path) -> None:
    color = {"method": "color", "tau": 8}
    arms = [color, {**color, "leaks": "keep"}, {**color, "batch": 4}, {"method": "random"}]
    recipe = load_content(tmp_path, changed("arms", arms))
    assert [a.name for a in recipe.arms_with_cutoffs()] == ["color_tau8", "color_tau8_batch4"]
    assert [a.name for a in recipe.arms_with_one_cutoff()] == ["color_tau8"]


def test_an_arm_that_keeps_leaks_is_an_arm_of_its_own_with_the_same_choice() -> None:
    for arm in (Arm(method="color", tau=8, batch=4), Arm(method="random")):
        keeps = Arm.model_validate({**arm.facts(), "leaks": "keep"})
        assert keeps.name == f"{arm.name}_leaks"
        assert keeps.choice() == arm.choice()
        assert keeps.facts() != arm.facts()
    assert Arm(method="color", tau=8).choice() != Arm(method="color", tau=4).choice()


@pytest.mark.parametrize(
    ("compute", "why"),
    [
        ({"address": "10.0.0.1:6379"}, "address requires backend: ray"),
        ({"devices_per_model": 2}, "devices_per_model requires backend: ray"),
        ({"backend": "ray", "storage": "shared"}, "an absolute folder or a URI"),
        ({"backend": "ray", "storage": "s3://"}, "an absolute folder or a URI"),
        ({"backend": "ray", "storage": "file:///pool"}, "an absolute folder or a URI"),
        ({"backend": "ray", "storage": "s3://me:secret@bucket"}, "must not contain credentials"),
        ({"backend": "ray", "storage": "s3://bucket?key=secret"}, "must not contain credentials"),
        ({"backend": "slurm"}, "'local' or 'ray'"),
    ],
)
def test_where_to_compute_is_checked_and_no_credential_is_repeated(
    tmp_path: Path, compute: dict[str, Any], why: str
) -> None:
    message = problem(tmp_path, {**VALID, "compute": compute})
    assert "compute" in message
    assert why in message
    assert "secret" not in message


def test_where_to_compute_is_in_no_key(tmp_path: Path) -> None:
    plain = load_content(tmp_path, VALID)
    compute = {"backend": "ray", "storage": "s3://bucket/pool", "workers": 4}
    there = load_content(tmp_path, {**VALID, "compute": compute})
    assert there.facts(without=("compute",)) == plain.facts()
