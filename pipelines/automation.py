"""The sensor that detects new data at the sources and the schedule that processes it."""

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
    """Return the sensor that plans new, changed and missing source files into shards."""

    @dg.sensor(
        name="arrivals",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Checks the recipe's sources once a minute. New and changed files become new "
        "shards. A file that has disappeared is reported, and its text is kept. The sensor only "
        "lists files and starts no run: to process new shards, switch on the schedule `refresh` "
        "or launch the job `refresh`.",
    )
    def arrivals(
        context: dg.SensorEvaluationContext, artifacts: ArtifactStore
    ) -> dg.SensorResult | dg.SkipReason:
        found = arrive(artifacts, recipe)
        if found.waiting:
            return dg.SkipReason("changes are planned when the current run has finished")
        seen = _digest(artifacts)
        if seen == context.cursor:
            return dg.SkipReason("nothing has changed at the sources")
        _log_arrivals(context, found)
        existing = set(context.instance.get_dynamic_partitions(str(SHARDS.name)))
        added = [s for s in found.shards if s not in existing]
        retired = sorted(existing - set(found.shards))
        changes = (SHARDS.build_add_request, added), (SHARDS.build_delete_request, retired)
        return dg.SensorResult(
            cursor=seen,
            skip_reason=f"{len(added)} new shards, {len(retired)} retired",
            dynamic_partitions_requests=[build(names) for build, names in changes if names],
        )

    return arrivals


def refresh_schedule(recipe: Recipe) -> dg.ScheduleDefinition:
    """Return the schedule that runs the job `refresh` over new data, as `refresh.cron` says.

    Raises InputError for an invalid cron expression or time zone.
    """

    def refresh(
        context: dg.ScheduleEvaluationContext, artifacts: ArtifactStore
    ) -> dg.RunRequest | dg.SkipReason:
        untrained = [m for m in _models(recipe) if (m, None) not in artifacts.entries()]
        if untrained:
            return dg.SkipReason(f"{untrained[0]} does not exist yet: run the job everything once")
        found = arrive(artifacts, recipe)
        _log_arrivals(context, found)
        wanted = due(artifacts, recipe, found.shards)
        if not wanted and not unfinished(artifacts, recipe, found.shards):
            return dg.SkipReason("all shards are read and scored")
        shards = make_partitions(context.instance, found.shards)
        # A run over shards needs at least one. The last one is up to date and is reused.
        wanted = wanted or shards[-1:]
        now = context.scheduled_execution_time or datetime.now(UTC)
        return dg.RunRequest(run_key=now.isoformat(), tags=over(shards, wanted))

    when = recipe.refresh
    try:
        return dg.schedule(
            name="refresh",
            job_name=Job.REFRESH.value,
            cron_schedule=when.cron,
            execution_timezone=when.time_zone,
            description="Processes new data: starts one run of the job `refresh` over the shards "
            "that are not yet read or scored. Starts no run if everything is up to date.",
        )(refresh)
    except dg.DagsterInvalidDefinitionError as error:
        raise InputError(
            f"refresh: invalid cron '{when.cron}' or time_zone '{when.time_zone}': give five "
            "fields such as '0 3 * * *', and a zone such as Europe/Berlin"
        ) from error


def due(artifacts: ArtifactStore, recipe: Recipe, shards: Sequence[str]) -> list[str]:
    """Return the shards whose text, tokens or losses are missing or out of date."""
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
    """Whether score tables, selections or datasets are out of date, as after a failed refresh.

    Only arms that a refresh selects for count. RHO-down arms train a proxy and are not refreshed.
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
    """Return a hash of the planned shards and their files."""
    facts = [shard.facts() for shard in artifacts.at.shards()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _models(recipe: Recipe) -> list[str]:
    return sorted({losses.model for losses in loss_assets(recipe)})


def _log_arrivals(
    context: dg.SensorEvaluationContext | dg.ScheduleEvaluationContext, found: Arrivals
) -> None:
    for name in found.new:
        context.log.info(f"new shard {name}")
    for name in found.retired:
        context.log.info(f"retired shard {name}")
    for file in found.vanished:
        context.log.warning(f"{file} has disappeared; its text is kept")
    for file in found.lost:
        context.log.warning(f"{file} has disappeared; its text is removed from the corpus")
