"""The command line: run the pipeline, see what stands, open the web UI."""

import logging
import os
import socket
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from colorfilter.errors import InputError
from pipelines import settings

if TYPE_CHECKING:
    from assets.arrivals import Arrivals
    from colorfilter.recipe import Recipe
    from pipelines.running import Failure
    from resources.artifacts import ArtifactStore
    from resources.home import Home

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="CoLoR-Filter: choose pre-training data by conditional minus prior loss.",
)
# Into a file or a pipe, where a terminal's width says nothing, names are not cut.
console = Console(width=None if sys.stdout.isatty() else 160)
errors = Console(stderr=True)

RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        envvar=settings.RECIPE_VARIABLE,
        help="A shipped recipe by name, or the path of a .yaml file.",
    ),
]
HomeOption = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar=settings.HOME_VARIABLE,
        help="The folder for everything that is produced; it belongs to one recipe.",
    ),
]
BackupArgument = Annotated[Path, typer.Argument(help="The folder of the backup.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks of failures.")]


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
    from pipelines.display import print_report, show_progress
    from pipelines.running import bring_in, execute, refuse_missing_packages

    if dry_run:
        _dry_run(recipe, home)
        return
    plan, place = _open(recipe, home)
    refuse_missing_packages(plan)
    console.print(f"recipe [bold]{plan.name}[/], home {place.root}")
    _say_what_arrived(bring_in(plan, place))
    with show_progress(console) as listener:
        failure = execute(plan, place, listener, job)
    if failure:
        _give_up(failure, debug)
    if job in {settings.Job.EVERYTHING, settings.Job.EVALUATE}:
        print_report(console, plan, place)
    console.print(f"ledger    {_artifacts(place).ledger.head()}", highlight=False)


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
    from pipelines.display import show_progress
    from pipelines.running import Failure
    from pipelines.running import select as run_select

    plan, place = _open(recipe, home)
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
    from colorfilter.recipe_file import load
    from pipelines.costs import print_cost
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

    plan, place = _open(recipe, home)
    artifacts = _artifacts(place)
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


