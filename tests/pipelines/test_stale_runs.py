"""Runs whose process is gone are marked as failed, and no others."""

import dagster as dg
import pytest

from colorfilter.storage.files import lock
from pipelines import stale_runs
from pipelines.stale_runs import cut_off_runs, fail_cut_off
from resources.artifacts import ArtifactStore
from resources.home import Home


@dg.job
def anything() -> None:
    """A job of no steps."""


@pytest.fixture
def home(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setattr(stale_runs, "BEGINNING", 0)
    return Home(tmp_path / "home").claim("tests")


def started(instance: dg.DagsterInstance, status=dg.DagsterRunStatus.STARTED) -> str:
    return instance.create_run_for_job(anything, status=status).run_id


def test_a_run_without_a_process_is_failed_and_one_at_work_is_not(home: Home) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        dead, canceling, alive = started(instance), started(instance), started(instance)
        instance.report_run_canceling(instance.get_run_by_id(canceling))
        waiting = started(instance, dg.DagsterRunStatus.NOT_STARTED)
        lock(home.run_lease(dead)).close()  # held once, by a process that is gone
        with lock(home.run_lease(alive)):
            assert sorted(fail_cut_off(instance, home)) == sorted([dead, canceling])
        status = {run.run_id: run.status for run in instance.get_runs()}
        assert status[dead] == status[canceling] == dg.DagsterRunStatus.FAILURE
        assert status[alive] == dg.DagsterRunStatus.STARTED
        assert status[waiting] == dg.DagsterRunStatus.NOT_STARTED
        assert not home.run_lease(dead).exists()


def test_the_device_that_a_dead_run_holds_is_free_for_the_next(home: Home) -> None:
    with dg.DagsterInstance.local_temp(str(home.dagster)) as instance:
        slots = instance.event_log_storage
        slots.set_concurrency_slots("device", 1)
        dead, following = started(instance), started(instance, dg.DagsterRunStatus.NOT_STARTED)
        assert slots.claim_concurrency_slot("device", dead, "losses").is_claimed
        assert fail_cut_off(instance, home) == [dead]
        assert slots.claim_concurrency_slot("device", following, "losses").is_claimed


def test_a_run_that_shows_itself_in_the_meantime_is_left_alone(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        run_id = started(instance)
        held = []
        monkeypatch.setattr(
            stale_runs.time, "sleep", lambda _: held.append(lock(home.run_lease(run_id)))
        )
        assert fail_cut_off(instance, home) == []
        assert instance.get_run_by_id(run_id).status == dg.DagsterRunStatus.STARTED
        held[0].close()


def test_a_run_holds_its_lease_while_it_is_at_work(home: Home) -> None:
    seen = []

    @dg.op
    def look(context: dg.OpExecutionContext, artifacts: ArtifactStore) -> None:
        seen.append((artifacts.at.run_is_alive(context.run_id), context.run_id))

    @dg.job(resource_defs={"artifacts": ArtifactStore(home=str(home.root))})
    def job() -> None:
        look()

    assert job.execute_in_process().success
    ((alive, run_id),) = seen
    assert alive
    assert not home.run_is_alive(run_id)
    assert not home.run_lease(run_id).exists()


def test_the_sensor_is_on_from_the_start_and_tells_what_it_failed(home: Home) -> None:
    assert cut_off_runs.default_status == dg.DefaultSensorStatus.RUNNING
    with (
        dg.DagsterInstance.ephemeral() as instance,
        dg.build_sensor_context(
            instance, resources={"artifacts": ArtifactStore(home=str(home.root))}
        ) as context,
    ):
        run_id = started(instance)
        assert run_id in cut_off_runs(context).skip_message
        assert cut_off_runs(context).skip_message == "every started run has a process"
