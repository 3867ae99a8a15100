import base64
from pathlib import Path
from xml.etree import ElementTree as ET

import dagster as dg
import polars as pl

from assets.metadata import curve_metadata, picture, table
from colorfilter.evaluation.figures import binned_scores


def test_a_picture_is_markdown_that_holds_it() -> None:
    drawn = binned_scores({"corpus": [1, 2]}, -1.0, 1.0)
    words, _, encoded = (
        str(picture(drawn).value).rstrip(")").partition("](data:image/svg+xml;base64,")
    )
    assert words == f"![{drawn.words}"
    assert ET.fromstring(base64.b64decode(encoded)).tag.endswith("}svg")


def test_a_run_shows_its_curve_and_the_points_that_were_evaluated(tmp_path: Path) -> None:
    assert curve_metadata(tmp_path) == {}
    curve = {"endpoint": [None] * 3, "tokens": [8, 16, 24], "loss": [3.0, 2.0, 1.0]}
    evaluated = pl.DataFrame({**curve, "held_out_loss": [3.1, None, 1.23456]})
    evaluated.write_parquet(tmp_path / "curve.parquet")
    shown = curve_metadata(tmp_path)
    points = shown["losses by step"]
    assert isinstance(points, dg.TableMetadataValue)
    assert [p.data["held_out_loss"] for p in points.records] == [3.1, 1.2346]
    evaluated.with_columns(held_out_loss=pl.lit(None, pl.Float64)).write_parquet(
        tmp_path / "curve.parquet"
    )
    assert list(curve_metadata(tmp_path)) == ["learning curve"]


def test_a_table_may_be_empty() -> None:
    assert list(table([]).records) == []
    (record,) = table([{"loss": 1.23456, "arm": "color"}]).records
    assert record.data == {"loss": 1.2346, "arm": "color"}
