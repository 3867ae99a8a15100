"""The recipe: everything that defines an experiment, as sections with types and bounds.

Invalid values are refused with a message that says how to fix them. colorfilter.config.load reads a
recipe from a file.
"""

import math
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from colorfilter.config.operation import Compute, Refresh
from colorfilter.config.section import RecipeSection
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


class Source(RecipeSection):
    """A source of documents: files by glob or URL, and how to read them."""

    name: Name
    files: str = Field(description="glob or URL; local, hf://, s3://, gs://, https://")
    exclude: list[str] = Field([], description="globs of files to exclude, matched to full paths")
    format: Format | None = Field(None, description="file format (default: by the file's suffix)")
    text_field: str = Field("text", description="the field that contains a document's text")


class Corpus(RecipeSection):
    """The text to select from. Shards are lists of complete files, about `shard_bytes` on disk."""

    sources: list[Source] = Field(min_length=1)
    shard_bytes: int = Field(64_000_000, ge=1)

    @model_validator(mode="after")
    def names_are_unique(self) -> Self:
        return _unique_names(self)


class Tokenizer(RecipeSection):
    """The tokenizer: trained on D_prior (byte-level BPE of `vocab_size`) or loaded from `path`."""

    vocab_size: int | None = Field(None, ge=257, le=1_000_000)
    path: str | None = Field(None, description="a folder or hub name of a Hugging Face tokenizer")

    @model_validator(mode="after")
    def one_of_two(self) -> Self:
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("give either vocab_size (to train one) or path (to load one)")
        return self


class Training(RecipeSection):
    """How a model is trained. Schedules are shares of the tokens, independent of batch size."""

    learning_rate: float = Field(gt=0)
    batch_sequences: int = Field(ge=1)
    schedule: Literal["wsd", "cosine"] = Field(
        "wsd", description="wsd (warm-up, stable, decay) or cosine"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the tokens, at the start")
    decay: float = Field(0.2, gt=0, le=1, description="share of the tokens, at the end (wsd)")
    final_learning_rate: float = Field(
        0.1, ge=0, le=1, description="share of the peak learning rate (cosine)"
    )
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    epsilon: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, gt=0, description="maximum norm of the gradient")
    z_loss: float = Field(
        0.0, ge=0, description="weight of the squared log-sum-exp of the logits in the objective"
    )


class Model(RecipeSection):
    """A fresh causal language model: a transformers model type and its configuration."""

    type: str = Field(description="model_type in transformers, for example gpt_neox or llama")
    config: dict[str, Any] = Field(
        description="arguments of the configuration class; vocab_size comes from the tokenizer"
    )


class Prior(RecipeSection):
    """The auxiliary model: trained on D_prior, or any Hugging Face causal LM loaded from `path`."""

    sample_chars: int = Field(0, ge=0, description="size of D_prior in characters of text")
    score_sample: bool = Field(False, description="also score the documents of D_prior")
    path: str | None = Field(
        None, description="a folder or hub name to load the prior from, instead of training it"
    )
    model: Model | None = None
    training: Training | None = None

    @model_validator(mode="after")
    def trained_or_loaded(self) -> Self:
        trained = self.model is not None and self.training is not None
        if trained == (self.path is not None) or (self.model is None) != (self.training is None):
            raise ValueError("give either model and training (to train one) or path (to load one)")
        return self


class Task(RecipeSection):
    """A multiple-choice task by its name in lm-evaluation-harness, and the files of its items.

    If `train` and `test` name the same files, their items are split between the two.
    """

    name: TaskName
    train: str | None = Field(
        None, description="glob or URL of items that go to D_down and the probe"
    )
    test: str | None = Field(
        None, description="glob or URL of items that are used for evaluation only"
    )

    @model_validator(mode="after")
    def has_items(self) -> Self:
        if self.train is None and self.test is None:
            raise ValueError("give the task's files: train, test or both")
        return self

    def source(self, part: Literal["train", "test"]) -> Source | None:
        """Return the files of a part as a source, or None if the task has none."""
        files = self.train if part == "train" else self.test
        if files is None:
            return None
        return Source.model_validate({"name": self.name, "files": files})


