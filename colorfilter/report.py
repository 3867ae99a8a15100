"""Evaluations to a report that people read: tables in Markdown, curves and histogram as PNG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import polars as pl

from colorfilter.evaluation import (
    Summary,
    TokensToMatch,
    paired_difference,
    summarize,
    tokens_to_match,
    verdict,
)
from colorfilter.tables import fetch_frame

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
    def held_out_loss(self) -> Summary:
        return summarize(self.losses)


def arm_lines(evaluations: pl.DataFrame) -> list[ArmLine]:
    """The comparison: a line per arm and end point. `evaluations` has the columns EVALUATIONS.

    Every arm but random is held against random seed by seed: by the difference of losses at the
    same number of tokens, and by its tokens-to-match, from random's end points.
    """
    losses = evaluations.filter(pl.col("metric") == "held_out_loss").sort("tokens", "seed")
    bits = evaluations.filter(pl.col("metric") == "bits_per_byte")
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
    return lines


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


EXTREMES = """
    WITH per_document AS (
        SELECT
            d.shard, d.doc_id, d.source_file, d.source_line, d.n_tokens,
            sum(c.color * s.n_tokens) / sum(s.n_tokens) AS color
        FROM documents AS d
        JOIN spans AS s USING (shard, doc_id)
        JOIN color AS c ON c.shard = s.shard AND c.position = s.position AND c.domain = $domain
        WHERE NOT starts_with(d.shard, '_') AND d.n_tokens >= $length
        GROUP BY ALL
    )
    (SELECT 'best' AS place, * FROM per_document ORDER BY color, doc_id LIMIT $n)
    UNION ALL
    (
        SELECT 'cutoff', * FROM per_document
        ORDER BY abs(color - (SELECT quantile_disc(color, $share) FROM per_document)), doc_id
        LIMIT $n
    )
    UNION ALL
    (
        SELECT 'median', * FROM per_document
        ORDER BY abs(color - (SELECT median(color) FROM per_document)), doc_id
        LIMIT $n
    )
    UNION ALL
    (SELECT 'worst', * FROM per_document ORDER BY color DESC, doc_id LIMIT $n)
"""


def extremes(
    connection: duckdb.DuckDBPyConnection, domain: str, length: int, share: float, n: int = 5
) -> pl.DataFrame:
    """The documents of lowest color, around the best `share`'s edge, median, and highest.

    Documents of at least one sequence's length; their color is the token-weighted mean of the
    sequences they stand in.
    """
    parameters = {"domain": domain, "length": length, "share": share, "n": n}
    table = fetch_frame(connection, EXTREMES, parameters)
    order = {"best": 0, "cutoff": 1, "median": 2, "worst": 3}
    return table.sort(pl.col("place").replace_strict(order), "color", "doc_id")


def excerpts(table: pl.DataFrame, documents: Mapping[str, Path], chars: int = 160) -> pl.DataFrame:
    """Add `excerpt`, the beginning of each document's text, on one line."""
    if table.is_empty():
        return table.with_columns(excerpt=pl.lit("", dtype=pl.String))
    parts = []
    for (shard,), part in table.group_by(["shard"], maintain_order=True):
        texts = (
            pl.scan_parquet(documents[str(shard)])
            .filter(pl.col("doc_id").is_in(list(part["doc_id"])))
            .select("doc_id", excerpt=pl.col("text").str.slice(0, 4 * chars))
            .collect()
        )
        parts.append(part.join(texts, on="doc_id", maintain_order="left"))
    one_line = pl.col("excerpt").str.replace_all(r"\s+", " ").str.strip_chars().str.slice(0, chars)
    joined = pl.concat(parts).with_columns(one_line)
    return table.join(
        joined.select("doc_id", "excerpt").unique(), on="doc_id", maintain_order="left"
    )


def interval(summary: Summary, places: int = 3) -> str:
    """'mean ± half-width', or the mean alone for one seed."""
    if math.isnan(summary.half_width):
        return f"{summary.mean:.{places}f}"
    return f"{summary.mean:.{places}f} ± {summary.half_width:.{places}f}"


