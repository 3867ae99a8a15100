"""Automation: new files, the refresh schedule, and what each job leaves unchanged."""

from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import fsspec
import pytest

from assets.common import SHARDS
from assets.corpus.sources import reading
from colorfilter.config.recipe import Recipe
from colorfilter.errors import InputError
from colorfilter.storage.files import lock
from pipelines.automation import due
from pipelines.graph import build_definitions
from pipelines.jobs import JOBS
from pipelines.partitions import RANGE_END, RANGE_START
from pipelines.settings import Job
from resources.artifacts import ArtifactStore
from resources.score_store import ScoreStore
from tests.conftest import Project, made_since, write_corpus
from tests.program import colorfilter

NIGHT = datetime(2026, 11, 24, 3, tzinfo=UTC)


def partitions(instance: dg.DagsterInstance) -> set[str]:
    return set(instance.get_dynamic_partitions(str(SHARDS.name)))


def artifacts(project: Project) -> dict[str, ArtifactStore]:
    return {"artifacts": ArtifactStore(home=str(project.home.root))}


def planned(project: Project) -> set[str]:
    return {s.name for s in project.home.shards()}


def look(
    project: Project, instance: dg.DagsterInstance, cursor: str | None = None
) -> tuple[str | None, str]:
    """A tick of the sensor, its requests carried out; the cursor, and what it says."""
    defs = build_definitions(project.recipe, str(project.home.root))
    sensor = defs.resolve_sensor_def("arrivals")
    with dg.build_sensor_context(
        instance=instance, cursor=cursor, definitions=defs, resources=artifacts(project)
    ) as context:
        seen = sensor.evaluate_tick(context)
    assert not seen.run_requests
    for request in seen.dynamic_partitions_requests:
        name, keys = request.partitions_def_name, list(request.partition_keys)
        if isinstance(request, dg.AddDynamicPartitionsRequest):
            instance.add_dynamic_partitions(name, keys)
        else:
            for key in keys:
                instance.delete_dynamic_partition(name, key)
    return seen.cursor or cursor, str(seen.skip_message)


def tick(project: Project, instance: dg.DagsterInstance) -> dg.RunRequest | str:
    """A tick of the schedule: the run it asks for, or why there is none."""
    defs = build_definitions(project.recipe, str(project.home.root))
    schedule = defs.resolve_schedule_def("refresh")
    with dg.build_schedule_context(
        instance=instance, scheduled_execution_time=NIGHT, resources=artifacts(project)
    ) as context:
        found = schedule.evaluate_tick(context)
    if found.run_requests:
        (request,) = found.run_requests
        return request
    return str(found.skip_message)


# Arrivals ------------------------------------------------------------------------------------


def test_what_arrives_during_a_run_is_planned_when_it_has_ended(
    movable: Project, tmp_path: Path
) -> None:
    """Else the steps of the run that are to come would miss what no step of it has made."""
    standing = planned(movable)
    with dg.DagsterInstance.get() as instance:
        cursor, _ = look(movable, instance)
        with lock(movable.home.run_lease("some")):
            assert look(movable, instance, cursor)[1] == "nothing has changed at the sources"
            write_corpus(tmp_path / "corpus", ["textwrap"])
            same, words = look(movable, instance, cursor)
            assert same == cursor
            assert words == "changes are planned when the current run has finished"
            assert isinstance(tick(movable, instance), str)
            done = colorfilter(
                *("prune", "--vanished", "--yes", "--recipe", str(movable.path)),
                *("--home", str(movable.home.root)),
            )
            assert done.returncode == 2
            assert "a run is at work" in done.stderr
            assert planned(movable) == standing
        cursor, words = look(movable, instance, cursor)
        assert words == "1 new shards, 0 retired"
        assert len(planned(movable)) == len(standing) + 1


def test_arrivals_become_shards_once(movable: Project, tmp_path: Path) -> None:
    standing = planned(movable)
    with dg.DagsterInstance.get() as instance:
        cursor, words = look(movable, instance)
        assert partitions(instance) == standing | {"_probe_reference"}
        assert look(movable, instance, cursor) == (cursor, "nothing has changed at the sources")
        again, words = look(movable, instance)  # as with a cursor that was lost
        assert (again, words) == (cursor, "0 new shards, 0 retired")

        write_corpus(tmp_path / "corpus", ["textwrap"])
        cursor, words = look(movable, instance, cursor)
        assert words == "1 new shards, 0 retired"
        (new,) = planned(movable) - standing
        assert partitions(instance) == standing | {"_probe_reference", new}

        (tmp_path / "corpus" / "textwrap.jsonl").unlink()  # never read, so nothing is lost
        cursor, words = look(movable, instance, cursor)
        assert words == "0 new shards, 1 retired"
        assert planned(movable) == standing


