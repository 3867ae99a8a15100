"""Evaluations to a report that people read: its tables, and which sections there are."""

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
    """One arm at one number of training tokens, over the seeds."""

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
    """The loss that arms are compared by: of the tasks' correct answers, or of held-out text."""
    measured = set(evaluations["metric"])
    return "tasks_loss" if "tasks_loss" in measured else "held_out_loss"


def arm_lines(evaluations: pl.DataFrame, suffix: str = "") -> list[ArmLine]:
    """The comparison: a line per arm and end point, of equal tokens the lowest mean loss first.

    `evaluations` has the columns EVALUATIONS; read are the metrics with a suffix, such as
    evaluation.FINETUNED. Every arm but random is held against random seed by seed: by the
    difference of losses at the same number of tokens, and by its tokens-to-match, from random's end
    points.
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
    """tokens-to-match as evaluations: the metric says whether the value is exact or a bound."""
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
    """Loss and accuracy by task, a row per arm and end point; none where there are no tasks."""
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
    """'mean ± half-width', or the mean alone for one seed."""
    if math.isnan(summary.half_width):
        return f"{summary.mean:.{places}f}"
    return f"{summary.mean:.{places}f} ± {summary.half_width:.{places}f}"


def matches_in_words(matches: Sequence[TokensToMatch]) -> str:
    """tokens-to-match by seed; where all are equal, as bounds may be, once."""
    words = [str(m) for m in matches]
    if len(words) > 1 and len(set(words)) == 1:
        return f"{words[0]} x{len(words)}"
    return " ".join(words) or "-"


def comparison_rows(lines: Sequence[ArmLine]) -> list[list[str]]:
    """The comparison as words, in the columns of COMPARISON_HEADER."""
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
    "mean, 95 %",
    "bits/byte",
    "against random",
    "verdict",
    "tokens-to-match",
]


def comparison_in_brief(lines: Sequence[ArmLine]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison for a terminal of 80 columns."""
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
    return ["arm", "tokens", "mean, 95 %", "than random", "tokens-to-match"], rows


def comparison_in_a_sentence(lines: Sequence[ArmLine]) -> str:
    """What the best arm gains over random, by the seed that gains least.

    Of arms that are better than random, the best is the one of fewest tokens, then of lowest loss.
    Empty where nothing is compared with random.
    """
    compared = [line for line in lines if line.against_random is not None and line.matches]
    if not compared:
        return ""
    better = [line for line in compared if _against(line.against_random)[1] == "better"]
    if not better:
        if all(_against(line.against_random)[1] == "one seed" for line in compared):
            return "One seed is too few to compare an arm with random."
        return f"At {compared[0].tokens:,} tokens no arm is significantly better than random."
    best = min(better, key=lambda line: (line.tokens, line.loss.mean))
    least = min(best.matches, key=lambda match: (match.bound != "<", match.ratio))
    seeds = f"each of {len(best.matches)} seeds"
    if least.bound == "<":
        return f"{best.arm} is better than random at {best.tokens:,} tokens, but not with {seeds}."
    more = "more than" if least.bound == ">" else "at least"
    return (
        f"{best.arm} reached with {best.tokens:,} tokens what random needs {more} "
        f"{least.ratio * best.tokens:,.0f} for, with {seeds}."
    )


Rows = Sequence[Mapping[str, object]]

LOSSES = {
    "held_out_loss": "Held-out loss",
    "tasks_loss": "Loss of the tasks' correct answers, each task alike,",
}
COMPARISON = (
    "{loss} in nats per token, lower is better, of target models trained on what each arm "
    "selected. Bits per byte are those of held-out text. Against random: the difference at as many "
    "tokens, paired by seed, with its 95 % interval. tokens-to-match: how many times the tokens "
    "random needs for the same loss, seed by seed, from its annealed end points."
)
MATCHES = (
    "A dot is a seed, a triangle a bound: random's end points reach no farther. Where no seed is a "
    "bound, the diamond is the mean and the bar its 95 % interval, cut where it leaves the picture."
)
SWEEP = "The bars, and the band of random at the same number of tokens, are 95 % intervals."
CURVES = (
    "Lines are the trunks, at a constant learning rate; dots are end points, annealed by a decay."
)
SCORES = (
    "The probe is text of the domain that was scored like corpus and is never selected. probe_auc: "
    "the chance that a sequence of it ranks before one of the corpus; probe_recall: the share of "
    "it that lies before the cutoff."
)
FINETUNED_TOO = "The target models after an epoch over D_down. The paper finds less gain here."
ON_TASKS = "Loss of the correct answer, nats per token, and accuracy; means over seeds."
CONFIDENCE = (
    "A conditional trained with another seed scores a sample of the corpus. Of the sample's best "
    "1/tau, so many would not be selected by it."
)
LEAKAGE = (
    "Selected text that has 13 words in a row in common with held-out text or task items. Its "
    "sequences are not trained on, unless the arm keeps leaks."
)
COST = (
    "Predicted: tokens that pass, and billions of auxiliary-model forwards of a token, a backward "
    "counting as two. Measured: tokens that passed, and seconds added up over workers."
)
SELECTED = (
    "Sequences from the best end of the corpus to the worst. Every token is coloured by what the "
    "conditional loses on it minus what the prior loses: blue tokens make the color lower, which "
    "is better, orange ones higher. The number shows when the pointer rests on a token."
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
    """What the report says, in the order of reading; a section without content is left out.

    `evaluations` has the columns EVALUATIONS; `curves` are learning curves per arm, one per seed;
    `colors` are values of color to draw as histograms by name, `cutoffs` those that arms cut at;
    `confidence`, `leakage` and `cost` are rows of tables, all with the keys of the first.
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
    # The first line of an arm is at as many tokens as the others.
    matches = {line.arm: line.matches for line in reversed(lines) if line.matches}
    matches = {line.arm: matches[line.arm] for line in lines if line.arm in matches}
    if matches:
        found.append(Section("tokens-to-match", MATCHES, picture=figures.match_plot(matches)))
    by_tau = _losses_by_tau(lines, arms)
    if len({tau for line in by_tau.values() for tau in line}) > 1:
        random = next((line.loss for line in lines if line.arm == "random"), None)
        loss = LOSSES[judged_by(evaluations)].rstrip(",")
        picture = figures.tau_sweep(by_tau, random, loss)
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
    """Loss of the arms of method color by tau, a series per form of the method."""
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
    """Write `report.html`, which needs no other file, and `report.md` with its pictures."""
    (folder / "report.html").write_text(html.html(title, found), encoding="utf-8")
    (folder / "report.md").write_text(html.markdown(title, found), encoding="utf-8")
    for picture in (section.picture for section in found if section.picture):
        (folder / f"{picture.name}.svg").write_bytes(picture.light)
