"""Stages of the pipeline, and the names of artifacts and shards."""

import re
from dataclasses import dataclass
from enum import Enum, StrEnum


class Stage(StrEnum):
    """The step that produces an artifact; the last component of an asset's name."""

    RECIPE = "recipe"
    RAW_CORPUS = "raw_corpus"
    SAMPLE_PLAN = "sample_plan"
    TOKENIZER = "tokenizer"
    CORPUS_TOKENS = "corpus_tokens"
    DOMAIN_TEXT = "domain_text"
    DOMAIN_TOKENS = "domain_tokens"
    PRIOR_MODEL = "prior_model"
    CONDITIONAL_MODEL = "conditional_model"
    DOMAIN_ONLY_MODEL = "domain_only_model"
    PRIOR_SCORES = "prior_scores"
    CONDITIONAL_SCORES = "conditional_scores"
    DOMAIN_ONLY_SCORES = "domain_only_scores"
    SCORE_TABLES = "score_tables"
    REFINED_SCORES = "refined_scores"
    CUTOFF_CONFIDENCE = "cutoff_confidence"
    SELECTION = "selection"
    LEAKAGE = "leakage"
    FILTERED_DATASET = "filtered_dataset"
    TARGET_MODEL = "target_model"
    FINETUNED_MODEL = "finetuned_model"
    EVALUATION = "evaluation"
    REPORT = "report"
    FORGOTTEN = "forgotten"


@dataclass(frozen=True)
class ArtifactName:
    """The name of an artifact or of a folder in it: `<domain>/<arm>/<stage>/<part>[<partition>]`.

    `partition` is a shard, a target model's seed, or another key of the asset's partitions.
    """

    stage: Stage
    domain: str | None = None
    arm: str | None = None
    part: str | None = None
    partition: str | None = None

    @classmethod
    def parse(cls, name: str) -> "ArtifactName":
        """Split a name into its components. Raises ValueError if none of them is a stage.

        No domain has the name of a stage (colorfilter.config.recipe), so parsing is unambiguous.
        """
        found = re.fullmatch(r"([^\[]+)(?:\[(.*)\])?", name)
        words = found[1].split("/") if found else []
        at = next((i for i, word in enumerate(words) if word in set(Stage)), None)
        if found is None or at is None or at > 2:
            raise ValueError(f"'{name}' is not the name of an artifact")
        domain, arm = (*words[:at], None, None)[:2]
        return cls(Stage(words[at]), domain, arm, "/".join(words[at + 1 :]) or None, found[2])


class ShardKind(Enum):
    """What a shard holds, by the prefix of its name. Sequences are selected from CORPUS only."""

    CORPUS = ""
    PROBE = "_probe_"
    DRAWN = "_dsir_"

    @classmethod
    def of(cls, shard: str) -> "ShardKind":
        """Return the kind of the shard with this name."""
        return next(
            (kind for kind in (cls.PROBE, cls.DRAWN) if shard.startswith(kind.value)), cls.CORPUS
        )

    def named(self, name: str) -> str:
        """Return the shard name of this kind for a domain; CORPUS returns `name` unchanged."""
        return self.value + name


# SQL condition: `shard` belongs to the corpus.
IN_CORPUS = "NOT starts_with(shard, '_')"
