import math
import re
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree as ET

import polars as pl
import pytest
from matplotlib.axes import Axes

from colorfilter.evaluation.figures import (
    Picture,
    binned_scores,
    learning_curves,
    match_plot,
    score_histogram,
    tau_sweep,
    training_curve,
)
from colorfilter.evaluation.metrics import Summary, TokensToMatch, summarize

EXACT = [TokensToMatch(1.4, "="), TokensToMatch(1.8, "="), TokensToMatch(1.5, "=")]


def a_curve(seed: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "endpoint": [None, None, 300, 300],
            "tokens": [100, 200, 250, 300],
            "held_out_loss": [6.0 + seed, 5.5, None, 5.0],
        }
    )


def curves() -> Picture:
    return learning_curves({"color": [a_curve(0), a_curve(1)], "random": [a_curve(2)]})


def colors() -> Picture:
    return score_histogram({"corpus": [0.1, 0.2, 0.5], "probe": [-1.0]}, {"color_tau4": 0.1})


def matches() -> Picture:
    return match_plot({"color_tau4": EXACT, "other": [TokensToMatch(2.0, ">")]})


def sweep() -> Picture:
    return tau_sweep({"color": {4.0: Summary(5, 0.1, 3)}}, Summary(5.5, 0.2, 3), "Held-out loss")


def curve() -> Picture:
    return training_curve(a_curve(0).with_columns(loss=pl.Series([7.0, 6.0, 5.5, 5.0])))


def bins() -> Picture:
    return binned_scores({"other shards": [3, 1, 0], "new shards": [0, 0, 0]}, -1.0, -1.0)


DRAWN = [curves, curve, colors, bins, matches, sweep]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Arguments of the error bars that are drawn."""
    calls: list[dict[str, Any]] = []

    def errorbar(self: Axes, x: float, y: float, **arguments: Any) -> None:
        calls.append({"x": x, "y": y, **arguments})

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    return calls


@pytest.mark.parametrize("draw", DRAWN)
def test_a_picture_needs_nothing_from_elsewhere(draw: Callable[[], Picture]) -> None:
    picture = draw()
    for svg in (picture.light, picture.dark):
        root = ET.fromstring(svg)
        assert root.tag.endswith("}svg")
        for element in root.iter():
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value.startswith("#")
        assert not re.search(rb"url\((?!#)|@import|<script|\son\w+=", svg)


@pytest.mark.parametrize("draw", DRAWN)
def test_a_picture_is_the_same_bytes_again_and_differs_by_theme(
    draw: Callable[[], Picture],
) -> None:
    first = draw()
    assert draw() == first
    assert first.light != first.dark
    assert b"#ffffff" in first.light
    assert b"#16181d" in first.dark
    assert b"#ffffff" not in first.dark


def test_one_seed_has_no_interval(drawn: list[dict[str, Any]]) -> None:
    match_plot({"color_tau4": EXACT[:1]})
    alone = Summary(5.0, math.nan, 1)
    tau_sweep({"color": {4.0: alone, 8.0: alone}}, alone, "Held-out loss")
    assert drawn == []


def test_tokens_to_match_have_their_interval_over_seeds_unless_one_is_a_bound(
    drawn: list[dict[str, Any]],
) -> None:
    match_plot({"bound": [EXACT[0], TokensToMatch(2.0, ">")], "exact": EXACT})
    light, dark = drawn
    expected = summarize([1.4, 1.8, 1.5])
    for bar in (light, dark):
        assert (bar["x"], bar["y"]) == (pytest.approx(expected.mean), 1)
        assert bar["xerr"] == pytest.approx(expected.half_width)
        assert bar["yerr"] is None


def test_the_sweep_has_an_interval_for_every_tau(drawn: list[dict[str, Any]]) -> None:
    of_color = {16.0: Summary(4.5, 0.2, 3), 4.0: Summary(5.0, 0.1, 3)}
    tau_sweep(
        {"color": of_color, "color, batch 8": {4.0: Summary(5.1, 0.3, 3)}}, None, "Held-out loss"
    )
    bars = [(bar["x"], bar["y"], bar["yerr"]) for bar in drawn[: len(drawn) // 2]]
    assert bars[:2] == [(4.0, 5.0, 0.1), (16.0, 4.5, 0.2)]
    (beside,) = bars[2:]
    assert beside[1:] == (5.1, 0.3)
    assert 4.0 < beside[0] < 4.5  # where the other series does not hide it


def test_an_interval_far_wider_than_the_seeds_leaves_the_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = []
    axis_label = Axes.set

    def look(self: Axes, **arguments: Any) -> Any:
        limits.append(self.get_xlim())
        return axis_label(self, **arguments)

    monkeypatch.setattr(Axes, "set", look)
    match_plot({"color_tau4": [TokensToMatch(1.1, "="), TokensToMatch(1.9, "=")]})
    low, high = limits[0]
    assert low > 0.9
    assert high < 2.1


def test_all_scores_are_in_the_histogram_and_each_cutoff_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}
    hist, axvline = Axes.hist, Axes.axvline

    def look(self: Axes, values: Any, edges: Any, **arguments: Any) -> Any:
        seen[arguments["label"]] = hist(self, values, edges, **arguments)[0].sum() * (
            edges[1] - edges[0]
        )
        return ()

    def line(self: Axes, x: float, **arguments: Any) -> Any:
        seen[arguments["label"]] = x
        return axvline(self, x, **arguments)

    monkeypatch.setattr(Axes, "hist", look)
    monkeypatch.setattr(Axes, "axvline", line)
    corpus = [float(i % 100) for i in range(1000)] + [9_999.0]
    score_histogram({"corpus": corpus, "probe": [-3.0, 2.0]}, {"color_tau4": 1.5, "b": 7.0})
    assert seen["corpus"] == pytest.approx(1)
    assert seen["probe"] == pytest.approx(1)
    assert seen["cutoff of color_tau4"] == 1.5
    assert seen["cutoff of b"] == 7.0


def test_more_arms_than_colours_are_drawn() -> None:
    assert learning_curves({f"arm {i}": [a_curve(i)] for i in range(32)}).light


def test_binned_scores_are_shares_of_their_own_total(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[float], list[float]]] = []

    draw = Axes.stairs

    def stairs(self: Axes, values: Any, edges: Any, **arguments: Any) -> Any:
        seen.append((list(values), list(edges)))
        return draw(self, values, edges, **arguments)

    monkeypatch.setattr(Axes, "stairs", stairs)
    binned_scores({"other shards": [3, 1], "new shards": [0, 5]}, -1.0, 1.0)
    assert seen[:2] == [([0.75, 0.25], [-1.0, 0.0, 1.0]), ([0.0, 1.0], [-1.0, 0.0, 1.0])]
