"""What happens by itself, once it is switched on: arrivals are noticed, and brought in by night."""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime

import dagster as dg

from assets.common import SHARDS
from assets.corpus.sources import Arrivals, arrive, reading
from assets.scores.scores import loss_assets
from colorfilter.config.recipe import ONLINE, Recipe
from colorfilter.errors import InputError
from colorfilter.stages import ArtifactName, Stage
from pipelines.partitions import make_partitions, over
from pipelines.settings import Job
from resources.artifacts import ArtifactStore


def arrivals_sensor(recipe: Recipe) -> dg.SensorDefinition:
    """Files that arrive, change or vanish at the sources, planned into shards as they do."""

    @dg.sensor(
        name="arrivals",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Looks at the recipe's sources. New and changed files become new shards; what "
        "has vanished is told and kept. Reads no file and starts no run: the schedule `refresh` "
        "does, or the job by hand.",
    )
    def arrivals(
        context: dg.SensorEvaluationContext, artifacts: ArtifactStore
    ) -> dg.SensorResult | dg.SkipReason:
        found = arrive(artifacts, recipe)
        if found.waiting:
            return dg.SkipReason("what has changed is planned when the run at work has ended")
        seen = _digest(artifacts)
        if seen == context.cursor:
            return dg.SkipReason("nothing has changed at the sources")
        _tell(context, found)
        standing = set(context.instance.get_dynamic_partitions(str(SHARDS.name)))
        added = [s for s in found.shards if s not in standing]
        retired = sorted(standing - set(found.shards))
        changes = (SHARDS.build_add_request, added), (SHARDS.build_delete_request, retired)
        return dg.SensorResult(
            cursor=seen,
            skip_reason=f"{len(added)} new shards, {len(retired)} retired",
            dynamic_partitions_requests=[build(names) for build, names in changes if names],
        )

    return arrivals


def refresh_schedule(recipe: Recipe) -> dg.ScheduleDefinition:
    """The job `refresh` over what has arrived, at the recipe's hour.

    Raises InputError for an hour that cannot be.
    """

    def refresh(
        context: dg.ScheduleEvaluationContext, artifacts: ArtifactStore
    ) -> dg.RunRequest | dg.SkipReason:
        untrained = [m for m in _models(recipe) if (m, None) not in artifacts.entries()]
        if untrained:
            return dg.SkipReason(f"{untrained[0]} is not there yet: run everything once")
        found = arrive(artifacts, recipe)
        _tell(context, found)
        wanted = due(artifacts, recipe, found.shards)
        if not wanted and not unfinished(artifacts, recipe, found.shards):
            return dg.SkipReason("every shard is read and scored")
        shards = make_partitions(context.instance, found.shards)
        wanted = wanted or shards[-1:]  # found standing: a run over shards has at least one
        now = context.scheduled_execution_time or datetime.now(UTC)
        return dg.RunRequest(run_key=now.isoformat(), tags=over(shards, wanted))

    when = recipe.refresh
    try:
        return dg.schedule(
            name="refresh",
            job_name=Job.REFRESH.value,
            cron_schedule=when.cron,
            execution_timezone=when.time_zone,
            description="Brings in what has arrived: one run over the shards that are not yet read "
            "or scored. Without any there is no run.",
        )(refresh)
    except dg.DagsterInvalidDefinitionError as error:
        raise InputError(
            f"refresh: '{when.cron}' in '{when.time_zone}' is no time: give five fields such as "
            "'0 3 * * *', and a zone such as Europe/Berlin"
        ) from error


def due(artifacts: ArtifactStore, recipe: Recipe, shards: Sequence[str]) -> list[str]:
    """The shards that are not yet read as they are now, or not tokenized and scored from that."""
    entries = artifacts.entries()
    keys = {s.name: reading(recipe, s).key for s in artifacts.at.shards()}
    stages = ["raw_corpus", "corpus_tokens", *(losses.asset for losses in loss_assets(recipe))]

    def is_due(shard: str) -> bool:
        there = [entries.get((stage, shard)) for stage in stages]
        if any(entry is None or artifacts.is_behind(entry) for entry in there):
            return True
        return shard in keys and entries["raw_corpus", shard]["key"] != keys[shard]

    return [shard for shard in shards if is_due(shard)]


def unfinished(artifacts: ArtifactStore, recipe: Recipe, shards: Sequence[str]) -> bool:
    """Whether score tables, selections or datasets are behind, as when a refresh failed half-way.

    Of arms that a refresh selects for: not of RHO-down, which trains a proxy for it.
    """
    entries = artifacts.entries()
    arms = [arm.name for arm in recipe.arms if arm.method not in ONLINE]
    parts = ("selection", "leakage", "filtered_dataset")
    names = [f"{d.name}/{arm}/{part}" for d in recipe.domains for arm in arms for part in parts]
    there = [entries.get((name, None)) for name in ["score_tables", *names]]
    if any(entry is None or artifacts.is_behind(entry) for entry in there):
        return True
    made_of = map(ArtifactName.parse, entries["score_tables", None]["inputs"])
    published = {of.partition for of in made_of if of.stage is Stage.CORPUS_TOKENS}
    return published != set(shards)


def _digest(artifacts: ArtifactStore) -> str:
    """The planned shards, as a short text that differs when they or their files do."""
    facts = [shard.facts() for shard in artifacts.at.shards()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _models(recipe: Recipe) -> list[str]:
    return sorted({losses.model for losses in loss_assets(recipe)})


def _tell(
    context: dg.SensorEvaluationContext | dg.ScheduleEvaluationContext, found: Arrivals
) -> None:
    for name in found.new:
        context.log.info(f"new shard {name}")
    for name in found.retired:
        context.log.info(f"retired shard {name}")
    for file in found.vanished:
        context.log.warning(f"{file} has vanished; its text is kept")
    for file in found.lost:
        context.log.warning(f"{file} is gone, and its text leaves the corpus with it")
