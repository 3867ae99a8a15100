"""Cost: the paper's figures, work shared by arms is counted once, FLOPs match torch's counter."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from colorfilter import cost
from colorfilter.config.recipe import Arm, Recipe
from colorfilter.cost import METHODS, Measured, Sizes, Text, flops_per_token, paper_forwards
from colorfilter.errors import InputError
from tests.conftest import recipe_facts

B = 1e9
SIZES = Sizes(sample=50_000, corpus=64_000, auxiliary=2.0, target=6.0)


def recipe(**changes: Any) -> Recipe:
    """Sequences of 32, 8,000 tokens of training each, two seeds; see tests/conftest.py."""
    return Recipe.model_validate({**recipe_facts(Path("/nowhere")), **changes})


def with_arms(made: Recipe, *arms: Arm) -> Recipe:
    return made.model_copy(update={"arms": list(arms)})


def forwards(made: Recipe, sizes: Sizes) -> dict[str, float | None]:
    return {stage.asset: stage.forwards for stage in cost.predict(made, sizes)}


def test_it_is_imported_without_torch() -> None:
    code = (
        "import sys, colorfilter.cost; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize(
    ("method", "m", "n", "tau", "expected"),
    [
        ("color", 3.1 * B, 1.5 * B, 16, 82.05 * B),  # the paper's Books
        ("color", 3.1 * B, 3 * B, 16, 154.8 * B),  # its tasks
        ("random", 3.1 * B, 25 * B, None, 412.5 * B),  # and what random needs to match them
        ("conditional_only", 3.1 * B, 1.5 * B, 16, 58.05 * B),
        ("rho_down", 3.1 * B, 1.5 * B, 16, 75.75 * B),
        ("rho_down_prior", 3.1 * B, 1.5 * B, 16, 85.05 * B),
        ("dsir", 3.1 * B, 25 * B, None, 412.5 * B),
        ("full", 3.1 * B, 25 * B, None, 412.5 * B),
    ],
)
def test_the_papers_values(
    method: str, m: float, n: float, tau: float | None, expected: float
) -> None:
    assert paper_forwards(method, m, n, tau, 5.5) == pytest.approx(expected, rel=1e-12)


def test_every_method_of_the_recipe_has_a_cost() -> None:
    assert set(get_args(Arm.model_fields["method"].annotation)) == METHODS.keys()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt_neox", {"num_attention_heads": 4, "intermediate_size": 96}),
        ("gpt_neox", {"num_attention_heads": 4, "tie_word_embeddings": True}),
        (
            "llama",
            {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16},
        ),
        ("gpt2", {"n_head": 4}),
    ],
)
def test_flops_are_those_that_torch_counts(kind: str, settings: dict[str, Any]) -> None:
    own = {"bos_token_id": None, "eos_token_id": None, "vocab_size": 300}
    config = AutoConfig.for_model(
        kind, hidden_size=64, num_hidden_layers=3, max_position_embeddings=32, **settings, **own
    )
    length = 32
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.arange(length)[None])
    # Eager attention multiplies whole rows; causal is half of each.
    by_kind = counter.get_flop_counts()["Global"]
    attention = sum(n for name, n in by_kind.items() if "bmm" in str(name))
    if kind == "llama":  # its rotary positions are a product of one column
        attention -= 2 * length * config.head_dim // 2
    expected = (counter.get_total_flops() - attention / 2) / length
    assert flops_per_token(config, length) == pytest.approx(expected, rel=1e-3)


def test_no_weights_are_made() -> None:
    """640 GB of them would not fit."""
    config = AutoConfig.for_model(
        "gpt_neox",
        hidden_size=16_384,
        num_hidden_layers=50,
        num_attention_heads=128,
        intermediate_size=65_536,
    )
    weights = 50 * 12 * 16_384**2 + config.vocab_size * 16_384
    assert flops_per_token(config, 512) == pytest.approx(2 * weights + 50 * 2 * 512 * 16_384)


def test_an_arm_alone_costs_what_the_paper_says() -> None:
    alone = recipe(evaluation={"seeds": [1], "random_multiples": [1]})
    made = forwards(with_arms(alone, Arm(method="color", tau=8)), SIZES)
    known = sum(f for f in made.values() if f is not None)
    assert known == paper_forwards("color", 50_000, 8_000, 8, 3)


def test_what_arms_share_is_counted_once() -> None:
    facts = recipe_facts(Path("/nowhere"))
    made = with_arms(
        recipe(domains=[*facts["domains"], {**facts["domains"][0], "name": "other"}]),
        Arm(method="color", tau=4),
        Arm(method="color", tau=8),
        Arm(method="random"),
    )
    f = forwards(made, SIZES)
    assert f["prior_model"] == 3 * 50_000
    assert f["prior_scores"] == 64_000
    for domain in ("reference", "other"):
        assert f[f"{domain}/conditional_scores"] == 64_000
        assert f[f"{domain}/color_tau4/target_model"] == 2 * 3 * 8_000 * 3
        # Random to 250 and 375 sequences, 32 and 47 steps of 8, the last fifth of each a branch.
        trunk, branches = 37 * 8, (250 - 25 * 8) + (375 - 37 * 8)
        assert f[f"{domain}/random/target_model"] == 2 * 3 * (trunk + branches) * 32 * 3
    assert len(f) == 2 + 2 * (1 + 1 + 1 + 3 + 1)


def test_text_of_the_domain_counts_where_its_size_is_given() -> None:
    made = with_arms(recipe(), Arm(method="color", tau=4), Arm(method="random"))
    known = replace(SIZES, domains={"reference": Text(down=8_000, held_out=1_000, probe=1_000)})
    unknown, f = forwards(made, SIZES), forwards(made, known)
    assert unknown["reference/conditional_model"] is None
    assert unknown["reference/*/evaluation"] is None
    # Trained, and compared with the prior on held-out text.
    assert f["reference/conditional_model"] == pytest.approx(3 * 8_000 + 2 * 1_000)
    assert f["prior_scores"] == f["reference/conditional_scores"] == 64_000 + 1_000  # the probe
    # Three checkpoints of each seed, by the target model.
    assert f["reference/*/evaluation"] == pytest.approx(2 * 3 * 1_000 * 3)
    # A second conditional scores a tenth of a small corpus.
    assert f["reference/cutoff_confidence"] == pytest.approx(3 * 8_000 + 200 * 32)


def test_fine_tuning_counts_where_it_is_asked_for() -> None:
    known = replace(SIZES, domains={"reference": Text(down=8_000, held_out=1_000, probe=1_000)})
    tuned = recipe(
        evaluation={"seeds": [1, 2], "random_multiples": [1], "finetune": True},
        arms=[{"method": "random"}],
    )
    f = forwards(tuned, known)
    assert f["reference/random/finetuned_model"] == 2 * 3 * 8_000 * 3
    assert f["reference/*/evaluation"] == pytest.approx(2 * 2 * 1_000 * 3)
    assert "reference/cutoff_confidence" not in f


def test_every_method_in_one_recipe() -> None:
    arms = [
        Arm(method=method, tau=4 if parts.scores else None, seeds=[1] if method == "full" else None)
        for method, parts in METHODS.items()
    ]
    made = with_arms(recipe(), *arms)
    f = forwards(made, SIZES)
    assert f["reference/domain_only_scores"] == 64_000
    assert "reference/domain_only_model" in f
    for method in ("rho_down", "rho_down_prior"):
        chosen = 8_000 + 12 * 32  # a twentieth more than training needs
        assert f[f"reference/{method}_tau4/selection"] == pytest.approx((4 + 3) * chosen)
    assert f["reference/dsir/target_model"] == 2 * 3 * 8_000 * 3
    # One seed, to 250 and 2,000 sequences: a trunk of 200 steps, branches from 25 and 200.
    assert f["reference/full/target_model"] == 3 * (200 * 8 + (250 - 25 * 8) + 50 * 8) * 32 * 3
    ends = [(n, f) for name, n, f in cost.arm_forwards(made, SIZES) if name == "full"]
    assert ends == [(8_000, 3 * 8_000 * 3), (64_000, 3 * 64_000 * 3)]


def test_no_domain_only_model_where_nothing_asks_for_it() -> None:
    made = with_arms(recipe(), Arm(method="rho_down_prior", tau=4))
    assert not [name for name in forwards(made, SIZES) if "domain_only" in name]


def test_sizes_come_from_the_recipe() -> None:
    sizes = cost.sizes_of(recipe())
    assert sizes.sample == round(60_000 / 4.5)
    assert sizes.corpus == 4 * 8_000
    assert not sizes.domains
    assert sizes.ratio == 1
    words = " ".join(sizes.assumed)
    assert "4.5 characters" in words
    assert "32,000" in words
    assert "vocabulary of" not in words


def test_random_may_need_the_larger_corpus() -> None:
    evaluation = {"seeds": [1], "random_multiples": [1, 10]}
    assert cost.sizes_of(recipe(evaluation=evaluation)).corpus == 80_000


def test_a_corpus_that_does_not_suffice_is_refused() -> None:
    assert cost.sizes_of(recipe(), corpus_tokens=32_000).corpus == 32_000
    with pytest.raises(InputError, match=r"--corpus-tokens: 31,999 are too few.*32,000"):
        cost.sizes_of(recipe(), corpus_tokens=31_999)


def test_a_domain_is_divided_as_the_recipe_says() -> None:
    sizes = cost.sizes_of(recipe(), domain_tokens=1_000)
    assert sizes.domains == {"reference": Text(down=800, held_out=100, probe=100)}


def test_all_items_of_tasks_but_the_probe_are_learnt_from() -> None:
    task = {"name": "piqa", "train": "train.jsonl", "test": "test.jsonl"}
    facts = recipe_facts(Path("/nowhere"))
    training = facts["domains"][0]["training"]
    domain = {"name": "quiz", "tasks": [task], "probe": 0.1, "training": training}
    sizes = cost.sizes_of(recipe(domains=[domain]), domain_tokens=1_000)
    assert sizes.domains == {"quiz": Text(down=900, held_out=0, probe=100)}


def test_a_domain_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="--domain-tokens"):
        cost.sizes_of(recipe(), domain_tokens=0)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"type": "gpt_neox", "config": {"hidden": 1}}, r"config\.hidden: not a setting"),
        ({"type": "nothing", "config": {}}, "model of type nothing"),
        ({"type": "t5", "config": {}}, "model of type t5"),
    ],
)
def test_a_model_that_cannot_be_is_refused(model: dict[str, Any], words: str) -> None:
    facts = recipe_facts(Path("/nowhere"))
    with pytest.raises(InputError, match=words):
        cost.sizes_of(recipe(target={**facts["target"], "model": model}))


def test_a_given_prior_counts_by_its_configuration(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt_neox", vocab_size=1_000, hidden_size=64, num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    made = recipe(prior={"path": str(tmp_path)}, tokenizer={"path": "some/tokenizer"})
    sizes = cost.sizes_of(made)
    assert sizes.sample == 0
    assert sizes.auxiliary == flops_per_token(config, 32)
    # The target, hidden 16, has the given model's vocabulary.
    assert sizes.target == 2 * (16 * 1_000 + 4 * 16 * 16 + 2 * 16 * 32) + 2 * 32 * 16
    assert "prior_model" not in forwards(made, sizes)


def test_a_prior_that_is_not_on_this_disk_is_assumed() -> None:
    made = recipe(prior={"path": "nobody/has-this"}, tokenizer={"path": "nobody/has-this"})
    sizes = cost.sizes_of(made)
    assert sizes.ratio == 1
    words = " ".join(sizes.assumed)
    assert "nobody/has-this is not on this disk" in words
    assert "50,304" in words


def test_rates_are_flops_by_seconds_of_each_verb() -> None:
    stages = cost.predict(recipe(), SIZES)
    measured = {
        "prior_model": Measured(1_000, 2.0),
        "reference/random/target_model": Measured(1_000, 4.0),
        "prior_scores": Measured(500, 0.5),
        "unforeseen": Measured(10**9, 1.0),
    }
    assert cost.rates(stages, measured, SIZES.auxiliary) == {
        "train": (3 * 1_000 * 2 + 3 * 1_000 * 6) / 6,
        "score": 500 * 2 / 0.5,
    }
    assert cost.rates(stages, {}, SIZES.auxiliary) == {}
