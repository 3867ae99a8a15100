"""Build the human-readable report of evaluations: its tables and its sections."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl

from colorfilter.config.recipe import Arm
from colorfilter.evaluation import figures, html
from colorfilter.evaluation.examples import Example
from colorfilter.evaluation.html import Section, Table
from colorfilter.evaluation.metrics import (
    FINETUNED,
    Summary,
    TokensToMatch,
    paired_difference,
    summarize,
    tokens_to_match,
    verdict,
)

EVALUATIONS = {
    "domain": pl.String,
    "arm": pl.String,
    "seed": pl.Int64,
    "tokens": pl.Int64,
    "metric": pl.String,
    "value": pl.Float64,
}


@dataclass(frozen=True)
class ArmLine:
    """One arm at one number of training tokens, over all seeds."""

    arm: str
    tokens: int
    losses: list[float]
    bits_per_byte: Summary
    matches: list[TokensToMatch]
    match_seeds: list[int]
    against_random: Summary | None

    @property
    def loss(self) -> Summary:
        return summarize(self.losses)


def judged_by(evaluations: pl.DataFrame) -> str:
    """Return the metric that compares arms: the loss on tasks if measured, else held-out loss."""
    measured = set(evaluations["metric"])
    return "tasks_loss" if "tasks_loss" in measured else "held_out_loss"


def arm_lines(evaluations: pl.DataFrame, suffix: str = "") -> list[ArmLine]:
    """Return one line per arm and end point, ordered by tokens and then by mean loss.

    `evaluations` has the columns EVALUATIONS; only metrics with `suffix`, such as
    metrics.FINETUNED, are read. Every arm except random is compared with random seed by seed: by
    the difference of losses at the same number of tokens, and by tokens-to-match, computed from
    random's end points.
    """
    metric = judged_by(evaluations) + suffix
    losses = evaluations.filter(pl.col("metric") == metric).sort("tokens", "seed")
    bits = evaluations.filter(pl.col("metric") == f"bits_per_byte{suffix}")
    random = losses.filter(pl.col("arm") == "random")
    lines = []
    for (arm, tokens), part in losses.group_by(["arm", "tokens"], maintain_order=True):
        bytes_part = bits.filter((pl.col("arm") == arm) & (pl.col("tokens") == tokens))
        matches, match_seeds = [], []
        for seed, loss in zip(part["seed"], part["value"], strict=True):
            points = random.filter(pl.col("seed") == seed).sort("tokens")
            if arm != "random" and len(points):
                endpoints = list(zip(points["tokens"], points["value"], strict=True))
                matches.append(tokens_to_match(loss, int(str(tokens)), endpoints))
                match_seeds.append(seed)
        equal = random.filter(pl.col("tokens") == tokens)
        lines.append(
            ArmLine(
                str(arm),
                int(str(tokens)),
                list(part["value"]),
                summarize(list(bytes_part["value"])),
                matches,
                match_seeds,
                paired_difference(_by_seed(part), _by_seed(equal)) if arm != "random" else None,
            )
        )
    return sorted(lines, key=lambda line: (line.tokens, fmean(line.losses), line.arm))


def _by_seed(losses: pl.DataFrame) -> dict[int, float]:
    return dict(zip(losses["seed"], losses["value"], strict=True))


def match_rows(evaluations: pl.DataFrame) -> list[dict[str, Any]]:
    """Return tokens-to-match as evaluations; the metric's name tells exact values from bounds."""
    metrics = {
        "=": "tokens_to_match",
        ">": "tokens_to_match_more_than",
        "<": "tokens_to_match_less_than",
    }
    return [
        {
            "domain": evaluations["domain"][0],
            "arm": line.arm,
            "seed": seed,
            "tokens": line.tokens,
            "metric": metrics[match.bound],
            "value": match.ratio,
        }
        for line in arm_lines(evaluations)
        for seed, match in zip(line.match_seeds, line.matches, strict=True)
    ]


def task_rows(evaluations: pl.DataFrame) -> list[dict[str, str]]:
    """Return loss and accuracy by task, one row per arm and end point."""
    metrics = evaluations["metric"]
    tasks = sorted({m.removesuffix("_acc") for m in metrics if m.endswith("_acc")})
    means = evaluations.group_by("arm", "tokens", "metric", maintain_order=True).agg(
        pl.col("value").mean()
    )
    rows = []
    for (arm, tokens), part in means.group_by(["arm", "tokens"], maintain_order=True):
        value = dict(zip(part["metric"], part["value"], strict=True))
        if "tasks_loss" in value:
            cells = {t: f"{value[f'{t}_loss']:.3f}, {value[f'{t}_acc']:.1%}" for t in tasks}
            rows.append({"arm": str(arm), "tokens": f"{tokens:,}", **cells})
    return rows


