"""The report's pictures as SVG, for light and dark pages; equal data gives equal bytes."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from colorfilter.evaluation.metrics import Summary, TokensToMatch, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 80
OUTSIDE = 0.002  # share of the scores at either end that is counted in the outermost bin
STEPS_DRAWN = 400  # longer training curves are averaged down to between 400 and 800 points
DASHES = ("-", "--", ":")
MARKERS = {"=": "o", ">": ">", "<": "<"}


@dataclass(frozen=True)
class Theme:
    """Colours of background, text and plotted lines; the report page uses the first two as well."""

    paper: str
    ink: str
    lines: str


LIGHT = Theme(
    "#ffffff",
    "#24292f",
    "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf",
)
DARK = Theme(
    "#16181d",
    "#d5d9e0",
    "#5aa9e6 #ff9e4a #5cc46b #f26d6d #b794e0 #c49a84 #f0a1d3 #a8adb3 #d8d85a #4fd3dc",
)


@dataclass(frozen=True)
class Picture:
    """A picture: its name, its alternative text, and its SVG for light and dark pages."""

    name: str
    words: str
    light: bytes
    dark: bytes


def learning_curves(curves: Mapping[str, Sequence[pl.DataFrame]]) -> Picture:
    """Plot held-out loss over training tokens: trunks as lines, annealed end points as dots.

    `curves` are the training curves of each arm, one table per seed.
    """

    def draw(axes: "Axes") -> None:
        for i, (arm, seeds) in enumerate(curves.items()):
            style: dict[str, Any] = {"color": f"C{i % 10}", "linestyle": DASHES[i // 10 % 3]}
            for j, curve in enumerate(seeds):
                points = curve.drop_nulls("held_out_loss")
                trunk = points.filter(pl.col("endpoint").is_null())
                ends = points.filter(pl.col("tokens") == pl.col("endpoint"))
                # A cosine schedule has no trunk: each end point's run is a line of its own.
                lines = [trunk] if len(trunk) else points.partition_by("endpoint")
                for k, line in enumerate(lines):
                    label = arm if j == k == 0 else None
                    axes.plot(
                        line["tokens"], line["held_out_loss"], alpha=0.6, label=label, **style
                    )
                axes.plot(ends["tokens"], ends["held_out_loss"], "o", color=style["color"])
        axes.set(xlabel="training tokens", ylabel="held-out loss, nats per token", xscale="log")
        _plain_ticks(axes)
        _legend(axes)

    return _picture("curves", "Held-out loss over training tokens, by arm", (8, 4), draw)


def training_curve(curve: pl.DataFrame) -> Picture:
    """Plot training and held-out loss of one run over training tokens.

    `curve` has a row per step. Neighbouring steps of a long run are averaged.
    """
    group = pl.int_range(pl.len()) // max(1, len(curve) // STEPS_DRAWN)
    means = curve.group_by(group.alias("group"), maintain_order=True).mean()

    def draw(axes: "Axes") -> None:
        axes.plot(means["tokens"], means["loss"], label="training")
        held_out = curve.drop_nulls("held_out_loss")
        if len(held_out):
            axes.plot(held_out["tokens"], held_out["held_out_loss"], "o-", label="held-out")
        axes.set(xlabel="training tokens", ylabel="loss, nats per token", xscale="log")
        _plain_ticks(axes)
        _legend(axes)

    return _picture("curve", "Training and held-out loss over training tokens", (8, 3.2), draw)


def binned_scores(counts: Mapping[str, Sequence[int]], low: float, high: float) -> Picture:
    """Plot histograms by name over equal bins from low to high, each scaled to its own total."""

    def draw(axes: "Axes") -> None:
        for name, own in counts.items():
            edges = np.linspace(low, max(high, low + 1e-6), len(own) + 1)
            shares = np.asarray(own) / max(1, sum(own))
            axes.stairs(shares, edges, fill=True, alpha=0.55, label=name)
        axes.set(xlabel="score, nats per token (lower is better)", ylabel="share of sequences")
        _legend(axes)

    return _picture("scores", "Distribution of scores", (8, 3.2), draw)


def score_histogram(colors: Mapping[str, Sequence[float]], cutoffs: Mapping[str, float]) -> Picture:
    """Plot histograms of color by name, each scaled to its own total, and the arms' cutoffs."""
    values = np.concatenate([np.asarray(own, dtype=float) for own in colors.values()])
    low, high = np.quantile(values, [OUTSIDE, 1 - OUTSIDE])
    edges = np.linspace(low, max(high, low + 1e-6), BINS + 1).tolist()

    def draw(axes: "Axes") -> None:
        for name, own in colors.items():
            inside = np.clip(own, edges[0], edges[-1])
            axes.hist(inside, edges, density=True, histtype="stepfilled", alpha=0.55, label=name)
        for i, (arm, cutoff) in enumerate(sorted(cutoffs.items(), key=lambda c: c[1])):
            style: dict[str, Any] = {"color": f"C{(i + 2) % 10}", "linestyle": DASHES[i // 8 % 3]}
            axes.axvline(cutoff, label=f"cutoff of {arm}", **style)
        axes.set(xlabel="color, nats per token (lower is better)", ylabel="density")
        _legend(axes)

    return _picture("color", "Distribution of color, with the cutoff of each arm", (8, 3.2), draw)


def match_plot(matches: Mapping[str, Sequence[TokensToMatch]]) -> Picture:
    """Plot tokens-to-match by arm: each seed, and mean and 95% interval if no seed is a bound."""

    def draw(axes: "Axes") -> None:
        for y, found in enumerate(matches.values()):
            for match in found:
                axes.plot(match.ratio, y, MARKERS[match.bound], color="C0", alpha=0.6)
        axes.axvline(1, color="C1", linestyle="--")
        width = axes.get_xlim()  # wider intervals are clipped
        for y, found in enumerate(matches.values()):
            if all(match.bound == "=" for match in found):
                over_seeds = summarize([match.ratio for match in found])
                _error_bar(axes, over_seeds, over_seeds.mean, y, "C0", across=True)
        axes.set_xlim(width)
        axes.set_yticks(range(len(matches)), list(matches))
        axes.set_ylim(len(matches) - 0.5, -0.5)
        axes.set(xlabel="tokens random needs, divided by the arm's tokens (higher is better)")

    height = 1.2 + 0.35 * len(matches)
    return _picture("matches", "tokens-to-match by arm, with 95% intervals", (8, height), draw)


def tau_sweep(
    series: Mapping[str, Mapping[float, Summary]], random: Summary | None, loss: str
) -> Picture:
    """Plot loss by tau, one line per series, with random at the same number of tokens."""
    taus = sorted({tau for line in series.values() for tau in line})

    def draw(axes: "Axes") -> None:
        for i, (name, line) in enumerate(series.items()):
            mine = sorted(line)
            shifted = [tau * 1.05**i for tau in mine]  # so that series do not hide each other
            axes.plot(shifted, [line[t].mean for t in mine], "o-", color=f"C{i}", label=name)
            for x, tau in zip(shifted, mine, strict=True):
                _error_bar(axes, line[tau], x, line[tau].mean, f"C{i}", across=False)
        if random is not None:
            axes.axhline(random.mean, color="C7", linestyle="--", label="random")
            if not math.isnan(random.half_width):
                low, high = random.mean - random.half_width, random.mean + random.half_width
                axes.axhspan(low, high, color="C7", alpha=0.2, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(taus, [f"{tau:g}" for tau in taus])
        axes.set_xlim(taus[0] / 1.5, taus[-1] * 1.5)
        axes.set(xlabel="tau", ylabel=f"{loss}, nats per token")
        _legend(axes)

    return _picture("tau", f"{loss} by tau, compared with random", (8, 3.2), draw)


def _error_bar(
    axes: "Axes", summary: Summary, x: float, y: float, color: str, across: bool
) -> None:
    half_width = summary.half_width
    if not math.isnan(half_width):
        across_by, up_by = (half_width, None) if across else (None, half_width)
        axes.errorbar(x, y, yerr=up_by, xerr=across_by, fmt="D", color=color, capsize=4)


def _plain_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(axes: "Axes") -> None:
    figure: Any = axes.figure
    figure.legend(loc="outside right upper", frameon=False)


def _picture(
    name: str, words: str, size: tuple[float, float], draw: Callable[["Axes"], None]
) -> Picture:
    return Picture(name, words, _svg(size, draw, LIGHT), _svg(size, draw, DARK))


def _svg(size: tuple[float, float], draw: Callable[["Axes"], None], theme: Theme) -> bytes:
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    papers = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    settings: Any = {
        **dict.fromkeys(inks, theme.ink),
        **dict.fromkeys(papers, theme.paper),
        "axes.prop_cycle": cycler(color=theme.lines.split()),
        "svg.hashsalt": "colorfilter",  # else ids in the file are random
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    out = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
