"""Metrics of models trained on selected data, and how scores rank the probe."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import duckdb
import numpy as np

from colorfilter.selection.sql import fetch_row
from colorfilter.stages import IN_CORPUS


def mean_loss(nll: np.ndarray, n: np.ndarray) -> float:
    """Return the token-weighted mean of sequence losses, in float64; skips rows without labels."""
    scored = n > 0
    return float(np.average(nll[scored].astype(np.float64), weights=n[scored]))


def bits_per_byte(loss: float, n_labels: int, n_bytes: int) -> float:
    """Convert a mean loss in nats per token over `n_labels` tokens to bits per byte of text."""
    return loss * n_labels / (math.log(2) * n_bytes)


FINETUNED = "_finetuned"  # suffix of metrics measured after fine-tuning for an epoch on D_down


def mean_over_tasks(metrics: Mapping[str, float]) -> float:
    """Return the mean of the tasks' losses of the correct answer, all tasks weighted equally.

    `metrics` are those of harness.evaluate. The accuracy of small models is at chance; this loss
    distinguishes arms.
    """
    losses = [value for name, value in metrics.items() if name.endswith("_loss")]
    return sum(losses) / len(losses)


@dataclass(frozen=True)
class TokensToMatch:
    """The tokens that another arm needs for the same loss, as a multiple of an arm's own tokens.

    `bound` is '=' if `ratio` was interpolated. It is '>' or '<' if the match is after the other
    arm's last end point or before its first, so that `ratio` is only a lower or upper bound.
    """

    ratio: float
    bound: str

    def __str__(self) -> str:
        words = {"=": "", ">": ">", "<": "<"}
        return f"{words[self.bound]}{self.ratio:.2f}"


def tokens_to_match(
    loss: float, tokens: int, endpoints: Sequence[tuple[int, float]]
) -> TokensToMatch:
    """Return the tokens another arm needs to reach `loss`, divided by the arm's own `tokens`.

    `endpoints` are (tokens, loss) of the other arm's annealed end points, tokens rising. The result
    is interpolated linearly in the logarithm of tokens at the first crossing, never extrapolated.
    """
    first_tokens, first_loss = endpoints[0]
    if loss > first_loss:
        return TokensToMatch(first_tokens / tokens, "<")
    if loss == first_loss:
        return TokensToMatch(first_tokens / tokens, "=")
    for (n0, loss0), (n1, loss1) in itertools.pairwise(endpoints):
        if loss0 >= loss >= loss1 and loss0 > loss1:
            share = (loss0 - loss) / (loss0 - loss1)
            return TokensToMatch(n0 * (n1 / n0) ** share / tokens, "=")
    return TokensToMatch(endpoints[-1][0] / tokens, ">")


PROBE = f"""
    WITH scored AS (
        SELECT {{score}} AS score, shard = $probe AS is_probe
        FROM color
        WHERE domain = $domain AND (shard = $probe OR {IN_CORPUS})
    ),
    ranked AS (
        SELECT score, is_probe,
            rank() OVER (ORDER BY score) + (count(*) OVER (PARTITION BY score) - 1) / 2.0 AS rank
        FROM scored
    )
    SELECT
        count(*) FILTER (is_probe),
        count(*) FILTER (NOT is_probe),
        sum(rank) FILTER (is_probe),
        count(*) FILTER (is_probe AND score <= $cutoff)
    FROM ranked
"""

PROBED = {"color": "color", "conditional_only": "loss_conditional::DOUBLE"}


@dataclass(frozen=True)
class Probe:
    """How the probe (text of the domain, scored like the corpus) ranks against the corpus.

    `auc` is the probability that a sequence of the probe has a lower score than one of the corpus.
    `recall` is the share of the probe's sequences whose score is at or below the cutoff.
    """

    auc: float
    recall: float
    sequences: int


def probe(
    connection: duckdb.DuckDBPyConnection,
    method: str,
    domain: str,
    probe_shard: str,
    cutoff: float,
) -> Probe:
    """Rank the probe shard against the corpus by the scores of color or conditional_only.

    The probe is known to be text of the domain, so this tests the pipeline.
    """
    parameters = {"domain": domain, "probe": probe_shard, "cutoff": cutoff}
    n_probe, n_corpus, rank_sum, recalled = fetch_row(
        connection, PROBE.format(score=PROBED[method]), parameters
    )
    below = float(rank_sum) - n_probe * (n_probe + 1) / 2
    return Probe(1 - below / (n_probe * n_corpus), recalled / n_probe, n_probe)


@dataclass(frozen=True)
class Summary:
    """Mean over seeds and half-width of its 95% interval (Student's t; NaN for one seed)."""

    mean: float
    half_width: float
    n: int


# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def summarize(values: Sequence[float]) -> Summary:
    """Return the mean over seeds with its 95% interval."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Summary(mean, math.nan, n)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    t = T95[n - 2] if n - 2 < len(T95) else 1.96 + 2.4 / (n - 1)
    return Summary(mean, t * deviation / math.sqrt(n), n)


def paired_difference(losses: Mapping[int, float], others: Mapping[int, float]) -> Summary | None:
    """Summarize loss minus the other arm's loss over shared seeds; None if there are none.

    `losses` and `others` are losses by seed. Target models with equal seeds start from the same
    weights, so their difference varies less than either loss.
    """
    shared = sorted(losses.keys() & others.keys())
    return summarize([losses[s] - others[s] for s in shared]) if shared else None


def verdict(difference: Summary) -> str:
    """Return in words if the 95% interval of a difference of losses is below, above or around 0."""
    if difference.n < 2:
        return "one seed"
    if difference.mean + difference.half_width < 0:
        return "better"
    if difference.mean - difference.half_width > 0:
        return "worse"
    return "inconclusive"