def interval(summary: Summary, places: int = 3) -> str:
    """Format a summary as 'mean ± half-width', or as the mean alone for one seed."""
    if math.isnan(summary.half_width):
        return f"{summary.mean:.{places}f}"
    return f"{summary.mean:.{places}f} ± {summary.half_width:.{places}f}"


def matches_in_words(matches: Sequence[TokensToMatch]) -> str:
    """Format tokens-to-match by seed, or once if all seeds are equal, as bounds often are."""
    words = [str(m) for m in matches]
    if len(words) > 1 and len(set(words)) == 1:
        return f"{words[0]} x{len(words)}"
    return " ".join(words) or "-"


def comparison_rows(lines: Sequence[ArmLine]) -> list[list[str]]:
    """Return the comparison as text, in the columns of COMPARISON_HEADER."""
    return [
        [
            line.arm,
            f"{line.tokens:,}",
            " ".join(f"{loss:.3f}" for loss in line.losses),
            interval(line.loss),
            interval(line.bits_per_byte),
            *_against(line.against_random),
            matches_in_words(line.matches),
        ]
        for line in lines
    ]


def _against(difference: Summary | None) -> list[str]:
    return ["-", "-"] if difference is None else [interval(difference), verdict(difference)]


COMPARISON_HEADER = [
    "arm",
    "tokens",
    "loss by seed",
    "mean ± 95% CI",
    "bits/byte",
    "vs. random",
    "verdict",
    "tokens-to-match",
]


