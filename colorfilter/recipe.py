"""The recipe: one YAML file that says everything that defines an experiment.

Unknown keys and impossible values are refused with the field's path and the mend. Paths may hold
`{stdlib}` (the folder of this Python's standard library) and environment variables; relative ones
are relative to the recipe's folder.
"""

import glob
import os
import re
import sysconfig
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from colorfilter.errors import InputError

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Format = Literal["jsonl", "parquet", "text", "python_dict"]


class Section(BaseModel):
    """A part of the recipe. Frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def facts(self) -> dict[str, Any]:
        """The section as plain JSON values: what enters an artefact's key."""
        return self.model_dump(mode="json")


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


class Domain(Section):
    """What one wants to be good at. Split once into D_down, held-out and probe, by bytes."""

    name: Name
    sources: list[Source] = Field(min_length=1)
    held_out: Fraction = 0.15
    probe: Fraction = 0.15
    training: Training = Field(description="one epoch over D_down, from the prior")

    @model_validator(mode="after")
    def something_is_left(self) -> Self:
        if self.held_out + self.probe >= 0.9:
            raise ValueError("held_out + probe must leave at least a tenth for D_down")
        return _unique_names(self)


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


class Arm(Section):
    """A method with its tau: one way of choosing what the target model trains on."""

    method: Literal["color", "random"]
    tau: float | None = Field(None, ge=1, description="keep the best 1/tau of the corpus")
    batch: int | None = Field(
        None, ge=1, description="choose so many sequences from every random tau * batch"
    )
    leaks: Literal["remove", "keep"] = Field(
        "remove", description="selected sequences that quote held-out text: not trained on, or are"
    )

    @model_validator(mode="after")
    def tau_where_it_counts(self) -> Self:
        if (self.method == "random") != (self.tau is None):
            raise ValueError("tau belongs to every method but random")
        if self.batch is not None and self.tau is None:
            raise ValueError("batch belongs to methods with a tau")
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
        """What decides which sequences are selected: all but what becomes of leaks."""
        return self.model_dump(mode="json", exclude={"leaks"})


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
        if len(self.evaluation.random_multiples) > 1 and self.target.training.schedule != "wsd":
            raise ValueError(
                "several random_multiples need target.training.schedule: wsd (one trunk, "
                "branched with a full decay); with cosine give random_multiples: [1]"
            )
        return self

    def domain(self, name: str) -> Domain:
        return next(d for d in self.domains if d.name == name)

    def arm(self, name: str) -> Arm:
        return next(a for a in self.arms if a.name == name)


def load(path: Path) -> Recipe:
    """Read a recipe from a YAML file.

    Raises InputError, one line, for a file that is not there, not YAML or not a valid recipe.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise InputError(
            f"recipe {path}: not valid YAML ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"recipe {path}: must be a mapping of keys to values")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"recipe {path}: {_first_problem(error)}") from error
    return _with_paths(recipe, path.resolve().parent)


def _first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic report as 'field.path: what is wrong'."""
    problems = error.errors()
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"]) or "the recipe"
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = "unknown key; remove it or correct its spelling"
    elif first["type"] == "missing":
        what = "missing; add it"
    elif not isinstance(first["input"], dict | list | BaseModel):
        what += f" (got {first['input']!r})"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {what}{more}"


S = TypeVar("S", bound=Section)


def _unique_names(section: S, *fields: str) -> S:
    for field in fields or ("sources",):
        names = [part.name for part in getattr(section, field)]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"{field}: the name {twice[0]} stands twice")
    return section


def _with_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Expand variables and anchor relative paths, so that the recipe means one thing anywhere."""
    beside = Path(glob.escape(str(folder)))

    def source(s: Source, where: str) -> Source:
        return s.model_copy(update={"files": _expand(s.files, beside, f"{where}.{s.name}.files")})

    def local(path: str | None, where: str) -> str | None:
        # A hub name such as 'EleutherAI/pythia-160m' has no leading dot or slash and stays.
        if path is None or not path.startswith((".", "/", "~", "$", "{")):
            return path
        return _expand(path, folder, where)

    corpus = recipe.corpus.model_copy(
        update={"sources": [source(s, "corpus.sources") for s in recipe.corpus.sources]}
    )
    domains = [
        d.model_copy(update={"sources": [source(s, f"domains.{d.name}") for s in d.sources]})
        for d in recipe.domains
    ]
    prior = recipe.prior.model_copy(update={"path": local(recipe.prior.path, "prior.path")})
    tokenizer = recipe.tokenizer.model_copy(
        update={"path": local(recipe.tokenizer.path, "tokenizer.path")}
    )
    return recipe.model_copy(
        update={"corpus": corpus, "domains": domains, "prior": prior, "tokenizer": tokenizer}
    )


def _expand(path: str, folder: Path, where: str) -> str:
    expanded = os.path.expandvars(path.replace("{stdlib}", sysconfig.get_path("stdlib")))
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset:
        raise InputError(
            f"recipe: {where}: the environment variable {unset.group(1)} is not set; set it to "
            "the folder that holds the data"
        )
    if "://" in expanded:
        return expanded
    return str(folder / Path(expanded).expanduser())
