"""The recipe: everything that defines an experiment, as sections with types and bounds.

Impossible values are refused with a message that says how to mend them; `recipe_file` reads one.
"""

import math
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from colorfilter.config.operation import Compute, Refresh
from colorfilter.config.section import Section
from colorfilter.stages import Stage

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Format = Literal["jsonl", "parquet", "text", "python_dict"]
TaskName = Literal[
    "piqa",
    "hellaswag",
    "boolq",
    "sciq",
    "openbookqa",
    "arc_easy",
    "arc_challenge",
    "winogrande",
]


class Source(Section):
    """Where documents come from: files by glob or URL, and how to read them."""

    name: Name
    files: str = Field(description="glob or URL; local, hf://, s3://, gs://, https://")
    exclude: list[str] = Field([], description="globs over the whole path of files to leave out")
    format: Format | None = Field(None, description="default: by the file's suffix")
    text_field: str = Field("text", description="the field that holds a document's text")


class Corpus(Section):
    """What is selected from. Shards are lists of whole files of about `shard_bytes` on disk."""

    sources: list[Source] = Field(min_length=1)
    shard_bytes: int = Field(64_000_000, ge=1)

    @model_validator(mode="after")
    def names_are_unique(self) -> Self:
        return _unique_names(self)


class Tokenizer(Section):
    """Either trained on D_prior (byte-level BPE of `vocab_size`) or loaded from `path`."""

    vocab_size: int | None = Field(None, ge=257, le=1_000_000)
    path: str | None = Field(None, description="a folder or hub name of a Hugging Face tokenizer")

    @model_validator(mode="after")
    def one_of_two(self) -> Self:
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("give either vocab_size (train one) or path (load one)")
        return self


class Training(Section):
    """How a model is trained; sizes in tokens, so that they hold at any batch size."""

    learning_rate: float = Field(gt=0)
    batch_sequences: int = Field(ge=1)
    schedule: Literal["wsd", "cosine"] = Field("wsd", description="warm-up, stable, decay")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the tokens")
    decay: float = Field(0.2, gt=0, le=1, description="share of the tokens at the end (wsd)")
    final_learning_rate: float = Field(0.1, ge=0, le=1, description="share of the peak (cosine)")
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    epsilon: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    z_loss: float = Field(
        0.0, ge=0, description="weight of the squared log-sum-exp of the logits in the objective"
    )


class Model(Section):
    """A fresh causal language model: a transformers model type and its configuration."""

    type: str = Field(description="transformers' model_type, for instance gpt_neox or llama")
    config: dict[str, Any] = Field(
        description="arguments of its configuration class; vocab_size comes from the tokenizer"
    )


class Prior(Section):
    """The auxiliary model: trained on D_prior, or any causal LM in Hugging Face form by path."""

    sample_chars: int = Field(0, ge=0, description="size of D_prior, characters of text")
    score_sample: bool = Field(False, description="score D_prior's documents too")
    path: str | None = Field(None, description="a folder or hub name; nothing is trained then")
    model: Model | None = None
    training: Training | None = None

    @model_validator(mode="after")
    def trained_or_loaded(self) -> Self:
        trained = self.model is not None and self.training is not None
        if trained == (self.path is not None) or (self.model is None) != (self.training is None):
            raise ValueError("give either model and training (train one) or path (load one)")
        return self


class Task(Section):
    """A multiple-choice task by its name in lm-evaluation-harness, and the files of its items.

    A file that is named as both is split between the two.
    """

    name: TaskName
    train: str | None = Field(None, description="glob or URL; its items go to D_down and probe")
    test: str | None = Field(None, description="glob or URL; its items are only evaluated on")

    @model_validator(mode="after")
    def has_items(self) -> Self:
        if self.train is None and self.test is None:
            raise ValueError("give the task's files: train, test or both")
        return self

    def source(self, part: Literal["train", "test"]) -> Source | None:
        """The files of a part as a source, where the task has them."""
        files = self.train if part == "train" else self.test
        if files is None:
            return None
        return Source.model_validate({"name": self.name, "files": files})


def _not_reserved(name: str) -> str:
    if name in set(Stage):
        raise ValueError(f"'{name}' is the name of an asset; give the domain another")
    return name


