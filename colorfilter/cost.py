"""The cost of an experiment before it runs, in model forwards and FLOPs.

The unit is the paper's (arXiv 2406.10670, compute cost): one forward of one token through the
auxiliary model; a backward counts as two. With m tokens of D_prior, n selected tokens, and L the
cost of a forward of the target model in that unit, a single arm takes

    color              3m + 2 tau n          + 3nL
    conditional_only   3m +   tau n          + 3nL
    rho_down           2 tau n + 2n          + 3nL
    rho_down_prior     3m + 2 tau n + 2n     + 3nL
    random, dsir, full                         3nL

(`paper_forwards`). A recipe adds up the same parts (`predict`), but counts work that its arms share
once: one prior, one conditional per domain, and one pass of each over every sequence of the corpus,
even where the paper would score tau n tokens only.
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

TRAINING = 3  # forwards per trained token: one forward, and a backward that counts as two
CHARS_PER_TOKEN = 4.5  # English web text with a vocabulary of about fifty thousand
VOCAB_SIZE = 50_304


@dataclass(frozen=True)
class Parts:
    """The work of a method in addition to training the target model."""

    prior: bool = False  # whether it needs a model trained on D_prior
    scores: int = 0  # number of models that score all candidates beforehand
    proxy: bool = False  # whether a proxy scores all candidates and trains on what it chooses


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
    """Return the forwards of a single arm for one domain and one target model (paper's formula).

    `m`: tokens of D_prior, 0 if the prior is loaded. `n`: selected tokens, out of tau * n
    candidates. `L`: cost of a target forward in auxiliary forwards. Only methods that score use
    `tau`.
    """
    parts = METHODS[method]
    candidates = (tau or 0) * n
    forwards = parts.scores * candidates + TRAINING * n * L
    if parts.prior:
        forwards += TRAINING * m
    if parts.proxy:
        forwards += candidates + (TRAINING - 1) * n  # training reuses the forward that chose
    return forwards


@dataclass(frozen=True)
class Text:
    """Number of tokens of a domain's text, by use."""

    down: float
    held_out: float
    probe: float


@dataclass(frozen=True)
class Sizes:
    """The sizes of an experiment in tokens and FLOPs, and the assumptions behind them."""

    sample: int  # tokens of D_prior that the prior is trained on
    corpus: int  # tokens to choose from
    auxiliary: float  # FLOPs of one forward of the auxiliary model, per token
    target: float  # FLOPs of one forward of the target model, per token
    domains: Mapping[str, Text] = field(default_factory=dict)  # only domains of known size
    assumed: tuple[str, ...] = ()  # human-readable

    @property
    def ratio(self) -> float:
        """L: the cost of a target forward in auxiliary forwards."""
        return self.target / self.auxiliary


def sizes_of(
    recipe: Recipe, corpus_tokens: int | None = None, domain_tokens: int | None = None
) -> Sizes:
    """Return the sizes that a recipe states or implies. Opens no source and uses no network.

    Each domain is assumed to have `domain_tokens`, split by the recipe's shares. Raises InputError
    for an invalid model and for a corpus that is too small.
    """
    from colorfilter.models.checkpoints import configuration

    assumed = []
    sample = 0
    if recipe.prior.model:
        sample = round(recipe.prior.sample_chars / CHARS_PER_TOKEN)
        assumed.append(
            f"m from prior.sample_chars at {CHARS_PER_TOKEN} characters per token, typical of "
            "English with a large vocabulary"
        )
    least = max(_candidates(recipe, arm) for arm in recipe.arms)
    if corpus_tokens is None:
        assumed.append(
            f"corpus of {least:,} tokens, the minimum that the arms need; set --corpus-tokens to "
            "its actual size"
        )
    elif corpus_tokens < least:
        raise InputError(
            f"--corpus-tokens: {corpus_tokens:,} are too few, the arms need {least:,} to choose "
            "from; raise it, or lower target.training_tokens or tau"
        )
    if domain_tokens is None:
        assumed.append(
            "D_down and held-out text excluded, as in the paper, because their size is unknown; "
            "set --domain-tokens to include them"
        )
    elif domain_tokens < 1:
        raise InputError(f"--domain-tokens: must be at least 1; got {domain_tokens}")
    if any(domain.tasks for domain in recipe.domains):
        assumed.append("evaluation on task items excluded; it costs little")

    path = recipe.prior.path
    given = _given(path) if path else None
    vocab_size = recipe.tokenizer.vocab_size
    if vocab_size is None and given:
        vocab_size = int(given.get_text_config().vocab_size)
    elif vocab_size is None:
        vocab_size = VOCAB_SIZE
        assumed.append(f"vocabulary of {VOCAB_SIZE:,} tokens; tokenizer.path is not read")
    length = recipe.sequence_length
    target = flops_per_token(configuration(recipe.target.model, vocab_size, length), length)
    if recipe.prior.model:
        fresh = configuration(recipe.prior.model, vocab_size, length)
        auxiliary = flops_per_token(fresh, length)
    elif given:
        auxiliary = flops_per_token(given, length)
    else:
        auxiliary = target
        assumed.append(f"prior as large as the target model: {path} is not on this disk")
    domains = {d.name: _divided(d, domain_tokens) for d in recipe.domains if domain_tokens}
    return Sizes(sample, corpus_tokens or least, auxiliary, target, domains, tuple(assumed))


def _divided(domain: Domain, tokens: int) -> Text:
    # A task's test items are in a separate file, or are few.
    held_out = 0.0 if domain.tasks else domain.held_out * tokens
    probe = domain.probe * tokens
    return Text(tokens - held_out - probe, held_out, probe)


def _given(path: str) -> "PreTrainedConfig | None":
    """Return the configuration of a checkpoint (folder or hub name), or None if not on disk."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None
    return config


def flops_per_token(config: "PreTrainedConfig", sequence_length: int) -> float:
    """Return the FLOPs of one forward, per token, of a model given by its configuration.

    2 * (weights that every token is multiplied with, including the head)
      + 2 * 2 * T * d_attn / 2 per layer: attention is causal, so a query attends to half of the T
    keys and values on average. d_attn is the number of heads times their width. All experts of a
    mixture are counted, although a token passes through few. Raises InputError for a model that
    cannot be built.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from colorfilter.models.checkpoints import weights_per_token

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # architectures raise anything for invalid values
        raise InputError(f"model of type {config.model_type}: {one_line(error)}") from error
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)  # a model without attention has none
    width = getattr(text, "head_dim", None) or text.hidden_size / max(1, heads)
    attention = 2 * 2 * sequence_length * heads * width / 2 * text.num_hidden_layers
    return float(2 * weights_per_token(model) + attention)


