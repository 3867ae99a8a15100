"""Pictures for the web UI, small enough to be drawn inline (under 1,000 characters of Markdown)."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

WIDTH, HEIGHT = 200, 60


def curve_metadata(folder: Path) -> dict[str, Any]:
    """The learning curve of a training run: pictures of its losses and the table of its points."""
    path = folder / "curve.parquet"
    if not path.exists():
        return {}
    curve = pl.read_parquet(path)
    shown: dict[str, Any] = {
        "training loss": picture(_thin(list(curve["loss"]), 40), "training loss")
    }
    held_out = curve.drop_nulls("held_out_loss")
    if len(held_out):
        shown["held-out loss"] = picture(list(held_out["held_out_loss"]), "held-out loss")
        shown["losses by step"] = table(held_out.drop("endpoint").to_dicts())
    return shown


def picture(values: Sequence[float], label: str) -> dg.MarkdownMetadataValue:
    """A polyline of values with its first and last in words."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    step = WIDTH / max(1, len(values) - 1)
    points = " ".join(
        f"{round(i * step)},{round(2 + (HEIGHT - 4) * (high - v) / span)}"
        for i, v in enumerate(values)
    )
    drawn = f'<polyline fill="none" stroke="#36c" points="{points}"/>'
    return _inline(drawn, f"{label}: {values[0]:.3f} to {values[-1]:.3f}")


def histogram(counts: Sequence[int], low: float, high: float) -> dg.MarkdownMetadataValue:
    """Bars of counts over equal bins from low to high."""
    top = max(counts) or 1
    width = WIDTH / len(counts)
    tops = [round(HEIGHT - (HEIGHT - 2) * count / top) for count in counts]
    path = "".join(
        f"M{round(i * width)} {HEIGHT}V{y}h{width:.0f}V{HEIGHT}" for i, y in enumerate(tops)
    )
    return _inline(
        f'<path fill="#36c" d="{path}"/>', f"{low:.2f} to {high:.2f} nats per token; left is better"
    )


def outlines(
    others: Sequence[int], new: Sequence[int], low: float, high: float
) -> dg.MarkdownMetadataValue:
    """Two counts over equal bins from low to high as lines, each in shares of its own total."""
    shares = [[count / max(1, sum(counts)) for count in counts] for counts in (others, new)]
    tallest = max(map(max, shares)) or 1.0
    step = WIDTH / (len(new) - 1)
    drawn = ""
    for heights, colour in zip(shares, ("#999", "#36c"), strict=True):
        points = " ".join(
            f"{round(i * step)},{round(HEIGHT - 2 - (HEIGHT - 4) * height / tallest)}"
            for i, height in enumerate(heights)
        )
        drawn += f'<polyline fill="none" stroke="{colour}" points="{points}"/>'
    words = f"others grey, new blue; {low:.2f} to {high:.2f} nats per token; left is better"
    return _inline(drawn, words)


def table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Rows as a table, perhaps none; floats to four places."""
    return dg.MetadataValue.table(
        [
            dg.TableRecord({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
            for row in rows
        ],
        schema=None if rows else dg.TableSchema(columns=[]),  # of rows it is read off them
    )


def _inline(drawing: str, label: str) -> dg.MarkdownMetadataValue:
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{drawing}</svg>'
    )
    encoded = base64.b64encode(svg.encode()).decode()
    return dg.MetadataValue.md(f"![{label}](data:image/svg+xml;base64,{encoded})\n\n{label}")


def _thin(values: list[float], most: int) -> list[float]:
    """At most `most` values, each the mean of its neighbours."""
    size = max(1, -(-len(values) // most))
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    return [sum(g) / len(g) for g in groups]