class Domain(Section):
    """What one wants to be good at: text, or tasks. Split once into D_down, held-out and probe."""

    name: Annotated[Name, AfterValidator(_not_reserved)]
    sources: list[Source] = Field([], description="text")
    tasks: list[Task] = Field([], description="multiple-choice tasks, instead of sources")
    held_out: Fraction = Field(
        0.15,
        description="share of the text; of tasks, share of the items where one file is train "
        "and test",
    )
    probe: Fraction = Field(0.15, description="share of the text, or of the tasks' train items")
    test_items: int | None = Field(
        None, ge=2, description="draw so many test items of each task (default: all)"
    )
    training: Training = Field(description="one epoch over D_down, from the prior")

    @model_validator(mode="after")
    def one_of_two(self) -> Self:
        if bool(self.sources) == bool(self.tasks):
            raise ValueError("give either sources (text) or tasks (multiple choice)")
        if self.test_items is not None and not self.tasks:
            raise ValueError("test_items belongs to tasks")
        for part in ("train", "test"):
            if self.tasks and not any(t.source(part) for t in self.tasks):
                raise ValueError(f"tasks: none has a {part} file; add one")
        return _unique_names(self, "sources", "tasks")

    @model_validator(mode="after")
    def something_is_left(self) -> Self:
        if self.held_out + self.probe >= 0.9:
            raise ValueError("held_out + probe must leave at least a tenth for D_down")
        return self


class Scoring(Section):
    """How losses are computed, and over which labels."""

    precision: Literal["float32", "bf16", "fp16"] = Field(
        "float32",
        description="tried first: fp16 gives way to bf16, bf16 to float32, where the device "
        "lacks it or a model's losses err in it. In 16 bits, scores near a cutoff are computed "
        "again in float32",
    )
    labels: Literal["all", "within_documents"] = Field(
        "all",
        description="all (the paper's way), or not those whose context ends in another document",
    )


# Methods by what ranks the corpus: losses that stand, or a proxy that learns while it chooses.
SCORED = ("color", "conditional_only")
ONLINE = ("rho_down", "rho_down_prior")


class Arm(Section):
    """A method with its tau: one way of choosing what the target model trains on.

    `color`: lowest conditional minus prior loss. `conditional_only`: lowest conditional loss.
    `random`: drawn fresh. `rho_down`: lowest loss by a model of D_down alone minus that of a proxy
    which learns from what it chooses; `rho_down_prior`: the same with the conditional. `dsir`:
    documents by importance of their n-grams (arXiv 2302.03169). `full`: everything.
    """

    method: Literal[
        "color", "conditional_only", "random", "rho_down", "rho_down_prior", "dsir", "full"
    ]
    tau: float | None = Field(None, ge=1, description="keep the best 1/tau of the corpus")
    batch: int | None = Field(
        None, ge=1, description="choose so many sequences from every random tau * batch"
    )
    seeds: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="of the target models (default: evaluation.seeds)"
    )
    leaks: Literal["remove", "keep"] = Field(
        "remove", description="selected sequences that quote held-out text: not trained on, or are"
    )

    @model_validator(mode="after")
    def tau_where_it_counts(self) -> Self:
        with_tau = (*SCORED, *ONLINE)
        if (self.method in with_tau) == (self.tau is None):
            raise ValueError(f"tau belongs to {', '.join(with_tau)} and to no other method")
        if self.batch is not None and self.method not in SCORED:
            raise ValueError(f"batch belongs to {' and '.join(SCORED)}")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ")
        return self

    @property
    def name(self) -> str:
        name: str = self.method
        if self.tau is not None:
            name += f"_tau{int(self.tau) if self.tau.is_integer() else self.tau}"
        if self.batch is not None:
            name += f"_batch{self.batch}"
        return name if self.leaks == "remove" else f"{name}_leaks"

    def choice(self) -> dict[str, Any]:
        """What decides which sequences are selected."""
        return self.model_dump(include={"method", "tau", "batch"})


class Filtered(Section):
    """What `documents/` of a filtered dataset holds."""

    whole_documents_from: float | None = Field(
        None,
        gt=0,
        le=1,
        description="write whole documents of which at least this fraction was selected "
        "(default: the selected spans only)",
    )


class Target(Section):
    """The model that is trained on what each arm selected, on `training_tokens` each."""

    model: Model
    training: Training
    training_tokens: int = Field(ge=1)