def test_a_shard_of_a_source_that_the_recipe_no_longer_has_is_refused_until_it_is_retired(
    movable: Project,
) -> None:
    (source,) = movable.facts["corpus"]["sources"]
    movable.facts["corpus"]["sources"] = [{**source, "name": "other"}]
    movable.write()
    with pytest.raises(InputError, match="the recipe no longer has its source 'code'; use"):
        reading(movable.recipe, movable.home.shards()[0])
    with dg.DagsterInstance.get() as instance:
        _, words = look(movable, instance)
    assert words == "6 new shards, 6 retired"


def test_what_has_vanished_is_told_and_kept(
    movable: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    standing, before = planned(movable), len(movable.ledger())
    gone = min((tmp_path / "corpus").glob("*.jsonl"))
    gone.unlink()
    with dg.DagsterInstance.get() as instance:
        look(movable, instance)
    assert f"code/{gone.name} has disappeared; its text is kept" in capfd.readouterr().err
    assert planned(movable) == standing
    files = [f for s in movable.home.shards() for f in s.files]
    assert [f.path for f in files if f.vanished] == [gone.name]
    assert movable.run(monkeypatch) is None
    assert made_since(movable, before) == {}
    with dg.DagsterInstance.get() as instance:
        key = dg.AssetCheckKey(dg.AssetKey("raw_corpus"), "sources_present")
        records = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])
        evaluation = records[key].event.dagster_event.event_specific_data
    assert not evaluation.passed
    assert gone.name in evaluation.description