@app.command()
def audit(
    what: Annotated[
        str | None,
        typer.Argument(
            help="An asset such as reference/color_tau16/filtered_dataset, one partition of it in "
            "brackets, or an artefact's folder; by default all that is current."
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="A sha256 of the ledger that was noted down; it must be there."),
    ] = None,
    reselect: Annotated[
        bool, typer.Option("--reselect", help="Select again by the scores and compare.")
    ] = False,
    rescore: Annotated[
        int | None,
        typer.Option(help="Score so many random sequences of every shard again; loads models."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page for people.")] = None,
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Check that what lies in the home is what the ledger says was made, back to the raw files.

    Reads every byte of what the artefact was made from. A line for each thing that does not hold:
    asset, where, what was expected and what was found. Exit code 0: all holds; 1: not all does.
    """
    from pipelines.auditing import audit as run_audit
    from pipelines.auditing import print_audit, write_page
    from pipelines.display import show_steps
    from resources.home import Home

    plan = _load(recipe)
    place = Home(home)
    place.check(plan.name)
    with show_steps(errors if as_json else console) as show:
        found = run_audit(plan, place, show, what, head, reselect, rescore)
    if html:
        write_page(found, plan, place, html)
    if as_json:
        print(found.as_json())  # noqa: T201
    else:
        print_audit(console, found)
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def explain(
    what: Annotated[str, typer.Argument(help="DOC_ID, SHARD:POSITION, FILE:LINE or DOMAIN/ARM.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all facts as one JSON object.")
    ] = False,
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Say why a document or sequence was selected or not, or what changed in a dataset.

    Of a document (the first digits of its doc_id, or the line of the file it was read from) or a
    sequence: where it came from, its losses and by which models, what each arm did with it, and
    which target models trained on it. Of a dataset: what entered and left since its last version,
    and why. Writes nothing.
    """
    from pipelines.explaining import as_json as one_object
    from pipelines.explaining import look_up, show
    from resources.home import Home

    place = Home(home)
    place.check(_load(recipe).name)
    found = look_up(place, what)
    if as_json:
        typer.echo(one_object(found))
    else:
        show(console, found)


@app.command()
def prune(
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
    vanished: Annotated[
        bool,
        typer.Option("--vanished", help="Take text out whose files have vanished from the source."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """Remove what the home no longer needs: older versions, retired shards, unfinished work.

    Says what and how much first, and asks. What is current stays, and all that it was made from.
    The ledger keeps its record of what was.
    """
    from assets.common import shard_names
    from pipelines.running import bring_in
    from resources.pruning import leftovers, remove

    plan, place = _open(recipe, home)
    artifacts = _artifacts(place)
    if vanished:
        _say_what_arrived(bring_in(plan, place, keep_vanished=False))
    found = leftovers(artifacts, shard_names(artifacts, plan))
    if not found:
        console.print("nothing to remove")
        return
    table = Table("folder of", "why", "folders", "MB", box=box.SIMPLE)
    for asset, why in dict.fromkeys((left.asset, left.why) for left in found):
        sizes = [left.size for left in found if (left.asset, left.why) == (asset, why)]
        table.add_row(asset, why, str(len(sizes)), f"{sum(sizes) / 1e6:,.1f}")
    console.print(table)
    total = sum(left.size for left in found) / 1e6
    if not yes and not typer.confirm(f"Remove {len(found)} folders, {total:,.1f} MB?"):
        raise typer.Exit(1)
    for left in found:
        remove(left)
    console.print(f"removed {len(found)} folders, {total:,.1f} MB")


@app.command()
def backup(
    folder: BackupArgument,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Back up the home into a folder, while the pipeline may be at work.

    Copies what the folder does not have yet; what was copied once stays there. A backup that was
    stopped leaves the last one whole, and the next goes on from there.
    """
    from pipelines.display import show_copying
    from resources.backup import back_up
    from resources.home import Home

    with show_copying(console) as listener:
        done = back_up(Home(home), folder, listener)
    console.print(done.summary, highlight=False)


@app.command()
def restore(
    folder: BackupArgument,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Make a new home of a backup, every file checked against its sha256.

    A damaged backup is refused, and leaves no home.
    """
    from pipelines.display import show_copying
    from resources.backup import restore as bring_back
    from resources.home import Home

    with show_copying(console) as listener:
        done = bring_back(folder, Home(home), listener)
    console.print(done.summary, highlight=False)


@app.command()
def openlineage(
    home: HomeOption = Path(settings.DEFAULT_HOME),
    file: Annotated[
        Path | None, typer.Option(help="Write the events here instead, one a line.")
    ] = None,
) -> None:
    """Send the lineage of the home, from the ledger, as OpenLineage events.

    Where to is up to OpenLineage's own configuration: OPENLINEAGE_URL, OPENLINEAGE__TRANSPORT__*
    or openlineage.yml. What is sent again is the same events.
    """
    from resources.home import Home

    if find_spec("openlineage") is None:
        raise InputError(
            "openlineage wants the package openlineage-python; "
            "pip install 'colorfilter[openlineage]'"
        )
    from resources.openlineage import events, send, write

    found = events(_artifacts(Home(home)))
    if file:
        write(found.events, file)
    else:
        send(found.events)
    console.print(f"{len(found.events)} events {'written' if file else 'sent'}", highlight=False)
    if found.without_run:
        console.print(
            f"{found.without_run} artefacts left out: no run is on record for them",
            highlight=False,
        )


@app.command()
def ui(
    recipe: RecipeOption = settings.DEFAULT_RECIPE,
    home: HomeOption = Path(settings.DEFAULT_HOME),
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 3000,
) -> None:
    """Start Dagster's web UI and daemon over the home, on loopback only."""
    from pipelines.running import bring_in

    plan, place = _open(recipe, home)
    _refuse_taken(port)
    _say_what_arrived(bring_in(plan, place))
    # Dagster's own: that `dagster dev` has a successor, that backfill policies are beta.
    os.environ["PYTHONWARNINGS"] = (
        "ignore:Function `dev_command` is superseded,ignore:Parameter `backfill_policy` of"
    )
    workspace = Path(__file__).resolve().parent.parent / "workspace.yaml"
    console.print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)")
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(workspace)]
    command += ["-h", "127.0.0.1", "-p", str(port)]
    os.execv(sys.executable, command)  # noqa: S606


def _say_what_arrived(found: "Arrivals") -> None:
    if found.new or found.retired:
        retired = f", {len(found.retired)} retired" if found.retired else ""
        console.print(f"{len(found.new)} new shards{retired}", highlight=False)
    for files, what in (
        (found.vanished, "have vanished from their source; their text is kept"),
        (found.lost, "are gone, and their text leaves the corpus with them"),
    ):
        if files:
            console.print(
                f"[yellow]noted [/] {len(files)} files {what}; the first: {escape(files[0])}",
                highlight=False,
                soft_wrap=True,
            )


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"port {port} is in use; name another with --port") from error


def _open(recipe: str, home: Path) -> tuple["Recipe", "Home"]:
    """Load the recipe, claim the home, and set the environment for Dagster's processes."""
    from resources.home import Home

    plan = _load(recipe)
    place = Home(home).claim(plan.name)
    os.environ[settings.HOME_VARIABLE] = str(place.root)
    os.environ["DAGSTER_HOME"] = str(place.dagster)
    return plan, place


def _load(recipe: str) -> "Recipe":
    """Load the recipe, and name it in the environment for Dagster's processes."""
    path = settings.recipe_path(recipe).resolve()
    os.environ[settings.RECIPE_VARIABLE] = str(path)
    return settings.recipe()


def _dry_run(recipe: str, home: Path) -> None:
    from pipelines.costs import print_plan
    from pipelines.running import refuse_missing_packages
    from resources.home import Home

    plan = _load(recipe)
    place = Home(home)
    place.check(plan.name)
    refuse_missing_packages(plan)
    print_plan(console, plan, place)


def _artifacts(place: "Home") -> "ArtifactStore":
    from resources.artifacts import ArtifactStore

    return ArtifactStore(home=str(place.root))


def main() -> None:
    """Entry point: bad input is one line and exit code 2."""
    warnings.filterwarnings("ignore", module="dagster")
    for library in ("transformers", "openlineage"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        app()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except InputError as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        code = 2
    except KeyboardInterrupt:
        errors.print("stopped; run again to go on from there")
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    # Leave without the interpreter's teardown, in which DuckDB 2.0 prints a page of leak reports.
    os._exit(code)


if __name__ == "__main__":
    main()
