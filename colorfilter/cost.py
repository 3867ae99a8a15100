"""What an experiment costs, known before anything runs: model forwards and FLOPs.

The unit is the paper's (arXiv 2406.10670, compute cost): one forward of one token through the
auxiliary model; a backward counts as two. With m tokens of D_prior, n selected, and L the cost of a
forward of the target model in that unit, an arm by itself takes

    color              3m + 2 tau n          + 3nL
    conditional_only   3m +   tau n          + 3nL
    rho_down           2 tau n + 2n          + 3nL
    rho_down_prior     3m + 2 tau n + 2n     + 3nL
    random, dsir, full                         3nL

(`paper_forwards`). A whole recipe is made of the same parts (`predict`), but what its arms share is
done once: one prior, one conditional a domain, and every sequence of the corpus scored once by each
of them, also where the paper would score tau n tokens only.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from colorfilter.config.recipe import Arm, Domain, Recipe
from colorfilter.errors import InputError, one_line
from colorfilter.selection.refinement import sample_size
from colorfilter.training.schedule import planned_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TRAINING = 3  # forwards per token trained on: one forward, and a backward
CHARS_PER_TOKEN = 4.5  # English web text with a vocabulary of some fifty thousand
VOCAB_SIZE = 50_304


@dataclass(frozen=True)
class Parts:
    """What a method takes besides training the target model."""

    prior: bool = False  # a model trained on D_prior
    scores: int = 0  # models that score all candidates beforehand
    proxy: bool = False  # a learner that scores all candidates and trains on what it chooses


METHODS = {
    "color": Parts(prior=True, scores=2),
    "conditional_only": Parts(prior=True, scores=1),
    "rho_down": Parts(scores=1, proxy=True),
    "rho_down_prior": Parts(prior=True, scores=1, proxy=True),
    "random": Parts(),
    "dsir": Parts(),
    "full": Parts(),
}


def paper_forwards(method: str, m: float, n: float, tau: float | None, L: float) -> float:
    """Forwards of an arm by itself, by the paper's formula, for one domain and one target model.

    m tokens of D_prior (0 where the prior is given) and n selected, one of tau candidates each;
    L target forward in auxiliary forwards. tau counts for methods that score.
    """
    parts = METHODS[method]
    candidates = (tau or 0) * n
    forwards = parts.scores * candidates + TRAINING * n * L
    if parts.prior:
        forwards += TRAINING * m
    if parts.proxy:
        forwards += candidates + (TRAINING - 1) * n  # the forward of choosing is kept
    return forwards


@dataclass(frozen=True)
class Text:
    """Tokens of a domain's text, by what they are used for."""

    down: float
    held_out: float
    probe: float


@dataclass(frozen=True)
class Sizes:
    """The sizes of an experiment in tokens and FLOPs, and what of them is assumed, in words."""

    sample: int  # tokens of D_prior that the prior is trained on
    corpus: int  # tokens to choose from
    auxiliary: float  # FLOPs of a forward, per token
    target: float
    domains: Mapping[str, Text] = field(default_factory=dict)  # those whose sizes are known
    assumed: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """L: a forward of the target model in forwards of the auxiliary one."""
        return self.target / self.auxiliary


