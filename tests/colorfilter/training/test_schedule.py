import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colorfilter.config.recipe import Training
from colorfilter.training.schedule import learning_rate

PEAK = 0.5
WSD = Training(learning_rate=PEAK, batch_sequences=1, warmup=0.1, decay=0.2)
COSINE = Training(
    learning_rate=PEAK, batch_sequences=1, schedule="cosine", warmup=0.1, final_learning_rate=0.1
)


def test_the_rate_warms_up_stays_and_decays_to_nearly_nothing() -> None:
    trunk = [learning_rate(WSD, s, 100, 100, branch=False) for s in range(80)]
    branch = [learning_rate(WSD, s, 100, 100, branch=True) for s in range(80, 100)]
    assert trunk[:10] == pytest.approx([PEAK * (s + 1) / 10 for s in range(10)])
    assert trunk[9:] == pytest.approx([PEAK] * 71)
    assert branch == pytest.approx([PEAK * left / 21 for left in range(20, 0, -1)])


def test_the_trunk_is_the_same_for_every_end_point() -> None:
    first = [learning_rate(WSD, s, 100, 100, branch=False) for s in range(80)]
    second = [learning_rate(WSD, s, 100, 200, branch=False) for s in range(80)]
    assert first == second


def test_a_later_end_point_has_a_full_decay_of_its_own() -> None:
    branch = [learning_rate(WSD, s, 100, 200, branch=True) for s in range(160, 200)]
    assert branch == pytest.approx([PEAK * left / 41 for left in range(40, 0, -1)])


def test_the_cosine_falls_from_the_peak_to_its_share() -> None:
    rates = [learning_rate(COSINE, s, 100, 100, branch=True) for s in range(100)]
    assert rates[:10] == pytest.approx([PEAK * (s + 1) / 10 for s in range(10)])
    assert rates[10] == pytest.approx(PEAK)
    assert rates[55] == pytest.approx(PEAK * 0.55)
    assert rates[-1] == pytest.approx(0.1 * PEAK, rel=0.01)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@given(
    st.sampled_from(["wsd", "cosine"]),
    st.integers(1, 60),
    st.floats(0, 0.9),
    st.floats(0.01, 1),
)
def test_the_rate_is_positive_and_never_above_the_peak(
    schedule: str, end: int, warmup: float, decay: float
) -> None:
    shape = Training(
        learning_rate=PEAK, batch_sequences=1, schedule=schedule, warmup=warmup, decay=decay
    )
    fork = end - math.ceil(decay * end)
    for step in range(end):
        rate = learning_rate(shape, step, end, end, branch=step >= fork)
        assert 0 < rate <= PEAK * (1 + 1e-9)
