"""The jobs: parts of the graph that are worth running by themselves, by name."""

from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster import AssetSelection as Assets

from pipelines.settings import Job

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import (
        UnresolvedAssetJobDefinition,
    )

# Another conditional, trained to see what would change: part of judging, not of scoring.
CONFIDENCE = Assets.key_substring("/cutoff_confidence")
SCORES = Assets.groups("scores") - CONFIDENCE
# What a query on the score tables decides. RHO-down's choices are a training run.
FILTERED = Assets.groups("filtered")
QUERIED = FILTERED - (FILTERED & Assets.kind("pytorch")).downstream()

JOBS = {
    Job.EVERYTHING: (
        Assets.all(),
        "The whole pipeline, from raw text to the report. Costs what is not there yet.",
    ),
    Job.REFRESH: (
        Assets.assets("raw_corpus", "corpus_tokens") | SCORES | QUERIED,
        "What has arrived at the sources is read, tokenized and scored, and what the arms select "
        "is looked up anew over everything. Costs the scoring of new shards. Leaves alone: "
        "tokenizer, auxiliary and target models, evaluations.",
    ),
    Job.RESCORE: (
        SCORES,
        "Losses of every shard by the models as they are, and the score tables. Costs what is not "
        "scored yet by them. Leaves alone: all models, selections and datasets.",
    ),
    Job.RESELECT: (
        QUERIED,
        "What the arms select, and the datasets of it. Costs seconds: no model is loaded. Leaves "
        "alone: scores and all models.",
    ),
    Job.RETRAIN: (
        Assets.groups("corpus", "auxiliary") | SCORES | FILTERED,
        "A new sample of the corpus as it is now, and all that follows from it: tokenizer, "
        "auxiliary models, the scores of every shard, selections, datasets. Costs about as much as "
        "the first run up to there. Leaves alone: target models, evaluations.",
    ),
    Job.EVALUATE: (
        Assets.groups("evaluated") | CONFIDENCE,
        "Target models for the datasets as they are, their evaluations, what another seed of the "
        "conditional would change, and the report. Costs their training. Leaves alone: everything "
        "up to the datasets.",
    ),
}


# What a job configures, where that is not the default.
RUN_CONFIG: dict[Job, dict[str, Any]] = {
    Job.RETRAIN: {"ops": {"sample_plan": {"config": {"draw_anew": True}}}}
}


def build_jobs() -> list["UnresolvedAssetJobDefinition"]:
    """Every job."""
    return [
        dg.define_asset_job(job.value, selection, description=words, config=RUN_CONFIG.get(job))
        for job, (selection, words) in JOBS.items()
    ]