def sizes_of(
    recipe: Recipe, corpus_tokens: int | None = None, domain_tokens: int | None = None
) -> Sizes:
    """The sizes that a recipe says or implies. Opens no source and asks no network.

    Each domain is taken to have `domain_tokens`, divided as the recipe says. Raises InputError for
    a model that cannot be, and for a corpus that does not suffice.
    """
    from colorfilter.models.checkpoints import configuration

    assumed = []
    sample = 0
    if recipe.prior.model:
        sample = round(recipe.prior.sample_chars / CHARS_PER_TOKEN)
        assumed.append(
            f"m from prior.sample_chars at {CHARS_PER_TOKEN} characters a token, as of English "
            "with a large vocabulary"
        )
    least = max(_candidates(recipe, arm) for arm in recipe.arms)
    if corpus_tokens is None:
        assumed.append(
            f"corpus of {least:,} tokens, the least that the arms need; --corpus-tokens says how "
            "many there are"
        )
    elif corpus_tokens < least:
        raise InputError(
            f"--corpus-tokens: {corpus_tokens:,} are too few, the arms choose from {least:,}; give "
            "more, or lower target.training_tokens or tau"
        )
    if domain_tokens is None:
        assumed.append(
            "D_down and held-out text left out, as in the paper: the recipe does not say how many "
            "tokens a domain has; --domain-tokens does"
        )
    elif domain_tokens < 1:
        raise InputError(f"--domain-tokens: {domain_tokens} cannot be; give at least 1")
    if any(domain.tasks for domain in recipe.domains):
        assumed.append("evaluation on the items of tasks left out, which is little")

    path = recipe.prior.path
    given = _given(path) if path else None
    vocab_size = recipe.tokenizer.vocab_size
    if vocab_size is None and given:
        vocab_size = int(given.get_text_config().vocab_size)
    elif vocab_size is None:
        vocab_size = VOCAB_SIZE
        assumed.append(f"a vocabulary of {VOCAB_SIZE:,}; that of tokenizer.path is not looked up")
    length = recipe.sequence_length
    target = flops_per_token(configuration(recipe.target.model, vocab_size, length), length)
    if recipe.prior.model:
        fresh = configuration(recipe.prior.model, vocab_size, length)
        auxiliary = flops_per_token(fresh, length)
    elif given:
        auxiliary = flops_per_token(given, length)
    else:
        auxiliary = target
        assumed.append(f"a prior as large as the target model: {path} is not on this disk")
    domains = {d.name: _divided(d, domain_tokens) for d in recipe.domains if domain_tokens}
    return Sizes(sample, corpus_tokens or least, auxiliary, target, domains, tuple(assumed))


def _divided(domain: Domain, tokens: int) -> Text:
    # A task's test items have a file of their own, or are few.
    held_out = 0.0 if domain.tasks else domain.held_out * tokens
    probe = domain.probe * tokens
    return Text(tokens - held_out - probe, held_out, probe)


def _given(path: str) -> "PreTrainedConfig | None":
    """The configuration of a checkpoint by folder or hub name, if it is on this disk."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None
    return config


def flops_per_token(config: "PreTrainedConfig", sequence_length: int) -> float:
    """FLOPs of one forward, per token, of a model that exists as a configuration only.

    2 * (weights that every token is multiplied with, the head's among them)
      + 2 * 2 * T * d_attn / 2 per layer: each query meets half of the T keys and values in the
    mean, attention being causal. d_attn is heads times their width. Of a mixture of experts all
    are counted, though a token passes few. Raises InputError for a model that cannot be built.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from colorfilter.models.checkpoints import weights_per_token

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever an architecture makes of a value that cannot be
        raise InputError(f"model of type {config.model_type}: {one_line(error)}") from error
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)  # a model without attention has none
    width = getattr(text, "head_dim", None) or text.hidden_size / max(1, heads)
    attention = 2 * 2 * sequence_length * heads * width / 2 * text.num_hidden_layers
    return float(2 * weights_per_token(model) + attention)


@dataclass(frozen=True)
class Stage:
    """What an asset does with a model.

    `tokens` pass in all (None where nobody said how many), each for `per_token` auxiliary forwards,
    backwards included; `runs` is the number of seeds that they are the sum of.
    """

    asset: str
    verb: str  # train, score or evaluate
    tokens: float | None
    per_token: float
    runs: int = 1

    @property
    def forwards(self) -> float | None:
        """Auxiliary forwards of a token, in all."""
        return None if self.tokens is None else self.tokens * self.per_token


