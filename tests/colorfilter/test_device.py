from pathlib import Path

import pytest

from colorfilter import device, models
from colorfilter.errors import InputError
from colorfilter.recipe import Model


def test_a_loaded_model_is_used_again_for_the_same_work_only(tiny: Model, tmp_path: Path) -> None:
    models.build(tiny, 300, 16, seed=0).save_pretrained(tmp_path)
    (first,) = device._scorers({"m": tmp_path}, "float32", None).values()
    assert device._scorers({"m": tmp_path}, "float32", None)["m"] is first
    assert device._scorers({"m": tmp_path}, "float32", 3)["m"] is not first
    assert list(device._loaded) == [("m", "float32", 3)]


def test_fp16_is_refused_on_a_cpu(tiny: Model, tmp_path: Path) -> None:
    if device.kind() != "cpu":
        pytest.skip("no CPU run")
    with pytest.raises(InputError, match="fp16 is emulated"):
        device._scorers({"m": tmp_path}, "fp16", None)
