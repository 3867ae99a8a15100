"""Run jobs of the asset graph from a program, in this process."""

import importlib.util
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg
from dagster._core.instance.ref import InstanceRef

from assets.common import SHARDS
from assets.corpus.sources import Arrivals, arrive
from assets.filtered.select_job import SELECT_OP
from colorfilter.config.recipe import Recipe
from colorfilter.data import tasks
from colorfilter.errors import InputError, UnreachableError
from colorfilter.selection import dsir
from pipelines.graph import build_definitions
from pipelines.jobs import RUN_CONFIG
from pipelines.partitions import make_partitions, over
from pipelines.settings import Job
from pipelines.stale_runs import fail_cut_off
from resources.artifacts import ArtifactStore
from resources.home import Home

WRONG_INPUT = {InputError.__name__, UnreachableError.__name__}
Listener = Callable[[dg.EventLogEntry], None]


@dataclass(frozen=True)
class Failure:
    """Why a run failed, in one line; `details` is the error chain with stack traces."""

    message: str
    input_is_wrong: bool
    details: str = ""


def refuse_missing_packages(recipe: Recipe) -> None:
    """Raise InputError if a package that a later stage of the recipe needs is not installed."""
    if any(arm.method == "dsir" for arm in recipe.arms):
        dsir.refuse_without_package()
    if any(domain.tasks for domain in recipe.domains):
        tasks.refuse_without_harness()
    if recipe.compute.backend == "ray" and importlib.util.find_spec("ray") is None:
        raise InputError(
            "compute.backend: the package ray is not installed; run pip install '.[ray]'"
        )


def bring_in(recipe: Recipe, home: Home, *, keep_vanished: bool = True) -> Arrivals:
    """Plan shards for the current files of the sources and make them Dagster's partitions."""
    artifacts = ArtifactStore(home=str(home.root))
    found = arrive(artifacts, recipe, keep_vanished=keep_vanished)
    with dg.DagsterInstance.get() as instance:
        make_partitions(instance, found.shards)
    return found


def execute(
    recipe: Recipe, home: Home, on_event: Listener, job: Job = Job.EVERYTHING
) -> Failure | None:
    """Run a job over all planned shards in this process; return None if it succeeded.

    Sharded and unsharded assets share one run, so a model is loaded once for all shards.
    `on_event` is called with every event of the run as it is logged. Raises KeyboardInterrupt if
    the process was interrupted.
    """
    result = _run(recipe, home, on_event, job.value, RUN_CONFIG.get(job, {}))
    return None if result.success else failure_of(result)


def select(
    recipe: Recipe, home: Home, on_event: Listener, choice: Mapping[str, Any]
) -> Failure | dict[str, Any]:
    """Run the job `select` for a choice (assets.filtered.select_job.Choice).

    Returns what changed, or would change in a dry run, or else why the run failed.
    """
    config = {"ops": {SELECT_OP: {"config": dict(choice)}}}
    result = _run(recipe, home, on_event, "select", config)
    if not result.success:
        return failure_of(result)
    changes: dict[str, Any] = result.output_for_node(SELECT_OP)
    return changes


def _run(
    recipe: Recipe, home: Home, on_event: Listener, job: str, run_config: Mapping[str, Any]
) -> dg.ExecuteInProcessResult:
    home.refuse_exclusive()
    definition = build_definitions(recipe, str(home.root)).resolve_job_def(job)
    run_id = str(uuid.uuid4())
    with _instance(home) as instance:
        shards = instance.get_dynamic_partitions(str(SHARDS.name))
        fail_cut_off(instance, home)
        instance.add_event_listener(run_id, on_event)
        result = definition.execute_in_process(
            instance=instance,
            raise_on_error=False,
            run_id=run_id,
            tags=over(shards, shards) if definition.partitions_def else {},
            run_config={
                **run_config,
                "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
            },
        )
    if any(is_interruption(event) for event in result.all_events):
        raise KeyboardInterrupt
    return result


def is_interruption(event: dg.DagsterEvent) -> bool:
    """Whether a step failed because the process was interrupted; Dagster reports a step failure."""
    error = event.step_failure_data.error if event.is_step_failure else None
    while error and error.cls_name != dg.DagsterExecutionInterruptedError.__name__:
        error = error.cause
    return error is not None


def _instance(home: Home) -> dg.DagsterInstance:
    """Return the home's Dagster instance, without capturing the output of steps.

    The output is in the terminal anyway. Capturing it starts processes that Ctrl-C also reaches,
    and they then print stack traces.
    """
    no_copies = {
        "module": "dagster._core.storage.noop_compute_log_manager",
        "class": "NoOpComputeLogManager",
    }
    return dg.DagsterInstance.from_ref(
        InstanceRef.from_dir(str(home.dagster), overrides={"compute_logs": no_copies})
    )


def failure_of(result: dg.ExecuteInProcessResult) -> Failure:
    """Return the first failure of a run: a failed blocking check, or the error of a step."""
    for check in result.get_asset_check_evaluations():
        if check.blocking and not check.passed and check.severity == dg.AssetCheckSeverity.ERROR:
            where = check.asset_key.to_user_string()
            return Failure(f"check {check.check_name} of {where}: {check.description}", True)
    for event in result.all_events:
        if event.is_step_failure and event.step_failure_data.error:
            error = event.step_failure_data.error
            chain = [error]
            while chain[-1].cause:
                chain.append(chain[-1].cause)
            wrong = next((e for e in chain if e.cls_name in WRONG_INPUT), None)
            if wrong:
                of_class = f"colorfilter.errors.{wrong.cls_name}: "
                message = wrong.message.strip().removeprefix(of_class)
                return Failure(message, True, error.to_string())
            message = f"{event.step_key}: {chain[-1].message.strip()}"
            return Failure(message, False, error.to_string())
    return Failure("the run failed without an error message; see its log in the web UI", False)