def predict(recipe: Recipe, sizes: Sizes) -> list[Stage]:
    """Every stage of a recipe that takes forwards, in the order in which they are run.

    Not counted: the items of tasks, held-out loss along a learning curve, and what lies near a
    cutoff and is scored again.
    """
    ratio, domains = sizes.ratio, recipe.domains
    stages = []
    if recipe.prior.model:
        stages.append(Stage("prior_model", "train", sizes.sample, TRAINING))
    for d in domains:
        text = sizes.domains.get(d.name)
        # The conditional is compared with the prior on held-out text.
        compared = 2 * text.held_out if text else 0
        stages.append(_training(f"{d.name}/conditional_model", text, compared))
        if recipe.has_domain_only_model:
            stages.append(_training(f"{d.name}/domain_only_model", text))
    scored = sizes.corpus + sum(text.probe for text in sizes.domains.values())
    stages.append(Stage("prior_scores", "score", scored, 1))
    for d in domains:
        stages.append(Stage(f"{d.name}/conditional_scores", "score", scored, 1))
        if recipe.has_domain_only_model:
            stages.append(Stage(f"{d.name}/domain_only_scores", "score", scored, 1))
    for d in domains:
        text = sizes.domains.get(d.name)
        if recipe.arms_with_one_cutoff():
            sample = recipe.sequence_length * sample_size(sizes.corpus // recipe.sequence_length)
            stages.append(_training(f"{d.name}/cutoff_confidence", text, sample))
        checkpoints = 0
        for arm in recipe.arms:
            asset = f"{d.name}/{arm.name}"
            if METHODS[arm.method].proxy and arm.tau:
                n = _chosen(recipe, arm, sizes)
                # The candidates' forwards, and those again that are learnt from: n more than the
                # paper's formula has, in which the forward of choosing is kept.
                stages.append(_passes(f"{asset}/selection", n, arm.tau * n))
            seeds = len(recipe.seeds(arm))
            tokens = seeds * _trained(recipe, arm, sizes)
            stages.append(Stage(f"{asset}/target_model", "train", tokens, TRAINING * ratio, seeds))
            checkpoints += seeds * len(_endpoints(recipe, arm, sizes))
            if recipe.evaluation.finetune:
                down = seeds * text.down if text else None
                stage = Stage(f"{asset}/finetuned_model", "train", down, TRAINING * ratio, seeds)
                stages.append(stage)
                checkpoints += seeds
        held_out = checkpoints * text.held_out if text else None
        stages.append(Stage(f"{d.name}/*/evaluation", "evaluate", held_out, ratio))
    return stages


def _training(asset: str, text: Text | None, scored: float = 0) -> Stage:
    """An auxiliary model's epoch over D_down, and what is scored by it in the same stage."""
    if text is None:
        return Stage(asset, "train", None, TRAINING)
    return _passes(asset, text.down, scored)


def _passes(asset: str, trained: float, scored: float) -> Stage:
    """Auxiliary passes over so many tokens for training and so many for scoring."""
    tokens = trained + scored
    return Stage(asset, "train", tokens, (TRAINING * trained + scored) / tokens)


def _chosen(recipe: Recipe, arm: Arm, sizes: Sizes) -> int:
    """Tokens that a proxy chooses: what training needs, and a little more where there is more."""
    sequences = int(sizes.corpus / recipe.sequence_length / (arm.tau or 1))
    return recipe.sequence_length * min(sequences, recipe.with_spare(arm))


def arm_forwards(recipe: Recipe, sizes: Sizes) -> list[tuple[str, int, float]]:
    """By arm and end point its name, the tokens it trains on, and the paper's forwards for it."""
    arms = []
    for arm in recipe.arms:
        for end in _endpoints(recipe, arm, sizes):
            n = end * recipe.sequence_length
            forwards = paper_forwards(arm.method, sizes.sample, n, arm.tau, sizes.ratio)
            arms.append((arm.name, n, forwards))
    return arms


def _endpoints(recipe: Recipe, arm: Arm, sizes: Sizes) -> tuple[int, ...]:
    return recipe.endpoints(arm, sizes.corpus // recipe.sequence_length)


def _candidates(recipe: Recipe, arm: Arm) -> int:
    """Tokens of the corpus that an arm must have to choose from."""
    return math.ceil((arm.tau or 1) * recipe.endpoints(arm, 0)[-1] * recipe.sequence_length)


def _trained(recipe: Recipe, arm: Arm, sizes: Sizes) -> int:
    """Tokens that one target model of an arm is trained on, the decays of its branches included."""
    ends = _endpoints(recipe, arm, sizes)
    return recipe.sequence_length * planned_sequences(recipe.target.training, ends)


@dataclass(frozen=True)
class Measured:
    """What a stage took: tokens that passed and seconds, added up over workers."""

    tokens: int
    seconds: float


def rates(
    stages: Iterable[Stage], measured: Mapping[str, Measured], auxiliary: float
) -> dict[str, float]:
    """Sustained FLOP/s of one worker by verb, from what stages took (by asset).

    `auxiliary` FLOPs of an auxiliary forward, per token.
    """
    flops: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for stage in stages:
        took = measured.get(stage.asset)
        if took and took.seconds:
            done = took.tokens * stage.per_token * auxiliary
            flops[stage.verb] = flops.get(stage.verb, 0) + done
            seconds[stage.verb] = seconds.get(stage.verb, 0) + took.seconds
    return {verb: flops[verb] / seconds[verb] for verb in flops}
