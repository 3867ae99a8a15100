"""Terminal output: progress bars, a line per finished step of a run, and the final report."""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import dagster as dg
import polars as pl
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from assets.common import LISTENER
from colorfilter.config.recipe import Recipe
from colorfilter.evaluation.report import (
    LOSSES,
    arm_lines,
    comparison_in_a_sentence,
    comparison_in_brief,
    judged_by,
)
from pipelines.run import is_interruption
from resources.artifacts import ArtifactStore
from resources.home import Home


@contextlib.contextmanager
def show_progress(console: Console) -> Iterator[Callable[[dg.EventLogEntry], None]]:
    """Show the progress of a run. Yields the function to call with each of the run's events."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]} {task.fields[rate]}"),
        console=console,
        transient=True,
    )
    begun: dict[str, float] = {}
    tasks: dict[str, TaskID] = {}
    checked: set[str | None] = set()
    waiting: set[str | None] = set()

    def work(asset: str, done: int, total: int, unit: str, per_second: float) -> None:
        if asset not in tasks:
            tasks[asset] = bar.add_task(asset, total=total, done="", rate="")
        seconds = time.monotonic() - begun.get(asset, time.monotonic())
        rate = ""
        if seconds > 1 and per_second > 0:
            left = timedelta(seconds=round(max(0, total - done) / per_second))
            rate = f"{per_second:,.0f} {unit}/s {left} left"
        shown = f"{100 * done / max(1, total):3.0f} %"
        bar.update(tasks[asset], completed=done, total=total, done=shown, rate=rate)

    def event(entry: dg.EventLogEntry) -> None:
        happened = entry.dagster_event
        if happened is None:
            return
        if happened.event_type_value == "STEP_START":
            begun[_asset(happened.step_key)] = time.monotonic()
        elif _is_blocked(happened) and happened.step_key not in waiting:
            waiting.add(happened.step_key)
            asset = _asset(happened.step_key)
            console.print(f"waits  {asset}: another run is using its device or the score tables")
        elif happened.event_type_value in {"STEP_SUCCESS", "STEP_FAILURE"}:
            if happened.step_key in checked:
                return
            asset = _asset(happened.step_key)
            if asset in tasks:
                bar.remove_task(tasks.pop(asset))
            seconds = time.monotonic() - begun.get(asset, time.monotonic())
            console.print(f"{_outcome(happened)} {asset:<44} {seconds:7.1f} s", highlight=False)
        elif happened.event_type_value == "ASSET_CHECK_EVALUATION":
            checked.add(happened.step_key)
            check: Any = happened.event_specific_data
            warns = check.severity == dg.AssetCheckSeverity.WARN
            failed = "[yellow]noted [/]" if warns else "[red]failed[/]"
            mark = "[green]passed[/]" if check.passed else failed
            of = check.asset_key.to_user_string()
            words = f"check {check.check_name} of {of}: {check.description}"
            console.print(mark, words, highlight=False, soft_wrap=True)

    before = LISTENER.set(work)
    try:
        with bar:
            yield event
    finally:
        LISTENER.reset(before)


def _is_blocked(happened: dg.DagsterEvent) -> bool:
    """Return whether a step is waiting for a slot in its pool."""
    return happened.is_engine_event and "pool" in happened.engine_event_data.metadata


def _outcome(happened: dg.DagsterEvent) -> str:
    """Return how a step ended, as rich markup."""
    if not happened.is_step_failure:
        return "[green]done  [/]"
    return "[yellow]stopped[/]" if is_interruption(happened) else "[red]failed[/]"


@contextlib.contextmanager
def show_copying(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of copying. Yields the function to call with bytes done and in total."""
    bar = Progress(
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def show_steps(console: Console) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Show the progress of consecutive steps. Yields the function that begins a step.

    It takes the step's name and size (0 if unknown), and returns the function to call with each
    amount of work done.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )

    def begin(name: str, size: int) -> Callable[[int], None]:
        for task in bar.task_ids:
            bar.remove_task(task)
        step = bar.add_task(name, total=size or None)
        return lambda amount: bar.advance(step, amount)

    with bar:
        yield begin


def print_report(console: Console, plan: Recipe, place: Home) -> None:
    """Print how the arms compare, and the paths of reports, datasets, scores and results."""
    artifacts = ArtifactStore(home=str(place.root))
    for domain in plan.domains:
        report = artifacts.current(f"{domain.name}/report")
        rows = pl.read_parquet(report.path / "evaluations.parquet")
        measured = rows.filter(~pl.col("metric").str.starts_with("tokens_to_match"))
        lines = arm_lines(measured)
        header, brief = comparison_in_brief(lines)
        words = LOSSES[judged_by(measured)].lower().rstrip(",")
        title = f"{domain.name}: {words}, nats per token, lower is better"
        table = Table(title=title, box=box.SIMPLE, pad_edge=False)
        for name in header:
            table.add_column(name, overflow="fold")
        for line in brief:
            table.add_row(*line)
        console.print()
        if sentence := comparison_in_a_sentence(lines):
            console.print(f"{domain.name}: {sentence}", highlight=False)
        console.print(table)
        for fact in rows.filter(pl.col("metric").str.starts_with("probe")).to_dicts():
            console.print(f"{fact['arm']} {fact['metric']}: {fact['value']:.4f}")
        console.print(f"report    {report.path / 'report.html'}", soft_wrap=True)
        for arm in plan.arms:
            made = artifacts.current(f"{domain.name}/{arm.name}/filtered_dataset")
            console.print(f"dataset   {made.path}", soft_wrap=True)
    console.print(f"scores    {place.scores}", soft_wrap=True)
    console.print(f"results   {place.results}", soft_wrap=True)


def _asset(step_key: str | None) -> str:
    return (step_key or "").replace("__", "/")
