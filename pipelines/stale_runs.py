"""Runs that a kill or a power cut has cut off: failed, so that others need not wait for them."""

import time

import dagster as dg

from resources.artifacts import ArtifactStore
from resources.home import Home

# A run counts as started some moments before its process can show that it lives, in seconds.
BEGINNING = 3


def fail_cut_off(instance: dg.DagsterInstance, home: Home) -> list[str]:
    """Fail the runs whose processes are gone, and free the pools they hold; returns their ids.

    Otherwise such a run counts as started for ever, and the next one waits for its device.
    """
    statuses = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]

    def without_process() -> dict[str, dg.DagsterRun]:
        runs = instance.get_runs(dg.RunsFilter(statuses=statuses))
        return {run.run_id: run for run in runs if not home.run_is_alive(run.run_id)}

    seen = without_process()
    if not seen:
        return []
    time.sleep(BEGINNING)
    dead = {run_id: run for run_id, run in without_process().items() if run_id in seen}
    for run_id, run in dead.items():
        instance.report_run_failed(run, "its process is gone; what it finished stands")
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)
        home.run_lease(run_id).unlink(missing_ok=True)
    return list(dead)


@dg.sensor(
    name="cut_off_runs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Fails runs whose process is gone, as after a power cut, so that the device is "
    "free for the next. What they finished stands, and another run goes on from there.",
)
def cut_off_runs(context: dg.SensorEvaluationContext, artifacts: ArtifactStore) -> dg.SkipReason:
    """Looks for runs that were cut off."""
    dead = fail_cut_off(context.instance, artifacts.at)
    return dg.SkipReason(f"cut off: {', '.join(dead)}" if dead else "no run was cut off")
