"""The asset graph of a recipe: all definitions that Dagster receives."""

import dagster as dg

from assets.auxiliary.models import auxiliary_assets, auxiliary_checks
from assets.corpus.corpus import corpus_assets, corpus_checks
from assets.corpus.domains import domain_assets
from assets.corpus.sources import arrival_checks
from assets.evaluated.evaluation import evaluated_assets
from assets.filtered.audit_checks import audit_checks
from assets.filtered.change_checks import change_checks
from assets.filtered.filtered_dataset import filtered_assets
from assets.filtered.leakage import leakage_assets, leakage_checks
from assets.filtered.select_job import select_job
from assets.scores.cutoff_confidence import confidence_assets
from assets.scores.refined_scores import refined_assets
from assets.scores.scores import score_assets, score_checks
from colorfilter.config.load import as_text
from colorfilter.config.recipe import Recipe
from pipelines.automation import arrivals_sensor, refresh_schedule
from pipelines.jobs import build_jobs
from pipelines.stale_runs import cut_off_runs
from resources.artifacts import ArtifactStore
from resources.gpu import Gpu
from resources.score_store import ScoreStore


def build_definitions(recipe: Recipe, home: str) -> dg.Definitions:
    """Return assets, checks, jobs, sensors, schedules and resources of a recipe over a home."""
    return dg.Definitions(
        assets=[
            *corpus_assets(recipe),
            *domain_assets(recipe),
            *auxiliary_assets(recipe),
            *score_assets(recipe),
            *refined_assets(recipe),
            *confidence_assets(recipe),
            *filtered_assets(recipe),
            *leakage_assets(recipe),
            *evaluated_assets(recipe),
        ],
        asset_checks=[
            *corpus_checks(recipe),
            *arrival_checks(),
            *auxiliary_checks(recipe),
            *score_checks(recipe),
            *change_checks(recipe),
            *leakage_checks(recipe),
            *audit_checks(recipe),
        ],
        resources={
            "artifacts": ArtifactStore(home=home, recipe=as_text(recipe)),
            "gpu": gpu_of(recipe, home),
            "score_store": ScoreStore(home=home),
            # Dagster's default would pickle the return values of ops to disk.
            "io_manager": dg.mem_io_manager,
        },
        jobs=[*build_jobs(), select_job(recipe)],
        sensors=[arrivals_sensor(recipe), cut_off_runs],
        schedules=[refresh_schedule(recipe)],
        executor=dg.in_process_executor,
    )


def gpu_of(recipe: Recipe, home: str) -> Gpu:
    """Return the resource for the devices that a recipe runs its models on."""
    return Gpu(home=home, **recipe.compute.model_dump())
