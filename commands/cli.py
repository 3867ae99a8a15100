"""The command line: run the pipeline, see what stands, open the web UI."""

import gc
import json
import logging
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich import box
from rich.table import Table

from colorfilter.errors import InputError
from colorfilter.storage.files import write_text_atomically
from commands.audit.command import audit
from commands.backup.command import backup, restore
from commands.explain.command import explain
from commands.forget.command import forget
from commands.openlineage.command import openlineage
from commands.options import (
    DebugOption,
    HomeOption,
    RecipeOption,
    artifacts_of,
    console,
    errors,
    load_recipe,
    open_home,
    say_what_arrived,
)
from commands.prune import prune
from pipelines import settings

if TYPE_CHECKING:
    from pipelines.run import Failure

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"colorfilter {version('colorfilter')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """CoLoR-Filter: choose pre-training data by conditional minus prior loss."""


@app.command()
def run(
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
    job: Annotated[
        settings.Job, typer.Option("--job", help="A part of the pipeline.")
    ] = settings.Job.EVERYTHING,
    debug: DebugOption = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the recipe, say what would run and what it costs."),
    ] = False,
) -> None:
    """Run the whole pipeline, from raw text to the report, or a part of it.

    refresh: read and score what has arrived, select anew over everything. rescore: score with the
    models as they are. reselect: select anew; no model is loaded. retrain: a new sample of the
    corpus, auxiliary models, scores, datasets. evaluate: target models and the report.

    What stands already is found and not computed again; an interrupted run goes on where it was.
    Exit code 0: it ran; 1: it failed; 2: the input is wrong. A dry run opens no source and writes
    nothing.
    """
    from commands.display import print_report, show_progress
    from pipelines.run import bring_in, execute, refuse_missing_packages

    if dry_run:
        _dry_run(recipe, home)
        return
    plan, place = open_home(recipe, home)
    refuse_missing_packages(plan)
    console.print(f"recipe [bold]{plan.name}[/], home {place.root}")
    say_what_arrived(bring_in(plan, place))
    with show_progress(console) as listener:
        failure = execute(plan, place, listener, job)
    if failure:
        _give_up(failure, debug)
    if job in {settings.Job.EVERYTHING, settings.Job.EVALUATE}:
        print_report(console, plan, place)
    console.print(f"ledger    {artifacts_of(place).ledger.head()}", highlight=False)


def _give_up(failure: "Failure", debug: bool) -> NoReturn:
    """Say why a run failed and end."""
    if debug and failure.details:
        errors.print(failure.details, markup=False, highlight=False)
    if failure.input_is_wrong:
        raise InputError(failure.message)
    errors.print(f"failed: {failure.message}", markup=False, highlight=False)
    hint = "" if debug else " (--debug shows more)"
    errors.print(f"What was finished stands; run again to go on from there{hint}.")
    raise typer.Exit(1)


@app.command()
def select(
    domain: Annotated[str, typer.Option(help="A domain of the recipe.")],
    tau: Annotated[float, typer.Option(help="Keep the best 1/tau.")],
    method: Annotated[str, typer.Option(help="color or conditional_only.")] = "color",
    batch: Annotated[
        int | None, typer.Option(help="The best so many of every random tau * batch.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Refuse if it selects fewer (default: the recipe's training_tokens)."),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine", help="Score what lies near the cutoff again in float32; loads models."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would change, and write nothing.")
    ] = False,
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
    debug: DebugOption = False,
) -> None:
    """Select by the standing scores at any tau, and write the dataset of it.

    Says how the selection differs from the last one. Takes seconds: no model is loaded, unless
    --refine asks for it.
    """
    from commands.display import show_progress
    from pipelines.run import Failure
    from pipelines.run import select as run_select

    plan, place = open_home(recipe, home)
    choice = {"domain": domain, "tau": tau, "method": method, "refine": refine, "dry_run": dry_run}
    choice |= {k: v for k, v in (("batch", batch), ("tokens", tokens)) if v is not None}
    with show_progress(console) as listener:
        found = run_select(plan, place, listener, choice)
    if isinstance(found, Failure):
        _give_up(found, debug)
    for fact, value in found.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        console.print(f"{fact.replace('_', ' '):<24} {shown}", highlight=False, soft_wrap=True)


@app.command()
def cost(
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
    corpus_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to choose from; by default the least that the arms need."),
    ] = None,
    domain_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a domain's text; by default left out.")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            help="Sustained rate of one device; by default what was measured in the home."
        ),
    ] = None,
) -> None:
    """Say what a recipe costs, before it runs: model forwards, FLOPs and time of every stage.

    Opens no source and writes nothing. Where the recipe has run in the home, what it took stands
    beside it.
    """
    from colorfilter.config.load import load
    from commands.cost import print_cost
    from resources.home import Home

    plan = load(settings.recipe_path(recipe), sources=False)
    print_cost(console, plan, Home(home), corpus_tokens, domain_tokens, tflops)


@app.command()
def status(
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Say what stands in the home, and what is behind its inputs."""
    from assets.common import shard_names
    from pipelines.graph import build_definitions

    plan, place = open_home(recipe, home)
    artifacts = artifacts_of(place)
    entries = artifacts.entries()
    shards = shard_names(artifacts, plan) if place.shards() else []
    table = Table("asset", "stands", "behind", "last recorded", box=box.SIMPLE)
    graph = build_definitions(plan, str(place.root)).resolve_asset_graph()
    for key in graph.toposorted_asset_keys:
        asset = key.to_user_string()
        wanted: list[str | None] = [None]
        if graph.get(key).is_partitioned:
            wanted = [*shards]
        elif asset.endswith(("/target_model", "/finetuned_model")):
            arm = plan.arm(key.path[-2])
            wanted = [f"seed_{seed}" for seed in plan.seeds(arm)]
        there = [entries[(asset, p)] for p in wanted if (asset, p) in entries]
        behind = sum(artifacts.is_behind(e) for e in there)
        latest = max((e["recorded"] for e in there), default="-")
        table.add_row(asset, f"{len(there)} of {len(wanted)}", str(behind or "-"), latest)
    console.print(table)


