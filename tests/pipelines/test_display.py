"""What the terminal shows of a run's events."""

import io
from types import SimpleNamespace
from typing import Any

import dagster as dg
from dagster._core.events import EngineEventData
from rich.console import Console

from pipelines.display import show_progress


def engine_event(metadata: dict[str, Any]) -> Any:
    event = dg.DagsterEvent(
        event_type_value="ENGINE_EVENT",
        job_name="everything",
        step_key="books__conditional_model",
        event_specific_data=EngineEventData(metadata=metadata),
    )
    return SimpleNamespace(dagster_event=event)


def test_a_step_that_waits_for_another_run_says_so_once() -> None:
    written = io.StringIO()
    waits, other = engine_event({"pool": dg.MetadataValue.pool("gpu")}), engine_event({})
    with show_progress(Console(file=written, width=120)) as listener:
        for event in (other, waits, waits):
            listener(event)
    (line,) = [line for line in written.getvalue().splitlines() if line.strip()]
    assert line == "waits  books/conditional_model: another run is using its device or the scores"
