"""The definitions that Dagster loads, for the recipe and home set in the environment."""

from pipelines import settings
from pipelines.graph import build_definitions

defs = build_definitions(settings.recipe(), str(settings.home()))
