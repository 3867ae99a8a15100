"""Print what a recipe would do and cost, next to what was measured in its home."""

import math
from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table

from assets.evaluated.measured_cost import kernel_runs, took_by_stage
from colorfilter import cost
from colorfilter.config.recipe import Recipe
from colorfilter.cost import Measured, Sizes, StageCost
from colorfilter.errors import InputError
from resources.home import Home


def print_plan(console: Console, recipe: Recipe, home: Home) -> None:
    """Print what a run would do and what it costs. Opens no source and writes nothing."""
    from pipelines.graph import build_definitions

    graph = build_definitions(recipe, str(home.root)).resolve_asset_graph()
    groups = Counter(graph.get(key).group_name for key in graph.toposorted_asset_keys)
    assets = ", ".join(f"{count} {group}" for group, count in groups.items())
    sources = [("corpus", source) for source in recipe.corpus.sources]
    sources += [(domain.name, source) for domain in recipe.domains for source in domain.sources]
    sources += [
        (f"{domain.name}, {part}", source)
        for domain in recipe.domains
        for task in domain.tasks
        for part in ("train", "test")
        if (source := task.source(part))
    ]
    lines = [
        f"recipe   {recipe.name}: valid",
        f"home     {home.root}: {'exists' if home.owner() else 'would be created'}",
        *(f"source   {source.files} ({of})" for of, source in sources),
        f"assets   {groups.total()}: {assets}",
        f"arms     {', '.join(arm.name for arm in recipe.arms)}",
        f"seeds    {', '.join(str(seed) for seed in recipe.evaluation.seeds)}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    print_cost(console, recipe, home)
    console.print("Dry run: no source was opened and nothing was written.")


def print_cost(
    console: Console,
    recipe: Recipe,
    home: Home,
    corpus_tokens: int | None = None,
    domain_tokens: int | None = None,
    tflops: float | None = None,
) -> None:
    """Print the predicted cost of every stage and arm, and the measured cost if the home has one.

    Times assume `tflops` TFLOP/s sustained or, if it is None, the rates measured in the home.
    Writes nothing. Raises InputError for an invalid size or rate.
    """
    if tflops is not None and not 0 < tflops < math.inf:
        raise InputError(f"--tflops: must be above 0; got {tflops:g}")
    sizes = cost.sizes_of(recipe, corpus_tokens, domain_tokens)
    stages = cost.predict(recipe, sizes)
    notes = [
        f"FLOPs of a forward pass per token: auxiliary model {sizes.auxiliary:.3g}, target model "
        f"{sizes.target:.3g}; L = {sizes.ratio:.3g}.",
        *(f"Assumed: {words}." for words in sizes.assumed),
    ]
    records = []
    if home.owner() in {None, recipe.name}:
        records = kernel_runs(home)
    else:
        notes.append(f"Home {home.root} is another recipe's: its measurements are not used.")
    if tflops is not None:
        rates = dict.fromkeys(("train", "score", "evaluate"), tflops * 1e12)
        notes.append(f"Times are for one device at {tflops:g} TFLOP/s.")
    else:
        device = records[-1]["device"] if records else ""
        latest = [r for r in records if r["device"] == device]
        rates = cost.rates(stages, took_by_stage(home, latest), sizes.auxiliary)
        notes.append(_words_on_rates(rates, device))
    seconds = {
        s.asset: s.forwards * sizes.auxiliary / rates[s.verb]
        for s in stages
        if s.forwards is not None and s.verb in rates
    }
    console.print(_predicted(stages, sizes, seconds))
    if records:
        console.print(_measured(stages, seconds, took_by_stage(home, records)))
    console.print(_arms(recipe, sizes))
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _predicted(stages: list[StageCost], sizes: Sizes, seconds: dict[str, float]) -> Table:
    table = _table(
        "predicted",
        "stage",
        *("tokens", "forwards (B)", "FLOPs", *(["time"] if seconds else [])),
    )

    def add(name: str, tokens: str, forwards: float | None, time: float | None) -> None:
        cells = [tokens, *_work(forwards, sizes), _time(time)]
        table.add_row(name, *cells[: len(table.columns) - 1])

    for stage in stages:
        name = stage.asset if stage.runs == 1 else f"{stage.asset} x{stage.runs}"
        add(name, _tokens(stage.tokens), stage.forwards, seconds.get(stage.asset))
    table.add_section()
    add("total", "", sum(stage.forwards or 0 for stage in stages), _in_all(stages, seconds))
    return table


def _measured(
    stages: list[StageCost], seconds: dict[str, float], measured: dict[str, Measured]
) -> Table:
    table = _table(
        "predicted against measured",
        "stage",
        *("tokens", "measured", "time", "measured"),
    )
    tokens = {stage.asset: stage.tokens for stage in stages}
    for asset in [*tokens, *sorted(measured.keys() - tokens.keys())]:
        took = measured.get(asset)
        table.add_row(
            asset,
            _tokens(tokens.get(asset)),
            _tokens(took.tokens if took else None),
            _time(seconds.get(asset)),
            _time(took.seconds if took else None),
        )
    spent = sum(took.seconds for took in measured.values())
    table.add_section()
    table.add_row("total", "", "", _time(_in_all(stages, seconds)), _time(spent))
    return table


def _in_all(stages: list[StageCost], seconds: dict[str, float]) -> float | None:
    """Return the seconds of all stages of known size, or None if some have no prediction."""
    known = [stage.asset for stage in stages if stage.tokens is not None]
    return sum(seconds.values()) if len(seconds) == len(known) else None


def _arms(recipe: Recipe, sizes: Sizes) -> Table:
    table = _table(
        "by the paper's formula: each arm alone, with one domain and one seed",
        "arm",
        *("tokens", "forwards (B)", "FLOPs"),
    )
    for name, tokens, forwards in cost.arm_forwards(recipe, sizes):
        table.add_row(name, _tokens(tokens), *_work(forwards, sizes))
    return table


def _words_on_rates(rates: dict[str, float], device: str) -> str:
    if not rates:
        return (
            "Times are not known: pass a sustained rate with --tflops, or a --home in which this "
            "recipe has run."
        )
    words = ", ".join(f"{verb} {rate / 1e12:.3g} TFLOP/s" for verb, rate in rates.items())
    return f"Times are for one worker, at the rates measured in the home on {device}: {words}."


def _table(title: str, first: str, *heads: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    table.add_column(first, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _work(forwards: float | None, sizes: Sizes) -> list[str]:
    """Format a number of forwards, in billions, and the FLOPs that they take."""
    if forwards is None:
        return ["-", "-"]
    return [f"{float(f'{forwards / 1e9:.4g}'):,.10g}", f"{forwards * sizes.auxiliary:.3g}"]


def _tokens(amount: float | None) -> str:
    if amount is None:
        return "-"
    rounded = float(f"{amount:.3g}")
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if rounded >= size:
            return f"{rounded / size:.3g} {unit}"
    return f"{rounded:.3g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds / 3600:,.3g} h" if seconds >= 360 else f"{seconds:.3g} s"
