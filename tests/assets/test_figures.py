from assets.figures import histogram, picture, table

INLINE = 1_000  # characters of Markdown up to which the web UI draws a picture in the table


def test_pictures_are_small_enough_to_be_drawn_inline() -> None:
    curve = picture([10.0 - 0.1234 * i for i in range(40)], "training loss")
    bars = histogram([i * 7919 % 1000 for i in range(28)], -123.45, 123.45)
    assert len(str(curve.value)) < INLINE
    assert len(str(bars.value)) < INLINE


def test_a_flat_curve_is_drawn() -> None:
    assert "loss: 1.000 to 1.000" in str(picture([1.0, 1.0], "loss").value)


def test_a_table_may_be_empty() -> None:
    assert list(table([]).records) == []
    (record,) = table([{"loss": 1.23456, "arm": "color"}]).records
    assert record.data == {"loss": 1.2346, "arm": "color"}
