"""What the terminal shows of a run: a line per finished asset, a bar for the one at work."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from assets import common


@contextlib.contextmanager
def show_progress(console: Console) -> Iterator[Callable[[dg.EventLogEntry], None]]:
    """Draw a run while the context lasts; gives the function to call with the run's events."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]} {task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    begun: dict[str, float] = {}
    tasks: dict[str, TaskID] = {}
    checked: set[str | None] = set()

    def work(asset: str, done: int, total: int, unit: str) -> None:
        if asset not in tasks:
            tasks[asset] = bar.add_task(asset, total=total, done="", rate="")
        seconds = time.monotonic() - begun.get(asset, time.monotonic())
        rate = f"{done / seconds:,.0f} {unit}/s" if seconds > 1 else ""
        shown = f"{100 * done / max(1, total):3.0f} %"
        bar.update(tasks[asset], completed=done, total=total, done=shown, rate=rate)

    def event(entry: dg.EventLogEntry) -> None:
        happened = entry.dagster_event
        if happened is None:
            return
        if happened.event_type_value == "STEP_START":
            begun[_asset(happened.step_key)] = time.monotonic()
        elif happened.event_type_value in {"STEP_SUCCESS", "STEP_FAILURE"}:
            if happened.step_key in checked:
                return
            asset = _asset(happened.step_key)
            if asset in tasks:
                bar.remove_task(tasks.pop(asset))
            ended = happened.event_type_value == "STEP_SUCCESS"
            seconds = time.monotonic() - begun.get(asset, time.monotonic())
            mark = "[green]done  [/]" if ended else "[red]failed[/]"
            console.print(f"{mark} {asset:<44} {seconds:7.1f} s", highlight=False)
        elif happened.event_type_value == "ASSET_CHECK_EVALUATION":
            checked.add(happened.step_key)
            check: Any = happened.event_specific_data
            warns = check.severity == dg.AssetCheckSeverity.WARN
            failed = "[yellow]noted [/]" if warns else "[red]failed[/]"
            mark = "[green]passed[/]" if check.passed else failed
            words = f"check {check.check_name}: {check.description}"
            console.print(mark, words, highlight=False, soft_wrap=True)

    common.Progress.listener = work
    try:
        with bar:
            yield event
    finally:
        common.Progress.listener = None


def _asset(step_key: str | None) -> str:
    return (step_key or "").replace("__", "/")
