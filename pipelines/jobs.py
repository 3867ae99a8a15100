"""The jobs: named parts of the graph that are useful to run on their own."""

from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster import AssetSelection as Assets

from pipelines.settings import Job

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import (
        UnresolvedAssetJobDefinition,
    )

# Trains a second conditional to measure how stable selections are: evaluation, not scoring.
CONFIDENCE = Assets.key_substring("/cutoff_confidence")
SCORES = Assets.groups("scores") - CONFIDENCE
# Selections computed by a query on the score tables. RHO-down selects in a training run instead.
FILTERED = Assets.groups("filtered")
QUERIED = FILTERED - (FILTERED & Assets.kind("pytorch")).downstream()

JOBS = {
    Job.EVERYTHING: (
        Assets.all(),
        "The whole pipeline, from raw text to the report. Computes only what does not exist yet.",
    ),
    Job.REFRESH: (
        Assets.assets("raw_corpus", "corpus_tokens") | SCORES | QUERIED,
        "Reads, tokenizes and scores new data, then repeats the selections over the whole corpus "
        "and writes their datasets. Cost: scoring the new shards. Unchanged: tokenizer, auxiliary "
        "models, target models, evaluations.",
    ),
    Job.RESCORE: (
        SCORES,
        "Scores every shard with the existing models and publishes the score tables. Cost: the "
        "losses that do not exist yet. Unchanged: all models, selections and datasets.",
    ),
    Job.RESELECT: (
        QUERIED,
        "Selects for every arm from the existing scores and writes the datasets. Cost: seconds, "
        "as no model is loaded. Unchanged: scores and all models.",
    ),
    Job.RETRAIN: (
        Assets.groups("corpus", "auxiliary") | SCORES | FILTERED,
        "Draws a new sample of the current corpus and recomputes everything that depends on it: "
        "tokenizer, auxiliary models, scores of every shard, selections, datasets. Cost: about as "
        "much as the first run of these steps. Unchanged: target models, evaluations.",
    ),
    Job.EVALUATE: (
        Assets.groups("evaluated") | CONFIDENCE,
        "Trains and evaluates target models on the existing datasets, measures how much of each "
        "selection would change with another seed of the conditional, and writes the report. "
        "Cost: training the target models. Unchanged: everything up to the datasets.",
    ),
}


# Run configuration of jobs that do not run with the defaults.
RUN_CONFIG: dict[Job, dict[str, Any]] = {
    Job.RETRAIN: {"ops": {"sample_plan": {"config": {"draw_anew": True}}}}
}


def build_jobs() -> list["UnresolvedAssetJobDefinition"]:
    """Return all jobs except `select`."""
    return [
        dg.define_asset_job(job.value, selection, description=words, config=RUN_CONFIG.get(job))
        for job, (selection, words) in JOBS.items()
    ]