class Evaluation(Section):
    """Seeds of the target models and where random's annealed end points lie."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    random_multiples: list[Annotated[float, Field(ge=1)]] = Field(
        [1.0, 1.5, 2.0], description="end points of the random arm, in units of training_tokens"
    )

    finetune: bool = Field(
        False, description="fine-tune every target model on D_down as well, and evaluate it again"
    )

    @model_validator(mode="after")
    def in_order(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ")
        multiples = self.random_multiples
        if not multiples or multiples[0] != 1 or sorted(set(multiples)) != multiples:
            raise ValueError("random_multiples must begin with 1 and rise")
        return self


class Recipe(Section):
    """The whole experiment."""

    name: Name
    seed: int = Field(0, ge=0, description="fixes data, tokenizer and auxiliary models")
    sequence_length: int = Field(ge=8)
    corpus: Corpus
    tokenizer: Tokenizer
    prior: Prior
    domains: list[Domain] = Field(min_length=1)
    scoring: Scoring = Scoring(precision="float32", labels="all")
    arms: list[Arm] = Field(min_length=1)
    target: Target
    evaluation: Evaluation
    filtered: Filtered = Filtered(whole_documents_from=None)
    refresh: Refresh = Refresh.model_validate({})
    compute: Compute = Compute.model_validate({})

    @model_validator(mode="after")
    def parts_fit(self) -> Self:
        _unique_names(self, "domains", "arms")
        fresh = {"prior.model": self.prior.model, "target.model": self.target.model}
        for where, model in fresh.items():
            context = model and model.config.get("max_position_embeddings")
            if isinstance(context, int) and self.sequence_length > context:
                raise ValueError(
                    f"sequence_length {self.sequence_length} is longer than the model's context: "
                    f"raise {where}.config.max_position_embeddings ({context}) or shorten it"
                )
        if not self.prior.sample_chars and not (self.prior.path and self.tokenizer.path):
            raise ValueError(
                "prior.sample_chars: give the size of D_prior; the prior or the tokenizer is "
                "trained on it"
            )
        online = next((arm.name for arm in self.arms if arm.method in ONLINE), None)
        if online and self.prior.path:
            raise ValueError(
                f"arms: {online} trains a proxy the way the prior is trained: give prior.model and "
                "prior.training instead of prior.path, or leave the arm out"
            )
        if len(self.evaluation.random_multiples) > 1 and self.target.training.schedule != "wsd":
            raise ValueError(
                "several random_multiples need target.training.schedule: wsd (one trunk, "
                "branched with a full decay); with cosine give random_multiples: [1]"
            )
        return self

    def arm(self, name: str) -> Arm:
        return next(a for a in self.arms if a.name == name)

    def seeds(self, arm: Arm) -> list[int]:
        """The seeds of an arm's target models."""
        return arm.seeds or self.evaluation.seeds

    @property
    def has_domain_only_model(self) -> bool:
        """Whether an arm's conditional is a model of D_down alone."""
        return any(arm.method == "rho_down" for arm in self.arms)

    def arms_with_cutoffs(self) -> list[Arm]:
        """The arms that select by standing losses, each choice once."""
        first: dict[str, Arm] = {}
        for arm in self.arms:
            if arm.method in SCORED:
                first.setdefault(str(arm.choice()), arm)
        return list(first.values())

    def arms_with_one_cutoff(self) -> list[Arm]:
        """Those of them whose cutoff holds for the whole corpus."""
        return [arm for arm in self.arms_with_cutoffs() if not arm.batch]

    def endpoints(self, arm: Arm, selected: int) -> tuple[int, ...]:
        """End points of an arm's target models, in sequences, out of so many selected ones.

        Several for random, to match other arms' losses against; for full also the end of its data.
        """
        multiples = self.evaluation.random_multiples if arm.method == "random" else [1.0]
        sequences = self.target.training_tokens / self.sequence_length
        ends = [max(1, math.floor(m * sequences)) for m in multiples]
        if arm.method == "full" and selected > ends[-1]:
            ends.append(selected)
        return tuple(ends)

    def with_spare(self, arm: Arm) -> int:
        """Sequences that an arm without a cutoff selects: what its training needs, and a
        twentieth more, in case some of it leaks.
        """
        needed = self.endpoints(arm, 0)[-1]
        return needed + needed // 20


S = TypeVar("S", bound=Section)


def _unique_names(section: S, *fields: str) -> S:
    for field in fields or ("sources",):
        names = [part.name for part in getattr(section, field)]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"{field}: the name {twice[0]} stands twice")
    return section
