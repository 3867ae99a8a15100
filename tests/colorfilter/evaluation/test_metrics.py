import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colorfilter.evaluation.metrics import (
    Summary,
    TokensToMatch,
    bits_per_byte,
    mean_loss,
    paired_difference,
    probe,
    summarize,
    tokens_to_match,
    verdict,
)


def test_the_mean_loss_weighs_by_labels_in_float64_and_leaves_out_what_has_none() -> None:
    nll = np.array([2.0, 5.0, np.nan], dtype=np.float32)
    assert mean_loss(nll, np.array([3, 1, 0])) == pytest.approx(11 / 4)
    many = np.full(100_000, 0.1, dtype=np.float32)
    assert mean_loss(many, np.ones(100_000)) == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_bits_per_byte_of_known_text() -> None:
    assert bits_per_byte(math.log(256), n_labels=10, n_bytes=10) == pytest.approx(8)
    assert bits_per_byte(math.log(2), n_labels=100, n_bytes=400) == pytest.approx(0.25)


# Tokens to match -----------------------------------------------------------------------------

RANDOM = [(100, 6.0), (200, 5.0), (400, 4.0)]


@pytest.mark.parametrize(
    ("loss", "ratio", "bound"),
    [
        (5.5, math.sqrt(2), "="),
        (4.75, 2 ** (1 + 0.25), "="),
        (6.0, 1.0, "="),
        (5.0, 2.0, "="),
        (4.0, 4.0, "="),
        (3.99, 4.0, ">"),
        (6.01, 1.0, "<"),
    ],
)
def test_tokens_to_match_interpolate_in_the_logarithm_and_never_extrapolate(
    loss: float, ratio: float, bound: str
) -> None:
    match = tokens_to_match(loss, 100, RANDOM)
    assert match.bound == bound
    assert match.ratio == pytest.approx(ratio)


def test_tokens_to_match_are_over_the_arms_own_tokens() -> None:
    assert tokens_to_match(5.0, 50, RANDOM) == TokensToMatch(4.0, "=")
    assert tokens_to_match(7.0, 200, RANDOM) == TokensToMatch(0.5, "<")
    assert tokens_to_match(3.0, 200, RANDOM) == TokensToMatch(2.0, ">")


@pytest.mark.parametrize(
    ("endpoints", "loss", "ratio", "bound"),
    [
        ([(100, 6.0), (200, 4.0), (400, 5.0), (800, 3.0)], 4.5, 2**0.75, "="),
        ([(100, 5.0), (200, 6.0), (400, 4.0)], 4.5, 2 ** (1 + 0.75), "="),
        ([(100, 5.0), (200, 6.0), (400, 4.0)], 5.5, 1.0, "<"),
        ([(100, 5.0), (200, 6.0), (400, 4.0)], 5.0, 1.0, "="),
        ([(100, 5.0), (200, 5.0), (400, 4.0)], 5.0, 1.0, "="),
        ([(100, 6.0), (200, 5.0), (400, 5.0)], 5.0, 2.0, "="),
        ([(100, 6.0), (200, 4.0), (400, 5.0)], 3.9, 4.0, ">"),
        ([(100, 5.0)], 5.0, 1.0, "="),
        ([(100, 5.0)], 4.0, 1.0, ">"),
        ([(100, 5.0)], 6.0, 1.0, "<"),
    ],
)
def test_tokens_to_match_are_those_of_the_first_crossing(
    endpoints: list[tuple[int, float]], loss: float, ratio: float, bound: str
) -> None:
    match = tokens_to_match(loss, 100, endpoints)
    assert (match.ratio, match.bound) == (pytest.approx(ratio), bound)


@given(
    st.lists(st.floats(1, 8), min_size=1, max_size=5),
    st.floats(0, 9),
)
def test_tokens_to_match_lie_within_the_end_points(losses: list[float], loss: float) -> None:
    endpoints = [(100 * 2**i, value) for i, value in enumerate(losses)]
    match = tokens_to_match(loss, 100, endpoints)
    if match.bound == "<":
        assert loss > losses[0]
        assert match.ratio == 1
    elif match.bound == ">":
        assert loss < min(losses)
        assert match.ratio == 2 ** (len(losses) - 1)
    else:
        assert min(losses) <= loss <= losses[0]
        assert 1 <= match.ratio <= 2 ** (len(losses) - 1)


def test_a_bound_is_shown_with_its_sign() -> None:
    assert [str(TokensToMatch(1.5, b)) for b in "=><"] == ["1.50", ">1.50", "<1.50"]


