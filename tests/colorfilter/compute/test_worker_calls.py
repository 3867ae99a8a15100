from pathlib import Path

import numpy as np
import pytest
import torch

from colorfilter.compute import worker_calls
from colorfilter.config.recipe import Model
from colorfilter.models import checkpoints
from colorfilter.scoring.scoring import Scorer

SAMPLE = np.arange(16)[None] + 3


@pytest.fixture
def checkpoint(tiny: Model, tmp_path: Path) -> Path:
    checkpoints.build(tiny, 300, 16, seed=0).save_pretrained(tmp_path)
    worker_calls.unload()
    return tmp_path


def test_a_loaded_model_is_used_again_for_the_same_work_only(checkpoint: Path) -> None:
    first = worker_calls.scorer("m", checkpoint, "float32", SAMPLE)
    assert worker_calls.scorer("m", checkpoint, "float32", SAMPLE) is first
    second = worker_calls.scorer("m", checkpoint, "bf16", SAMPLE)
    assert second is not first
    assert worker_calls.scorer("m", checkpoint, "bf16", SAMPLE) is second
    assert worker_calls.scorer("m", checkpoint, "float32", SAMPLE) is first


def test_fp16_gives_way_on_a_cpu(checkpoint: Path) -> None:
    if worker_calls.kind() != "cpu":
        pytest.skip("no CPU run")
    scorer = worker_calls.scorer("m", checkpoint, "fp16", SAMPLE)
    assert scorer.precision in {"bf16", "float32"}


def test_a_precision_that_is_too_coarse_for_a_model_gives_way_to_float32(
    tiny: Model, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_calls, "multiplies", lambda _: True)
    assert worker_calls.scorer("m", checkpoint, "bf16", SAMPLE).precision == "bf16"
    rough = checkpoints.build(tiny, 300, 16, seed=0)
    with torch.no_grad():
        rough.get_output_embeddings().weight.mul_(300)
        rough.get_input_embeddings().weight.mul_(300)
    rough.save_pretrained(checkpoint)
    assert worker_calls.scorer("rough", checkpoint, "bf16", SAMPLE).precision == "float32"


def test_what_a_precision_makes_infinite_gives_way_to_the_next(
    tiny: Model, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_calls, "multiplies", lambda _: True)
    large = checkpoints.build(tiny, 300, 16, seed=0)
    with torch.no_grad():
        large.get_input_embeddings().weight.mul_(1e7)  # the norms take it out again
    large.save_pretrained(checkpoint)
    assert worker_calls.scorer("large", checkpoint, "fp16", SAMPLE).precision == "bf16"


def test_the_share_of_the_matrix_rate_counts_every_product(tiny: Model) -> None:
    model = checkpoints.build(tiny, 300, 16, seed=0)
    per_layer = 16 * 48 + 16 * 16 + 2 * 16 * 32
    assert Scorer(model).flops_per_token == 2 * (per_layer + 300 * 16)
