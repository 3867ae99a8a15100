"""What is done in a worker process that has a device: chunks scored, models trained, evaluated."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from colorfilter import body, models, scoring, training, workers
from colorfilter.errors import InputError
from colorfilter.scoring import Receipt, Scorer
from colorfilter.tokens import open_tokens, real_tokens
from colorfilter.training import Checkpoint, TrainSpec

Losses = tuple[np.ndarray, np.ndarray]

_loaded: dict[tuple[str, str, int | None], Scorer] = {}


def kind() -> str:
    """The kind of device that this machine works on: cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def own_device() -> torch.device:
    """The worker's own device of that kind."""
    if kind() == "cuda":
        return torch.device("cuda", workers.index() % torch.cuda.device_count())
    return torch.device(kind())


def score(
    checkpoints: Mapping[str, Path],
    tokens: Path,
    shard: str,
    start: int,
    stop: int,
    out: Path,
    precision: str,
    boundary: int | None,
) -> Receipt:
    """Score and commit a chunk, by models given as fingerprint -> checkpoint."""
    scorers = _scorers(checkpoints, precision, boundary)
    return scoring.score_chunk(scorers, tokens, shard, start, stop, out, precision, workers.report)


def train(spec: TrainSpec, threads: int) -> tuple[list[Checkpoint], int, float]:
    """Train as the spec says, on so many CPU threads; also the tokens and seconds it took."""
    _loaded.clear()
    torch.set_num_threads(threads)
    body.prefer_onednn()
    tokens = 0

    def count(amount: int) -> None:
        nonlocal tokens
        tokens += amount
        workers.report(amount)

    begun = time.perf_counter()
    checkpoints = training.train(spec, own_device(), count)
    return checkpoints, tokens, time.perf_counter() - begun


def evaluate(checkpoint: Path, tokens: Path, precision: str) -> Losses:
    """Losses of packed tokens by one checkpoint."""
    torch.set_num_threads(1)
    rows, n_tokens = open_tokens(tokens), real_tokens(tokens)
    return scoring.sequence_losses(_load(checkpoint, precision), rows, n_tokens, workers.report)


def _scorers(
    checkpoints: Mapping[str, Path], precision: str, boundary: int | None
) -> dict[str, Scorer]:
    """The models asked for, loaded once and kept until others are."""
    torch.set_num_threads(1)
    wanted = {name: (name, precision, boundary) for name in checkpoints}
    for gone in _loaded.keys() - set(wanted.values()):
        del _loaded[gone]
    for name, key in wanted.items():
        if key not in _loaded:
            _loaded[key] = _load(checkpoints[name], precision, boundary)
    return {name: _loaded[key] for name, key in wanted.items()}


def _load(checkpoint: Path, precision: str, boundary: int | None = None) -> Scorer:
    device = own_device()
    if device.type != "cpu":
        return Scorer(models.to_device(models.load(checkpoint, precision), device), boundary)
    if precision == "fp16":
        raise InputError("precision: fp16 is emulated on a CPU; use float32 or bf16")
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise InputError("precision: this processor does not multiply in bf16; use float32")
    return Scorer(body.prepare(models.load(checkpoint, precision)), boundary)