def against(difference: Summary | None) -> str:
    """A paired difference in words: 'mean ± half-width, verdict'."""
    if difference is None:
        return "-"
    return f"{interval(difference)}, {verdict(difference)}"


def comparison_rows(lines: Sequence[ArmLine]) -> list[list[str]]:
    """The comparison as words, in the columns of COMPARISON_HEADER."""
    return [
        [
            line.arm,
            f"{line.tokens:,}",
            " ".join(f"{loss:.3f}" for loss in line.losses),
            interval(line.held_out_loss),
            interval(line.bits_per_byte),
            against(line.against_random),
            " ".join(str(m) for m in line.matches) or "-",
        ]
        for line in lines
    ]


COMPARISON_HEADER = [
    "arm",
    "tokens",
    "loss by seed",
    "mean, 95 %",
    "bits/byte",
    "against random",
    "tokens-to-match",
]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; bars within cells are escaped."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *(line(r) for r in rows)])


def write_report(
    folder: Path,
    title: str,
    evaluations: pl.DataFrame,
    documents: pl.DataFrame,
    curves: Mapping[str, Sequence[pl.DataFrame]],
    colors: Mapping[str, Sequence[float]],
) -> None:
    """Write `report.md`, `curves.png` and `color.png`.

    `documents` comes from `excerpts`, `curves` are learning curves per arm (one per seed),
    `colors` values of color to draw as histograms by name.
    """
    draw_curves(curves, folder / "curves.png")
    draw_colors(colors, folder / "color.png")
    others = evaluations.filter(pl.col("metric").str.starts_with("probe"))
    facts = [[r["arm"], r["metric"], f"{r['value']:.4f}"] for r in others.to_dicts()]
    samples = [
        [r["place"], f"{r['color']:.3f}", Path(r["source_file"]).name, f"`{_code(r['excerpt'])}`"]
        for r in documents.to_dicts()
    ]
    text = f"""# {title}

Held-out loss in nats per token, lower is better. Against random: the difference to the random arm
at as many tokens, paired by seed, with its 95 % interval. tokens-to-match: how many times the
tokens the random arm needs for the same loss, seed by seed, from its annealed end points.

{markdown_table(COMPARISON_HEADER, comparison_rows(arm_lines(evaluations)))}

![learning curves](curves.png)

## The probe

Text of the domain, scored like corpus and never selected: the chance that it ranks before a
sequence of the corpus, and the share of it that lies before the cutoff.

{markdown_table(["arm", "metric", "value"], facts)}

![color](color.png)

## Documents

The corpus's documents with the lowest color, at the cutoff, in the middle, and with the highest.

{markdown_table(["place", "color", "file", "begins"], samples)}
"""
    (folder / "report.md").write_text(text, encoding="utf-8")


def _code(text: str) -> str:
    return (text or "").replace("`", "'")


def draw_curves(curves: Mapping[str, Sequence[pl.DataFrame]], path: Path) -> None:
    """Held-out loss over training tokens: the trunk as a line, annealed end points as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="training tokens", ylabel="held-out loss, nats per token")
    for i, (arm, seeds) in enumerate(curves.items()):
        for j, curve in enumerate(seeds):
            points = curve.drop_nulls("held_out_loss")
            trunk = points.filter(pl.col("endpoint").is_null())
            ends = points.filter(pl.col("tokens") == pl.col("endpoint"))
            label = arm if j == 0 else None
            axes.plot(trunk["tokens"], trunk["held_out_loss"], color=f"C{i}", alpha=0.5)
            axes.plot(ends["tokens"], ends["held_out_loss"], "o", color=f"C{i}", label=label)
    axes.set_xscale("log")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_colors(colors: Mapping[str, Sequence[float]], path: Path) -> None:
    """Histograms of color, each scaled to its own number of sequences."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="color, nats per token (lower is better)", ylabel="density")
    for name, values in colors.items():
        axes.hist(values, bins=80, density=True, alpha=0.6, label=name)
    axes.legend()
    figure.savefig(path, dpi=120)
