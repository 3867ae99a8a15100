"""What every part of a recipe is: typed, frozen, strict about what it does not know."""

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe. Frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def facts(self, without: Collection[str] = ()) -> dict[str, Any]:
        """The section as plain JSON values: what enters an artifact's key.

        Without what is at its default, so that keys stay when the recipe gains a field. Another
        default is another result: it wants a raised code number where the section is read.
        """
        return self.model_dump(mode="json", exclude_defaults=True, exclude=set(without))