def _not_reserved(name: str) -> str:
    if name in set(Stage):
        raise ValueError(f"'{name}' is the name of an asset; choose another name for the domain")
    return name


class Domain(RecipeSection):
    """The target domain: text or tasks, split once into D_down, held-out text and probe."""

    name: Annotated[Name, AfterValidator(_not_reserved)]
    sources: list[Source] = Field([], description="text")
    tasks: list[Task] = Field([], description="multiple-choice tasks, instead of sources")
    held_out: Fraction = Field(
        0.15,
        description="share of the text; with tasks, share of the items of files that are both "
        "train and test",
    )
    probe: Fraction = Field(0.15, description="share of the text, or of the tasks' train items")
    test_items: int | None = Field(
        None, ge=2, description="number of test items to draw from each task (default: all)"
    )
    training: Training = Field(description="one epoch over D_down, starting from the prior")

    @model_validator(mode="after")
    def one_of_two(self) -> Self:
        if bool(self.sources) == bool(self.tasks):
            raise ValueError("give either sources (text) or tasks (multiple choice)")
        if self.test_items is not None and not self.tasks:
            raise ValueError("test_items requires tasks; remove it")
        for part in ("train", "test"):
            if self.tasks and not any(t.source(part) for t in self.tasks):
                raise ValueError(f"tasks: no task has a {part} file; add one")
        return _unique_names(self, "sources", "tasks")

    @model_validator(mode="after")
    def something_is_left(self) -> Self:
        if self.held_out + self.probe >= 0.9:
            raise ValueError("held_out + probe must be below 0.9, to leave a tenth for D_down")
        return self


class Scoring(RecipeSection):
    """How losses are computed, and over which labels."""

    precision: Literal["float32", "bf16", "fp16"] = Field(
        "float32",
        description="precision to try first: fp16 falls back to bf16, and bf16 to float32, if the "
        "device lacks it or a model's losses are inaccurate in it. In 16 bits, scores near a "
        "cutoff are recomputed in float32",
    )
    labels: Literal["all", "within_documents"] = Field(
        "all",
        description="all (as in the paper), or within_documents: skip the first token of each "
        "document, whose context is another document",
    )


# Methods that rank the corpus by stored losses, and methods whose proxy learns while it selects.
SCORED = ("color", "conditional_only")
ONLINE = ("rho_down", "rho_down_prior")


class Arm(RecipeSection):
    """A method with its tau: one way to select what the target model trains on.

    - `color`: lowest difference of conditional minus prior loss.
    - `conditional_only`: lowest conditional loss.
    - `random`: fresh random sequences.
    - `rho_down`: lowest difference of two losses, of a model trained on D_down alone minus a proxy
      that learns from the sequences it selects.
    - `rho_down_prior`: like `rho_down`, with the conditional instead of the D_down model.
    - `dsir`: documents drawn by the importance of their n-grams (arXiv 2302.03169).
    - `full`: everything.
    """

    method: Literal[
        "color", "conditional_only", "random", "rho_down", "rho_down_prior", "dsir", "full"
    ]
    tau: float | None = Field(None, ge=1, description="keep the best 1/tau of the corpus")
    batch: int | None = Field(
        None, ge=1, description="select this many sequences from every random tau * batch"
    )
    seeds: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="seeds of the target models (default: evaluation.seeds)"
    )
    leaks: Literal["remove", "keep"] = Field(
        "remove", description="remove or keep selected sequences that quote held-out text"
    )

    @model_validator(mode="after")
    def tau_where_it_counts(self) -> Self:
        with_tau = (*SCORED, *ONLINE)
        if (self.method in with_tau) == (self.tau is None):
            raise ValueError(f"tau is required by {', '.join(with_tau)}; other methods have none")
        if self.batch is not None and self.method not in SCORED:
            raise ValueError(f"batch works with {' and '.join(SCORED)} only; remove it")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ; remove the duplicates")
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
        """Return the fields that determine which sequences are selected."""
        return self.model_dump(include={"method", "tau", "batch"})


class Filtered(RecipeSection):
    """The content of `documents/` in a filtered dataset."""

    whole_documents_from: float | None = Field(
        None,
        gt=0,
        le=1,
        description="write complete documents of which at least this fraction was selected "
        "(default: write only the selected spans)",
    )


