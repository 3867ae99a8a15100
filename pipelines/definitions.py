"""What Dagster's processes load: the graph of the recipe in the environment, over its home."""

from pipelines import settings
from pipelines.graph import build_definitions

defs = build_definitions(settings.recipe(), str(settings.home()))
