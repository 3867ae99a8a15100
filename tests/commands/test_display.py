"""What the terminal shows during a run."""

import io
from types import SimpleNamespace
from typing import Any

import dagster as dg
from dagster._core.events import EngineEventData
from rich.console import Console

from assets.common import Progress
from commands.display import show_progress


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
    assert line == (
        "waits  books/conditional_model: another run is using its device or the score tables"
    )


def test_how_far_a_step_is_is_drawn() -> None:
    @dg.op
    def books__prior(context: dg.OpExecutionContext) -> None:
        Progress(context, 1_000, "tokens")(250)

    @dg.job(executor_def=dg.in_process_executor)
    def alone() -> None:
        books__prior()

    written = io.StringIO()
    with show_progress(Console(file=written, width=120, force_terminal=True)):
        alone.execute_in_process()
    assert "books/prior" in written.getvalue()
    assert " 25 %" in written.getvalue()
