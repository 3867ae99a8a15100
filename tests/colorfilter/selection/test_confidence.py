from typing import Any

import numpy as np
import polars as pl
import pytest

from colorfilter.config.recipe import Arm
from colorfilter.selection.confidence import FLIPS, flips
from tests.colorfilter.conftest import LENGTH


def second(losses: dict[int, float]) -> pl.DataFrame:
    return pl.DataFrame(
        {"shard": ["web"] * len(losses), "position": list(losses), "loss": list(losses.values())},
        schema={"shard": pl.String, "position": pl.Int64, "loss": pl.Float32},
    )


@pytest.mark.parametrize("method", ["color", "conditional_only"])
def test_flips_are_what_only_one_of_two_conditionals_keeps(store: Any, method: str) -> None:
    rng = np.random.default_rng(0)
    n = 200
    store.add_sequences("web", [LENGTH] * n)
    prior, first, other = rng.normal(5, 1, (3, n)).astype(np.float32)
    other = (first + 0.3 * other).astype(np.float32)
    store.add_losses("prior", "web", dict(enumerate(prior.tolist())))
    store.add_losses("conditional", "web", dict(enumerate(first.tolist())))
    store.publish()
    drawn = rng.permutation(n)[:120]
    found = flips(
        store.connection,
        Arm(method=method, tau=8),
        "books",
        second({i: float(other[i]) for i in drawn}),
    )
    base = prior.astype(np.float64) if method == "color" else np.zeros(n)
    kept, again = (
        set(drawn[np.argsort((losses - base)[drawn])[:15]].tolist()) for losses in (first, other)
    )
    assert found["sampled"] == 120
    assert found["selected"] == 15
    assert found["flips"] == len(kept - again) > 0
    assert pl.DataFrame([found], schema=FLIPS).height == 1


def test_the_same_conditional_flips_nothing_and_what_is_excluded_does_not_count(
    store: Any,
) -> None:
    store.add_sequences("web", [LENGTH] * 9 + [5])
    store.add_losses("prior", "web", dict.fromkeys(range(10), 4.0))
    losses = {i: 3.0 + i / 10 for i in range(9)} | {9: 0.0}
    store.add_losses("conditional", "web", losses)
    store.publish()
    found = flips(store.connection, Arm(method="color", tau=3), "books", second(losses))
    assert (found["sampled"], found["selected"], found["flips"]) == (9, 3, 0)
    assert found["correlation"] == pytest.approx(1.0)
