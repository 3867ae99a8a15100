"""Operational settings of a recipe: schedule, limits and compute. They change no result."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from colorfilter.config.section import RecipeSection


class Limits(RecipeSection):
    """How much a selection may differ from the last published one."""

    overlap: float = Field(
        0.5,
        ge=0,
        le=1,
        description="minimum number of common sequences, as a share of the smaller selection",
    )
    drift: float = Field(
        0.5,
        ge=0,
        description="maximum shift of the mean score of new shards, in standard deviations of the "
        "other shards' scores",
    )
    source_shift: float = Field(
        0.2,
        ge=0,
        le=1,
        description="maximum change of a source's share of the selected tokens",
    )
    beyond: Literal["warn", "block"] = Field(
        "warn",
        description="beyond a limit, warn only, or also block the new dataset and keep the last",
    )


class Refresh(RecipeSection):
    """The schedule on which new files are read, scored and selected, and limits to changes."""

    cron: str = Field("0 3 * * *", description="minute, hour, day, month, weekday")
    time_zone: str = "UTC"
    stale_after_hours: float | None = Field(
        None,
        gt=0,
        description="hours without an update after which a filtered dataset counts as late: there "
        "were no new files, or the refresh does not work",
    )
    limits: Limits = Limits.model_validate({})


class Compute(RecipeSection):
    """Where models run. Changing this section recomputes nothing."""

    backend: Literal["local", "ray"] = Field("local", description="this machine or a Ray cluster")
    address: str | None = Field(
        None,
        description="address of the cluster (default: RAY_ADDRESS; without it, a cluster is "
        "started on this machine)",
    )
    storage: str | None = Field(
        None,
        description="folder or URI (s3://, gs://) that all nodes read and write (default: the "
        "home, which must then be on a file system shared by all nodes)",
    )
    workers: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="maximum number of workers to request (default: one per available device)",
    )

    devices_per_model: int = Field(
        1,
        ge=1,
        description="number of devices that train each model jointly, each on a part of every "
        "batch; the order of summation then differs, and with it the last digits of a loss",
    )

    @model_validator(mode="after")
    def of_a_cluster(self) -> Self:
        of_ray = next(iter(self.facts(without=("backend",))), None)
        if of_ray and self.backend == "local":
            raise ValueError(f"{of_ray} requires backend: ray; set it or remove {of_ray}")
        scheme, _, rest = (self.storage or "/").rpartition("://")
        known = rest.strip("/") and scheme != "file" if scheme else rest.startswith("/")
        if not known:
            raise ValueError("storage: give an absolute folder or a URI such as s3://bucket/folder")
        if self.storage and ("@" in self.storage or "?" in self.storage):
            raise ValueError(
                "storage: must not contain credentials; provide them in the environment of every "
                "node"
            )
        return self
