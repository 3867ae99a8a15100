"""How a recipe runs: when, with what care, where. No part of this decides a result."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from colorfilter.config.section import Section


class Limits(Section):
    """How far a selection may be from the last one that was published."""

    overlap: float = Field(
        0.5, ge=0, le=1, description="least share of the smaller of the two that both hold"
    )
    drift: float = Field(
        0.5, ge=0, description="of new shards' mean score, in standard deviations of the others'"
    )
    source_shift: float = Field(
        0.2, ge=0, le=1, description="of a source's share of the selected tokens"
    )
    beyond: Literal["warn", "block"] = Field(
        "warn", description="say so, or leave the last dataset standing as well"
    )


class Refresh(Section):
    """When what has arrived is brought in, once the schedule is switched on, and with what care."""

    cron: str = Field("0 3 * * *", description="minute, hour, day, month, weekday")
    time_zone: str = "UTC"
    stale_after_hours: float | None = Field(
        None,
        gt=0,
        description="a filtered dataset that no run has brought up to date for so long is late: "
        "nothing arrived, or the refresh does not work",
    )
    limits: Limits = Limits.model_validate({})


class Compute(Section):
    """Where models are run. It decides no result: nothing is computed again when it changes."""

    backend: Literal["local", "ray"] = Field("local", description="this machine or a Ray cluster")
    address: str | None = Field(
        None, description="of the cluster; by default RAY_ADDRESS, else one is started here"
    )
    storage: str | None = Field(
        None,
        description="folder or URI (s3://, gs://) that all nodes read and write (default: the home "
        "lies on a file system that all see)",
    )
    workers: Annotated[int, Field(ge=1)] | None = Field(
        None, description="at most so many, to be asked for (default: one per device there is)"
    )

    devices_per_model: int = Field(
        1,
        ge=1,
        description="train each model on so many devices, which divide every batch between them; "
        "the sum over a batch then has another order, and a loss other last digits",
    )

    @model_validator(mode="after")
    def of_a_cluster(self) -> Self:
        of_ray = next(iter(self.facts(without=("backend",))), None)
        if of_ray and self.backend == "local":
            raise ValueError(f"{of_ray} belongs to backend: ray")
        scheme, _, rest = (self.storage or "/").rpartition("://")
        known = rest.strip("/") and scheme != "file" if scheme else rest.startswith("/")
        if not known:
            raise ValueError("storage: give an absolute folder or a URI such as s3://bucket/folder")
        if self.storage and ("@" in self.storage or "?" in self.storage):
            raise ValueError(
                "storage: no credentials in a recipe; its library finds them in the environment"
            )
        return self