@dataclass(frozen=True)
class StageCost:
    """The work that an asset does with a model.

    `tokens` is the total over `runs` seeds, None if unknown. Each token takes `per_token` auxiliary
    forwards, including backwards.
    """

    asset: str
    verb: str  # train, score or evaluate
    tokens: float | None
    per_token: float
    runs: int = 1

    @property
    def forwards(self) -> float | None:
        """Auxiliary forwards in total, None if the number of tokens is unknown."""
        return None if self.tokens is None else self.tokens * self.per_token


def predict(recipe: Recipe, sizes: Sizes) -> list[StageCost]:
    """Return every stage of a recipe that runs a model, in execution order.

    Not counted: task items, held-out loss along a learning curve, and sequences near a cutoff that
    are scored again.
    """
    ratio, domains = sizes.ratio, recipe.domains
    stages = []
    if recipe.prior.model:
        stages.append(StageCost("prior_model", "train", sizes.sample, TRAINING))
    for d in domains:
        text = sizes.domains.get(d.name)
        # The conditional is compared with the prior on held-out text.
        compared = 2 * text.held_out if text else 0
        stages.append(_training(f"{d.name}/conditional_model", text, compared))
        if recipe.has_domain_only_model:
            stages.append(_training(f"{d.name}/domain_only_model", text))
    scored = sizes.corpus + sum(text.probe for text in sizes.domains.values())
    stages.append(StageCost("prior_scores", "score", scored, 1))
    for d in domains:
        stages.append(StageCost(f"{d.name}/conditional_scores", "score", scored, 1))
        if recipe.has_domain_only_model:
            stages.append(StageCost(f"{d.name}/domain_only_scores", "score", scored, 1))
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
                # One forward per candidate, and a full training step on the chosen ones: n more
                # than the paper's formula, which reuses the forward that chose.
                stages.append(_passes(f"{asset}/selection", n, arm.tau * n))
            seeds = len(recipe.seeds(arm))
            tokens = seeds * _trained(recipe, arm, sizes)
            stages.append(
                StageCost(f"{asset}/target_model", "train", tokens, TRAINING * ratio, seeds)
            )
            checkpoints += seeds * len(_endpoints(recipe, arm, sizes))
            if recipe.evaluation.finetune:
                down = seeds * text.down if text else None
                stage = StageCost(
                    f"{asset}/finetuned_model", "train", down, TRAINING * ratio, seeds
                )
                stages.append(stage)
                checkpoints += seeds
        held_out = checkpoints * text.held_out if text else None
        stages.append(StageCost(f"{d.name}/*/evaluation", "evaluate", held_out, ratio))
    return stages


def _training(asset: str, text: Text | None, scored: float = 0) -> StageCost:
    """Return the stage of an auxiliary model: one epoch over D_down, then `scored` tokens."""
    if text is None:
        return StageCost(asset, "train", None, TRAINING)
    return _passes(asset, text.down, scored)


def _passes(asset: str, trained: float, scored: float) -> StageCost:
    """Return a stage of auxiliary passes over `trained` and `scored` tokens."""
    tokens = trained + scored
    return StageCost(asset, "train", tokens, (TRAINING * trained + scored) / tokens)


def _chosen(recipe: Recipe, arm: Arm, sizes: Sizes) -> int:
    """Return the tokens that a proxy chooses: what training needs, plus a reserve if possible."""
    sequences = int(sizes.corpus / recipe.sequence_length / (arm.tau or 1))
    return recipe.sequence_length * min(sequences, recipe.with_spare(arm))


def arm_forwards(recipe: Recipe, sizes: Sizes) -> list[tuple[str, int, float]]:
    """Return (arm, tokens trained on, forwards by the paper's formula) per arm and end point."""
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
    """Return how many tokens of the corpus an arm needs to choose from."""
    return math.ceil((arm.tau or 1) * recipe.endpoints(arm, 0)[-1] * recipe.sequence_length)


def _trained(recipe: Recipe, arm: Arm, sizes: Sizes) -> int:
    """Return the tokens that one target model of an arm trains on, including branch decays."""
    ends = _endpoints(recipe, arm, sizes)
    return recipe.sequence_length * planned_sequences(recipe.target.training, ends)


@dataclass(frozen=True)
class Measured:
    """What a stage took: tokens and seconds, summed over workers."""

    tokens: int
    seconds: float


def rates(
    stages: Iterable[StageCost], measured: Mapping[str, Measured], auxiliary: float
) -> dict[str, float]:
    """Return the sustained FLOP/s of one worker, by verb.

    `measured` is keyed by asset; `auxiliary` is the FLOPs of an auxiliary forward, per token.
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