class Target(RecipeSection):
    """The model trained on each arm's selection, for `training_tokens` tokens."""

    model: Model
    training: Training
    training_tokens: int = Field(ge=1)


class Evaluation(RecipeSection):
    """Seeds of the target models and the training lengths of the random arm."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    random_multiples: list[Annotated[float, Field(ge=1)]] = Field(
        [1.0, 1.5, 2.0],
        description="training lengths of the random arm, as multiples of training_tokens",
    )

    finetune: bool = Field(
        False, description="also fine-tune every target model on D_down and evaluate the result"
    )

    @model_validator(mode="after")
    def in_order(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ; remove the duplicates")
        multiples = self.random_multiples
        if not multiples or multiples[0] != 1 or sorted(set(multiples)) != multiples:
            raise ValueError("random_multiples must start with 1 and increase")
        return self


class Recipe(RecipeSection):
    """The whole experiment."""

    name: Name
    seed: int = Field(0, ge=0, description="seed of the data, tokenizer and auxiliary models")
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
                    f"sequence_length: {self.sequence_length} is longer than the model's context; "
                    f"lower it or raise {where}.config.max_position_embeddings ({context})"
                )
        if not self.prior.sample_chars and not (self.prior.path and self.tokenizer.path):
            raise ValueError(
                "prior.sample_chars: give the size of D_prior, on which the prior or the tokenizer "
                "is trained"
            )
        online = next((arm.name for arm in self.arms if arm.method in ONLINE), None)
        if online and self.prior.path:
            raise ValueError(
                f"arms: {online} trains a proxy like the prior; give prior.model and "
                "prior.training instead of prior.path, or remove the arm"
            )
        if len(self.evaluation.random_multiples) > 1 and self.target.training.schedule != "wsd":
            raise ValueError(
                "several random_multiples need target.training.schedule: wsd (one run that "
                "branches into a full decay at each length); with cosine set random_multiples: [1]"
            )
        return self

    def arm(self, name: str) -> Arm:
        return next(a for a in self.arms if a.name == name)

    def seeds(self, arm: Arm) -> list[int]:
        """Return the seeds of an arm's target models."""
        return arm.seeds or self.evaluation.seeds

    @property
    def has_domain_only_model(self) -> bool:
        """Whether an arm needs a model trained on D_down alone."""
        return any(arm.method == "rho_down" for arm in self.arms)

    def arms_with_cutoffs(self) -> list[Arm]:
        """Return the arms that select by stored losses, one for each distinct choice."""
        first: dict[str, Arm] = {}
        for arm in self.arms:
            if arm.method in SCORED:
                first.setdefault(str(arm.choice()), arm)
        return list(first.values())

    def arms_with_one_cutoff(self) -> list[Arm]:
        """Return the arms of `arms_with_cutoffs` that have one cutoff for the whole corpus."""
        return [arm for arm in self.arms_with_cutoffs() if not arm.batch]

    def endpoints(self, arm: Arm, selected: int) -> tuple[int, ...]:
        """Return the lengths, in sequences, at which an arm's target models are evaluated.

        `selected` is the number of sequences that the arm selected. random has several lengths, so
        that other arms' losses can be matched; full also has one at the end of its data.
        """
        multiples = self.evaluation.random_multiples if arm.method == "random" else [1.0]
        sequences = self.target.training_tokens / self.sequence_length
        ends = [max(1, math.floor(m * sequences)) for m in multiples]
        if arm.method == "full" and selected > ends[-1]:
            ends.append(selected)
        return tuple(ends)

    def with_spare(self, arm: Arm) -> int:
        """Return how many sequences an arm without a cutoff selects.

        This is what its training needs plus a twentieth, since leaking sequences may be removed.
        """
        needed = self.endpoints(arm, 0)[-1]
        return needed + needed // 20


S = TypeVar("S", bound=RecipeSection)


def _unique_names(section: S, *fields: str) -> S:
    for field in fields or ("sources",):
        names = [part.name for part in getattr(section, field)]
        duplicates = sorted({n for n in names if names.count(n) > 1})
        if duplicates:
            raise ValueError(f"{field}: duplicate name {duplicates[0]}; names must be unique")
    return section
