"""The entry point of the command line, and the commands run, select, cost, status and ui."""

import gc
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
import yaml
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
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Select pre-training data for language models with CoLoR-Filter.

    Sequences are ranked by conditional loss minus prior loss; the lowest are kept. Start with
    `colorfilter run`, then `colorfilter status` or `colorfilter ui`.
    """


@app.command()
def run(
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
    job: Annotated[
        settings.Job, typer.Option("--job", help="Part of the pipeline to run; see above.")
    ] = settings.Job.EVERYTHING,
    debug: DebugOption = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the recipe and print what would run and what it costs. Opens no source "
            "and writes nothing.",
        ),
    ] = False,
) -> None:
    """Run the pipeline, from raw text to the report, or one part of it with --job.

    Jobs: everything (default) runs all steps. refresh reads and scores new files, then selects
    again over the whole corpus. rescore scores every shard with the existing models. reselect
    selects again from the existing scores and loads no model. retrain draws a new sample of the
    corpus, trains the auxiliary models, scores and selects. evaluate trains and evaluates the
    target models and writes the report.

    Existing results are reused, and an interrupted run resumes where it stopped. Exit codes:
    0 success, 1 failure, 2 invalid input.
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
    """Print why a run failed and exit with 1. Raises InputError if the input was invalid."""
    if debug and failure.details:
        errors.print(failure.details, markup=False, highlight=False)
    if failure.input_is_wrong:
        raise InputError(failure.message)
    errors.print(f"failed: {failure.message}", markup=False, highlight=False)
    hint = "" if debug else " (--debug prints tracebacks)"
    errors.print(f"Finished work is kept; run the same command again to resume{hint}.")
    raise typer.Exit(1)


@app.command()
def select(
    domain: Annotated[str, typer.Option(help="Name of a domain in the recipe.")],
    tau: Annotated[
        float, typer.Option(help="Keep the 1/tau of the sequences with the lowest scores.")
    ],
    method: Annotated[
        str, typer.Option(help="Score to select by: color or conditional_only.")
    ] = "color",
    batch: Annotated[
        int | None,
        typer.Option(
            help="Keep the best BATCH sequences of every random tau * BATCH, instead of the best "
            "1/tau overall."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Fail if fewer tokens than this are selected (default: training_tokens of the "
            "recipe)."
        ),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Score sequences near the cutoff again in float32. Loads models.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would change; write no dataset.")
    ] = False,
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
    debug: DebugOption = False,
) -> None:
    """Select from the existing scores at any tau, and write the filtered dataset.

    Prints how the selection differs from the last one. Takes seconds, since no model is loaded
    unless --refine is given.
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
        typer.Option(
            help="Tokens in the corpus to choose from (default: the minimum that the arms need)."
        ),
    ] = None,
    domain_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of text per domain (default: domain text is not counted)."),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            help="Sustained TFLOP/s of one device (default: the rates measured in the home)."
        ),
    ] = None,
) -> None:
    """Estimate the cost of a recipe: tokens, model forwards, FLOPs and time of every stage.

    Opens no source and writes nothing. If the recipe has already run in the home, the measured
    tokens and times are printed next to the prediction.
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
    """List every asset of the home: what exists, and what is out of date.

    An artifact is out of date if its inputs have changed since it was built; the next
    `colorfilter run` rebuilds it.
    """
    from assets.common import shard_names
    from pipelines.graph import build_definitions

    plan, place = open_home(recipe, home)
    artifacts = artifacts_of(place)
    entries = artifacts.entries()
    shards = shard_names(artifacts, plan) if place.shards() else []
    table = Table("asset", "exists", "out of date", "last recorded", box=box.SIMPLE)
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
    port: Annotated[int, typer.Option(help="Port to listen on, on 127.0.0.1.")] = 3000,
) -> None:
    """Start Dagster's web UI and daemon for the home, on 127.0.0.1 only.

    Runs until interrupted with Ctrl-C.
    """
    from pipelines.run import bring_in

    plan, place = open_home(recipe, home)
    _refuse_taken(port)
    say_what_arrived(bring_in(plan, place))
    # Hide two of Dagster's warnings: `dagster dev` is superseded, backfill policies are beta.
    os.environ["PYTHONWARNINGS"] = (
        "ignore:Function `dev_command` is superseded,ignore:Parameter `backfill_policy` of"
    )
    workspace = place.dagster / "workspace.yaml"
    write_text_atomically(
        workspace, yaml.safe_dump({"load_from": [{"python_file": _definitions()}]})
    )
    console.print(
        f"starting Dagster, ready in 15 to 60 s at http://127.0.0.1:{port}  (Ctrl-C to stop)",
        highlight=False,
        soft_wrap=True,
    )
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(workspace)]
    command += ["-h", "127.0.0.1", "-p", str(port)]
    os.chdir(place.root)  # leave the checkout: its dagster.yaml is not this instance's
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
            raise InputError(f"port {port} is in use; choose another with --port") from error


def _dry_run(recipe: str, home: Path) -> None:
    from commands.cost import print_plan
    from pipelines.run import refuse_missing_packages
    from resources.home import Home

    plan = load_recipe(recipe)
    place = Home(home)
    place.check(plan.name)
    refuse_missing_packages(plan)
    print_plan(console, plan, place)


INTERRUPTED = 130  # typer's exit code for Ctrl-C


def call(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. `arguments` default to sys.argv.

    Invalid input is reported in one line, with exit code 2.
    """
    try:
        app(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        if code == INTERRUPTED:
            errors.print("stopped; run the same command again to resume")
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
        gc.collect()  # else Python reports the workers' semaphores as leaked
    sys.stdout.flush()
    sys.stderr.flush()
    # Skip the interpreter's teardown, during which DuckDB 2.0 prints a page of leak reports.
    os._exit(code)


if __name__ == "__main__":
    main()