# The probe -----------------------------------------------------------------------------------


def brute_force_auc(probe_colors: list[float], corpus_colors: list[float]) -> float:
    wins = sum((p < c) + (p == c) / 2 for p in probe_colors for c in corpus_colors)
    return wins / (len(probe_colors) * len(corpus_colors))


@pytest.mark.parametrize("seed", range(6))
def test_the_probe_ranks_as_counted_pair_by_pair_with_ties(store: Any, seed: int) -> None:
    rng = random.Random(seed)
    values = [i / 4 for i in range(-6, 7)]
    mine = [rng.choice(values[:8]) for _ in range(rng.randint(1, 15))]
    corpus = [[rng.choice(values) for _ in range(20)] for _ in range(2)]
    store.add_colors("_probe_books", dict(enumerate(mine)))
    store.add_colors("web-1", dict(enumerate(corpus[0])))
    store.add_colors("web-2", dict(enumerate(corpus[1])))
    store.add_colors("_probe_other", dict.fromkeys(range(30), -100.0))
    store.publish()
    found = probe(store.connection, "color", "books", "_probe_books", cutoff=-0.5)
    assert found.auc == pytest.approx(brute_force_auc(mine, corpus[0] + corpus[1]), abs=1e-12)
    assert found.recall == pytest.approx(sum(c <= -0.5 for c in mine) / len(mine))
    assert found.sequences == len(mine)


def test_conditional_only_is_probed_by_its_own_loss(store: Any) -> None:
    store.add_losses("prior", "_probe_books", {0: 1.0, 1: 1.0})
    store.add_losses("conditional", "_probe_books", {0: 3.0, 1: 5.0})
    store.add_losses("prior", "web", {0: 9.0, 1: 9.0})
    store.add_losses("conditional", "web", {0: 4.0, 1: 4.0})
    store.publish()
    found = probe(store.connection, "conditional_only", "books", "_probe_books", cutoff=3.5)
    assert (found.auc, found.recall) == (0.5, 0.5)
    assert probe(store.connection, "color", "books", "_probe_books", cutoff=0.0).auc == 0.0


@pytest.mark.parametrize(
    ("mine", "corpus", "auc"),
    [([-2.0, -1.0], [0.0, 1.0], 1.0), ([2.0], [0.0, 1.0], 0.0), ([0.5] * 3, [0.5] * 4, 0.5)],
)
def test_the_probe_before_behind_and_among_the_corpus(
    store: Any, mine: list[float], corpus: list[float], auc: float
) -> None:
    store.add_colors("_probe_books", dict(enumerate(mine)))
    store.add_colors("web", dict(enumerate(corpus)))
    store.publish()
    assert probe(store.connection, "color", "books", "_probe_books", 0.0).auc == pytest.approx(auc)


# Summaries -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "mean", "half_width"),
    [
        ([1.0, 2.0, 3.0], 2.0, 4.303 / math.sqrt(3)),
        ([5.0, 7.0], 6.0, 12.706),
        ([2.0] * 5, 2.0, 0.0),
        ([0.0, 2.0] * 8, 1.0, 2.131 * math.sqrt(16 / 15) / 4),
    ],
)
def test_the_interval_is_that_of_students_t(
    values: list[float], mean: float, half_width: float
) -> None:
    summary = summarize(values)
    assert summary.mean == pytest.approx(mean)
    assert summary.half_width == pytest.approx(half_width, rel=1e-3)
    assert summary.n == len(values)


def test_one_seed_has_no_interval() -> None:
    summary = summarize([3.0])
    assert summary.mean == 3.0
    assert math.isnan(summary.half_width)


# Paired differences --------------------------------------------------------------------------


def test_differences_are_taken_within_a_seed() -> None:
    apart = paired_difference({1: 5.0, 2: 6.0, 3: 7.0}, {3: 7.5, 2: 6.4, 1: 5.6, 9: 0.0})
    assert apart is not None
    assert apart.mean == pytest.approx(-0.5)
    assert apart.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert paired_difference({1: 5.0}, {2: 5.0}) is None


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Summary(-0.5, 0.4, 3), "better"),
        (Summary(0.5, 0.4, 3), "worse"),
        (Summary(-0.5, 0.6, 3), "inconclusive"),
        (Summary(0.0, 0.0, 3), "inconclusive"),
        (Summary(-0.5, math.nan, 1), "one seed"),
    ],
)
def test_a_verdict_wants_the_whole_interval_on_one_side(difference: Summary, words: str) -> None:
    assert verdict(difference) == words
