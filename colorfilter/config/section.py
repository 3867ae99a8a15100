"""Base class of the sections of a recipe."""

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict


class RecipeSection(BaseModel):
    """A section of the recipe: typed, frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def facts(self, without: Collection[str] = ()) -> dict[str, Any]:
        """Return the section as plain JSON values, as they enter an artifact's key.

        Default values are omitted, so that keys stay the same when the recipe gains a field. When a
        default changes, raise the code number of the stages that read the section.
        """
        return self.model_dump(mode="json", exclude_defaults=True, exclude=set(without))
