"""Metadata for the web UI: pictures and tables."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from colorfilter.evaluation.figures import Picture, training_curve


def curve_metadata(folder: Path) -> dict[str, Any]:
    """Return a training run's learning curve as a picture, and its held-out losses as a table."""
    path = folder / "curve.parquet"
    if not path.exists():
        return {}
    curve = pl.read_parquet(path)
    held_out = curve.drop_nulls("held_out_loss").drop("endpoint")
    shown: dict[str, Any] = {"learning curve": picture(training_curve(curve))}
    return {**shown, "losses by step": table(held_out.to_dicts())} if len(held_out) else shown


def picture(drawn: Picture) -> dg.MarkdownMetadataValue:
    """Return a picture as Markdown metadata, which the web UI shows in a dialog."""
    encoded = base64.b64encode(drawn.light).decode()
    return dg.MetadataValue.md(f"![{drawn.words}](data:image/svg+xml;base64,{encoded})")


def table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Return rows, possibly none, as table metadata; floats are rounded to four decimals."""
    return dg.MetadataValue.table(
        [
            dg.TableRecord({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
            for row in rows
        ],
        schema=None if rows else dg.TableSchema(columns=[]),  # Dagster infers it from rows
    )