def comparison_in_brief(lines: Sequence[ArmLine]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the comparison for an 80-column terminal."""
    rows = [
        [
            line.arm,
            f"{line.tokens:,}",
            interval(line.loss),
            _against(line.against_random)[1],
            matches_in_words(line.matches),
        ]
        for line in lines
    ]
    return ["arm", "tokens", "mean ± 95% CI", "vs. random", "tokens-to-match"], rows


def comparison_in_a_sentence(lines: Sequence[ArmLine]) -> str:
    """Summarize what the best arm gains over random, judged by its seed that gains least.

    The best arm is the one with the fewest tokens, then the lowest loss, among the arms that are
    better than random. Empty if no arm is compared with random.
    """
    compared = [line for line in lines if line.against_random is not None and line.matches]
    if not compared:
        return ""
    better = [line for line in compared if _against(line.against_random)[1] == "better"]
    if not better:
        if all(_against(line.against_random)[1] == "one seed" for line in compared):
            return "One seed is too few to compare an arm with random."
        return f"At {compared[0].tokens:,} tokens, no arm is significantly better than random."
    best = min(better, key=lambda line: (line.tokens, line.loss.mean))
    least = min(best.matches, key=lambda match: (match.bound != "<", match.ratio))
    seeds = f"each of {len(best.matches)} seeds"
    if least.bound == "<":
        return (
            f"At {best.tokens:,} tokens, {best.arm} is better than random on average, but not with "
            f"{seeds}."
        )
    more = "more than" if least.bound == ">" else "at least"
    return (
        f"To match {best.arm} at {best.tokens:,} tokens, random needs {more} "
        f"{least.ratio * best.tokens:,.0f} tokens with {seeds}."
    )


Rows = Sequence[Mapping[str, object]]

LOSSES = {
    "held_out_loss": "Held-out loss",
    "tasks_loss": "Loss of the correct answers, averaged over tasks",
}
COMPARISON = (
    "{loss}, in nats per token, of target models trained on the data that each arm selected; lower "
    "is better. bits/byte: bits per byte of held-out text. vs. random: difference from random at "
    "the same number of tokens, paired by seed, with its 95% interval. verdict: better or worse if "
    "that interval excludes 0, otherwise inconclusive. tokens-to-match: tokens that random needs "
    "to reach the same loss, divided by the arm's tokens, for each seed; above 1 is better. It is "
    "interpolated between random's annealed end points; > and < mark bounds."
)
MATCHES = (
    "Each dot is a seed. A triangle is a seed with only a bound, because the match is outside the "
    "range of random's end points. If no seed is a bound, the diamond is the mean and the bar its "
    "95% interval, clipped at the edge of the plot."
)
SWEEP = "Bars are 95% intervals, and so is the band of random at the same number of tokens."
CURVES = (
    "Lines are trunks, trained at a constant learning rate. Dots are end points, annealed by a "
    "learning-rate decay."
)
SCORES = (
    "The probe is text of the domain that is scored like the corpus but never selected. probe_auc: "
    "probability that a sequence of the probe ranks before one of the corpus. probe_recall: share "
    "of the probe's sequences that rank before the cutoff."
)
FINETUNED_TOO = (
    "The target models after fine-tuning for one epoch on D_down. The paper reports smaller gains "
    "after fine-tuning."
)
ON_TASKS = "Loss of the correct answer in nats per token, and accuracy, averaged over seeds."
CONFIDENCE = (
    "A second conditional, trained with another seed, scores a sample of the corpus. selected: "
    "sequences in the best 1/tau of the sample. flips: how many of them the second conditional "
    "would not select. correlation: Spearman's, between the two scores."
)
LEAKAGE = (
    "Selected text that shares 13 consecutive words with held-out text or task items. Sequences "
    "that contain such text are not trained on, unless the arm keeps leaks."
)
COST = (
    "Predicted: tokens processed, and auxiliary-model forwards in billions of tokens (a backward "
    "counts as two forwards). Measured: tokens processed, and seconds summed over workers."
)
SELECTED = (
    "Sequences from the best end of the corpus to the worst. Each token is coloured by its "
    "conditional loss minus its prior loss: blue tokens lower the color of the sequence, which is "
    "better, and orange tokens raise it. Hover over a token to see its losses."
)


def sections(
    evaluations: pl.DataFrame,
    arms: Sequence[Arm],
    curves: Mapping[str, Sequence[pl.DataFrame]],
    colors: Mapping[str, Sequence[float]],
    cutoffs: Mapping[str, float],
    examples: Sequence[Example],
    confidence: Rows = (),
    leakage: Rows = (),
    cost: Rows = (),
) -> list[Section]:
    """Return the sections of the report in reading order, omitting those without content.

    `evaluations` has the columns EVALUATIONS. `curves` are the learning curves of each arm, one per
    seed. `colors` are values of color to draw as histograms, by name; `cutoffs` are the arms'
    cutoffs in color. `confidence`, `leakage` and `cost` are table rows; all rows of a table have
    the same keys.
    """
    lines = arm_lines(evaluations)
    words = COMPARISON.format(loss=LOSSES[judged_by(evaluations)])
    words = f"{comparison_in_a_sentence(lines)}\n\n{words}".strip()
    found = [Section("Comparison", words, Table(COMPARISON_HEADER, comparison_rows(lines)))]
    on_tasks = task_rows(evaluations)
    if on_tasks:
        found.append(Section("Tasks", ON_TASKS, _table(on_tasks)))
    tuned = comparison_rows(arm_lines(evaluations, FINETUNED))
    if tuned:
        found.append(Section("Fine-tuned", FINETUNED_TOO, Table(COMPARISON_HEADER, tuned)))
    # An arm's first line is at the number of tokens that all arms have.
    matches = {line.arm: line.matches for line in reversed(lines) if line.matches}
    matches = {line.arm: matches[line.arm] for line in lines if line.arm in matches}
    if matches:
        found.append(Section("tokens-to-match", MATCHES, picture=figures.match_plot(matches)))
    by_tau = _losses_by_tau(lines, arms)
    if len({tau for line in by_tau.values() for tau in line}) > 1:
        random = next((line.loss for line in lines if line.arm == "random"), None)
        picture = figures.tau_sweep(by_tau, random, LOSSES[judged_by(evaluations)])
        found.append(Section("Loss by tau", SWEEP, picture=picture))
    found.append(Section("Learning curves", CURVES, picture=figures.learning_curves(curves)))
    probe = evaluations.filter(pl.col("metric").str.starts_with("probe"))
    found.append(
        Section(
            "Scores",
            SCORES,
            _table(probe.select("arm", "metric", "value").to_dicts()),
            figures.score_histogram(colors, cutoffs),
        )
    )
    tables = [
        ("Confidence at the cutoff", CONFIDENCE, confidence),
        ("Leakage", LEAKAGE, leakage),
        ("Cost", COST, cost),
    ]
    found += [Section(title, words, _table(rows)) for title, words, rows in tables if rows]
    return [*found, Section("What was selected", SELECTED, examples=examples)]


def _losses_by_tau(
    lines: Sequence[ArmLine], arms: Sequence[Arm]
) -> dict[str, dict[float, Summary]]:
    """Return the losses of arms with method color by tau, one series per variant of the method."""
    losses = {line.arm: line.loss for line in lines}
    found: dict[str, dict[float, Summary]] = {}
    for arm in arms:
        if arm.method == "color" and arm.tau and arm.name in losses:
            name = "color" if arm.batch is None else f"color, batch {arm.batch}"
            name += "" if arm.leaks == "remove" else ", leaks kept"
            found.setdefault(name, {})[arm.tau] = losses[arm.name]
    return found


def _table(rows: Rows) -> Table | None:
    if not rows:
        return None
    return Table(list(rows[0]), [[_words(value) for value in row.values()] for row in rows])


def _words(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else str(value)


def write_report(folder: Path, title: str, found: Sequence[Section]) -> None:
    """Write `report.html`, which is self-contained, and `report.md` with its picture files."""
    (folder / "report.html").write_text(html.html(title, found), encoding="utf-8")
    (folder / "report.md").write_text(html.markdown(title, found), encoding="utf-8")
    for picture in (section.picture for section in found if section.picture):
        (folder / f"{picture.name}.svg").write_bytes(picture.light)
