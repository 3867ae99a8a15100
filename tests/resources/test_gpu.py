"""Training by groups of local processes: the result matches one process, and failures."""

import contextlib
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from colorfilter.compute import machine as local
from colorfilter.compute.local_pool import Workers
from colorfilter.compute.machine import Machine
from colorfilter.config.recipe import Model, Training
from colorfilter.data import tokens
from colorfilter.errors import InputError
from colorfilter.training.spec import TrainSpec
from resources import gpu as resource
from resources.gpu import Gpu, release
from resources.home import Home

LENGTH = 64
CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": LENGTH,
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    """Steps of 1,024 tokens, which two processes share."""
    root = tmp_path_factory.mktemp("training")
    texts = [f"{i} is followed by {i + 1}, and that by {i + 2}; " * 8 for i in range(300)]
    (root / "tokenizer").mkdir()
    tokens.train_tokenizer(texts, 300, root / "tokenizer")
    rows = [{"doc_id": str(i), "sha256": str(i), "text": text} for i, text in enumerate(texts)]
    tokens.pack(rows, tokens.Encoder(root / "tokenizer"), LENGTH, root / "packed")
    return TrainSpec(
        start=Model(type="gpt_neox", config=CONFIG),
        tokens=root / "packed",
        tokenizer=root / "tokenizer",
        training=Training(learning_rate=1e-2, batch_sequences=16),
        seed=3,
        endpoints=(160,),
        out=root / "out",
    )


@contextlib.contextmanager
def machine_of(cores: int) -> Iterator[list[Machine]]:
    """Take this machine for one of some CPU cores; gives the machines that are made."""
    made: list[Machine] = []

    class Asked(Workers):
        """Workers that are asked what devices there are."""

        def run(self, *_: Any) -> Iterator[Any]:
            yield 0, ("cpu", cores)

    class Recorded(Machine):
        def __init__(self, kind: str, devices: int) -> None:
            super().__init__(kind, devices)
            made.append(self)

    release()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "cores", lambda: cores)
        patch.setattr(resource, "Workers", Asked)
        patch.setattr(resource, "Machine", Recorded)
        try:
            yield made
        finally:
            release()


def trained(spec: TrainSpec, folder: Path, cores: int) -> tuple[pl.DataFrame, int]:
    """The curve of a run on so many cores, and the progress that was told."""
    told: list[int] = []
    home = Home(folder).claim("tests")
    own = replace(spec, out=home.artifacts / "model")
    with machine_of(cores):
        ((_, (checkpoint,)),) = Gpu(home=str(home.root)).train([own], 1, told.append)
        assert checkpoint.path == own.out / f"tokens-{checkpoint.tokens}"
    return pl.read_parquet(own.out / "curve.parquet"), sum(told)


def test_two_processes_train_the_model_that_one_does(spec: TrainSpec, tmp_path: Path) -> None:
    alone, told = trained(spec, tmp_path / "alone", 1)
    together, told_together = trained(spec, tmp_path / "together", 2)
    again, _ = trained(spec, tmp_path / "again", 2)
    assert told == told_together == alone["tokens"][-1]
    assert np.abs(alone["loss"] - together["loss"]).max() < 2e-5
    assert alone["loss"][-1] < alone["loss"][0] - 0.3
    assert again.equals(together)


def test_what_fails_in_a_group_is_raised_and_the_others_end(
    spec: TrainSpec, tmp_path: Path
) -> None:
    wrong = replace(spec, start=Model(type="gpt_neox", config={**CONFIG, "hidden_act": "none"}))
    with pytest.raises(InputError, match="gpt_neox"):
        trained(wrong, tmp_path, 2)


def test_a_group_that_loses_a_process_fails_and_goes_on_when_run_again(
    spec: TrainSpec, tmp_path: Path
) -> None:
    whole, _ = trained(spec, tmp_path / "whole", 2)
    home = Home(tmp_path / "killed").claim("tests")
    own = replace(spec, out=home.artifacts / "model")

    def kill_one(_: int) -> None:
        multiprocessing.active_children()[0].kill()

    with machine_of(2) as made:
        with pytest.raises(RuntimeError, match="run again"):
            list(Gpu(home=str(home.root)).train([own], 1, kill_one))
        (machine,) = made
        assert machine.broken
    curve, _ = trained(spec, tmp_path / "killed", 2)
    assert curve.equals(whole)
