"""Start training runs, kill them, and read what they write."""

from pathlib import Path

import polars as pl
import pytest
import safetensors.torch
import torch

from colorfilter.training.spec import TrainSpec
from colorfilter.training.training import train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def assert_same_result(one: Path, other: Path) -> None:
    names = {p.name for p in one.iterdir()}
    assert names == {p.name for p in other.iterdir()}
    for folder in (p for p in one.iterdir() if p.is_dir()):
        mine, theirs = weights(folder), weights(other / folder.name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert pl.read_parquet(one / "curve.parquet").equals(pl.read_parquet(other / "curve.parquet"))


class KilledError(Exception):
    pass


class Killer:
    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, _: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KilledError


def killed(spec: TrainSpec, after: int) -> None:
    with pytest.raises(KilledError):
        train(spec, progress=Killer(after))