def test_of_ten_thousand_files_none_is_opened(
    movable: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(10_000):
        (tmp_path / "corpus" / f"many_{i:05d}.jsonl").write_bytes(b"not JSON")
    opened = []
    monkeypatch.setattr(fsspec.AbstractFileSystem, "open", lambda *of, **how: opened.append(of))
    with dg.DagsterInstance.get() as instance:
        _, words = look(movable, instance)
    assert words.endswith(" new shards, 0 retired")
    assert sum(len(s.files) for s in movable.home.shards()) > 10_000
    assert not opened


# The schedule --------------------------------------------------------------------------------


def test_the_schedule_asks_for_what_is_due_and_nothing_else(
    movable: Project, tmp_path: Path
) -> None:
    with dg.DagsterInstance.get() as instance:
        look(movable, instance)
        assert tick(movable, instance) == "all shards are read and scored"
        standing = planned(movable)
        write_corpus(tmp_path / "corpus", ["textwrap"])
        request = tick(movable, instance)  # whether the sensor is on or not
        assert isinstance(request, dg.RunRequest)
        (new,) = planned(movable) - standing
        assert (request.tags[RANGE_START], request.tags[RANGE_END]) == (new, new)
        assert request.run_key == NIGHT.isoformat()


def test_what_failed_half_way_is_finished_at_the_next_hour(
    movable: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    write_corpus(tmp_path / "corpus", ["textwrap"])
    with monkeypatch.context() as patched:
        patched.setattr(ScoreStore, "publish", fail)
        assert movable.run(patched, Job.REFRESH) is not None
    store = artifacts(movable)["artifacts"]
    with dg.DagsterInstance.get() as instance:
        assert due(store, movable.recipe, [*planned(movable), "_probe_reference"]) == []
        assert isinstance(tick(movable, instance), dg.RunRequest)
    assert movable.run(monkeypatch, Job.REFRESH) is None
    with dg.DagsterInstance.get() as instance:
        assert tick(movable, instance) == "all shards are read and scored"


def test_without_models_nothing_is_refreshed(movable: Project, tmp_path: Path) -> None:
    (tmp_path / "fresh").mkdir()
    fresh = Project(tmp_path / "fresh", movable.facts)
    fresh.home.claim(fresh.recipe.name)
    with dg.DagsterInstance.get() as instance:
        skipped = "prior_model does not exist yet: run the job everything once"
        assert tick(fresh, instance) == skipped


def test_the_hour_is_the_recipes(finished: Project) -> None:
    facts = {**finished.facts, "refresh": {"cron": "30 2 * * 1", "time_zone": "Europe/Berlin"}}
    defs = build_definitions(Recipe.model_validate(facts), "/nowhere")
    schedule = defs.resolve_schedule_def("refresh")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("30 2 * * 1", "Europe/Berlin")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED


@pytest.mark.parametrize("wrong", [{"cron": "sometimes"}, {"time_zone": "Mars/Olympus"}])
def test_an_hour_that_cannot_be_is_refused(finished: Project, wrong: dict[str, str]) -> None:
    recipe = Recipe.model_validate({**finished.facts, "refresh": wrong})
    with pytest.raises(InputError, match=r"^refresh: invalid cron .* or time_zone .*: give five"):
        build_definitions(recipe, "/nowhere")


# The jobs ------------------------------------------------------------------------------------


def test_refreshing_scores_the_new_shard_and_publishes_a_new_dataset(
    movable: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(home=str(movable.home.root))
    dataset = store.current("reference/color_tau4/filtered_dataset")
    before, kernels = len(movable.ledger()), len(movable.kernel_runs())
    standing = planned(movable)
    write_corpus(tmp_path / "corpus", ["textwrap"])
    assert movable.run(monkeypatch, Job.REFRESH) is None
    (new,) = planned(movable) - standing
    runs = movable.kernel_runs()[kernels:]
    assert {(r["verb"], r["shard"]) for r in runs} == {("score", new)}
    made = made_since(movable, before)
    for asset in ("raw_corpus", "corpus_tokens", "prior_scores"):
        assert made[asset] == {new}
    assert made["reference/color_tau4/filtered_dataset"] == {None}
    assert not any("model" in asset or "evaluation" in asset for asset in made)
    assert dataset.path.exists()
    assert store.current("reference/color_tau4/filtered_dataset").path != dataset.path
    assert due(store, movable.recipe, sorted(planned(movable))) == []


@pytest.mark.slow
def test_retraining_draws_a_new_sample_and_running_everything_keeps_it(
    movable: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus", ["textwrap", "shlex"])
    movable.facts["target"]["training_tokens"] = 800
    movable.write()
    assert movable.run(monkeypatch, Job.REFRESH) is None
    before = len(movable.ledger())
    assert movable.run(monkeypatch, Job.RETRAIN) is None
    made = made_since(movable, before)
    assert {"sample_plan", "tokenizer", "prior_model", "prior_scores"} <= made.keys()
    assert not any(asset.endswith("target_model") for asset in made)
    before = len(movable.ledger())
    assert movable.run(monkeypatch) is None
    made = made_since(movable, before)
    assert not {"sample_plan", "tokenizer", "prior_model", "prior_scores"} & made.keys()
    assert "reference/color_tau4/target_model" in made


def test_jobs_hold_what_their_words_say(finished: Project) -> None:
    facts = {**finished.facts, "scoring": {"precision": "bf16"}}
    facts["arms"] = [*facts["arms"], {"method": "rho_down", "tau": 4}]
    recipe = Recipe.model_validate(facts)
    graph = build_definitions(recipe, "/nowhere").resolve_asset_graph()
    held = {job: selection.resolve(graph) for job, (selection, _) in JOBS.items()}
    groups = {job: {graph.get(key).group_name for key in keys} for job, keys in held.items()}
    models = {
        job: {k for k in keys if "pytorch" in graph.get(k).kinds} for job, keys in held.items()
    }
    assert held[Job.EVERYTHING] == set(graph.materializable_asset_keys)
    assert groups[Job.RESELECT] == {"filtered"}
    assert not models[Job.RESELECT]
    assert not any("rho_down" in k.to_user_string() for k in held[Job.RESELECT])
    assert held[Job.RESCORE] | held[Job.RESELECT] < held[Job.REFRESH]
    assert groups[Job.REFRESH] == {"corpus", "scores", "filtered"}
    assert {k.path[-1] for k in models[Job.REFRESH]} == {
        "prior_scores",
        "conditional_scores",
        "domain_only_scores",
        "refined_scores",
    }
    assert not held[Job.RETRAIN] & held[Job.EVALUATE]
    assert held[Job.RETRAIN] | held[Job.EVALUATE] == held[Job.EVERYTHING]
    assert set(JOBS) == set(Job)
