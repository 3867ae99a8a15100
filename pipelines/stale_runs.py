"""Mark runs whose process was killed as failed, so that other runs do not wait for them."""

import time

import dagster as dg

from resources.artifacts import ArtifactStore
from resources.home import Home

# Dagster marks a run as started before its process has locked its lease: wait this many seconds.
BEGINNING = 3


def fail_cut_off(instance: dg.DagsterInstance, home: Home) -> list[str]:
    """Fail runs whose process no longer exists, free the pools they hold, and return their ids.

    Otherwise Dagster considers the run started forever, and the next run waits for its device.
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
        instance.report_run_failed(
            run, "the process of this run no longer exists; what it finished is kept"
        )
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)
        home.run_lease(run_id).unlink(missing_ok=True)
    return list(dead)


@dg.sensor(
    name="cut_off_runs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Marks runs whose process no longer exists (killed, power cut) as failed, so that "
    "the device is free for the next run. What they finished is kept; the next run resumes from "
    "there.",
)
def cut_off_runs(context: dg.SensorEvaluationContext, artifacts: ArtifactStore) -> dg.SkipReason:
    """Fail runs whose process no longer exists."""
    dead = fail_cut_off(context.instance, artifacts.at)
    failed = f"marked as failed: {', '.join(dead)}"
    return dg.SkipReason(failed if dead else "every started run has a process")