for command in (audit, explain, openlineage, prune, forget, backup, restore):
    app.command()(command)


@app.command()
def ui(
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 3000,
) -> None:
    """Start Dagster's web UI and daemon over the home, on loopback only."""
    from pipelines.run import bring_in

    plan, place = open_home(recipe, home)
    _refuse_taken(port)
    say_what_arrived(bring_in(plan, place))
    # Dagster's own: that `dagster dev` has a successor, that backfill policies are beta.
    os.environ["PYTHONWARNINGS"] = (
        "ignore:Function `dev_command` is superseded,ignore:Parameter `backfill_policy` of"
    )
    workspace = place.dagster / "workspace.yaml"
    write_text_atomically(workspace, json.dumps({"load_from": [{"python_file": _definitions()}]}))
    console.print(
        "starting Dagster's code server, web server and daemon: 15 s, on a busy machine "
        f"a minute; then: http://127.0.0.1:{port}  (Ctrl-C ends it)",
        highlight=False,
        soft_wrap=True,
    )
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(workspace)]
    command += ["-h", "127.0.0.1", "-p", str(port)]
    os.chdir(place.root)  # away from the checkout's dagster.yaml, which is not this instance's
    os.execv(sys.executable, command)  # noqa: S606


def _definitions() -> dict[str, str]:
    """Where the web server finds the assets, in a checkout and in an installed package alike."""
    root = Path(__file__).resolve().parent.parent
    return {
        "relative_path": str(root / "pipelines" / "definitions.py"),
        "working_directory": str(root),
        "location_name": "colorfilter",
    }


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"port {port} is in use; name another with --port") from error


def _dry_run(recipe: str, home: Path) -> None:
    from commands.cost import print_plan
    from pipelines.run import refuse_missing_packages
    from resources.home import Home

    plan = load_recipe(recipe)
    place = Home(home)
    place.check(plan.name)
    refuse_missing_packages(plan)
    print_plan(console, plan, place)


INTERRUPTED = 130  # the exit code that typer gives for Ctrl-C


def call(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default this process's own; returns its exit code.

    Bad input is one line and exit code 2.
    """
    try:
        app(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        if code == INTERRUPTED:
            errors.print("stopped; run again to go on from there")
        return code
    except InputError as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def main() -> None:
    """Entry point of the program."""
    warnings.filterwarnings("ignore", module="dagster")
    for library in ("transformers", "openlineage"):
        logging.getLogger(library).setLevel(logging.ERROR)
    code = call()
    if gpu := sys.modules.get("resources.gpu"):
        gpu.release()
        gc.collect()  # else Python reports semaphores of the workers as leaked
    sys.stdout.flush()
    sys.stderr.flush()
    # Leave without the interpreter's teardown, in which DuckDB 2.0 prints a page of leak reports.
    os._exit(code)


if __name__ == "__main__":
    main()
