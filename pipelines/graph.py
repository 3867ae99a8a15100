"""The asset graph of a recipe: all that Dagster is told."""

import dagster as dg

from assets.auxiliary import auxiliary_assets, auxiliary_checks
from assets.confidence import confidence_assets
from assets.corpus import corpus_assets, corpus_checks
from assets.evaluated import evaluated_assets
from assets.filtered import filtered_assets
from assets.leakage import leakage_assets, leakage_checks
from assets.refined import refined_assets
from assets.scores import score_assets, score_checks
from colorfilter.recipe import Recipe
from resources.artifacts import ArtifactStore
from resources.gpu import Gpu
from resources.score_store import ScoreStore

EVERYTHING = "everything"


def build_definitions(recipe: Recipe, home: str) -> dg.Definitions:
    """The asset graph of a recipe, over a home."""
    return dg.Definitions(
        assets=[
            *corpus_assets(recipe),
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
            *auxiliary_checks(recipe),
            *score_checks(recipe),
            *leakage_checks(recipe),
        ],
        resources={
            "artifacts": ArtifactStore(home=home),
            "gpu": Gpu(home=home),
            "score_store": ScoreStore(home=home),
        },
        jobs=[
            dg.define_asset_job(
                EVERYTHING,
                selection=dg.AssetSelection.all(),
                description="The whole pipeline, from raw text to the report. What stands already "
                "is not computed again.",
            )
        ],
        executor=dg.in_process_executor,
    )
