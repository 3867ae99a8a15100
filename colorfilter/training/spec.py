"""The specification of a training run, and its number of tokens. Does not load torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from colorfilter.config.recipe import Model, Training
from colorfilter.data.tokens import open_tokens, real_tokens
from colorfilter.training.schedule import Phase, phases, training_order

RUNNING = "running.safetensors"  # the state of an unfinished run


@dataclass(frozen=True)
class Online:
    """Settings for choosing sequences during training (see rho_down).

    `conditional` is a .npy file with one loss per candidate, in nats per token. `eot_id` is the one
    with which its labels were computed (see labels.shifted_labels).
    """

    conditional: Path
    tau: float
    eot_id: int | None = None

    def candidates(self, chosen: int) -> int:
        """Return how many candidates have been seen once `chosen` sequences are chosen."""
        return int(self.tau * chosen)


@dataclass(frozen=True)
class TrainSpec:
    """One training run: everything that determines its result, and its paths."""

    start: Model | str  # a new architecture, or the folder or hub name of a checkpoint
    tokens: Path  # folder of packed sequences to train on
    tokenizer: Path
    training: Training
    seed: int  # of initial weights (of a new architecture) and order of sequences
    endpoints: tuple[int, ...]  # in sequences, rising; each gives a checkpoint
    out: Path
    held_out: Path | None = None  # packed sequences, for the learning curve
    online: Online | None = None  # choose from `tokens` during training; requires one end point

    def __str__(self) -> str:
        return f"training in {self.out}"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model at an end point."""

    path: Path
    tokens: int
    sizes: Mapping[str, int]  # see checkpoints.n_parameters


def planned_tokens(spec: TrainSpec) -> int:
    """Return how many tokens a run processes: in all phases, and in candidates to choose from."""
    return _tokens(spec, phases(spec.training, spec.endpoints))


def trained_tokens(spec: TrainSpec) -> int:
    """Return how many of the planned tokens the saved state has already processed."""
    running = spec.out / RUNNING
    if not running.exists():
        return 0
    state = state_scalars(running)
    begun = phases(spec.training, spec.endpoints)[: state["phase"] + 1]
    return _tokens(spec, [*begun[:-1], replace(begun[-1], stop=state["step"])])


def step_tokens(spec: TrainSpec) -> int:
    """Return the number of tokens per step, padding included."""
    return spec.training.batch_sequences * int(open_tokens(spec.tokens).shape[1])


def state_scalars(path: Path) -> dict[str, Any]:
    """Return the values in a state that are not tensors: phase, step, curve."""
    with safetensors.safe_open(path, "np") as file:
        scalars: dict[str, Any] = json.loads(file.metadata()["state"])
    return scalars


def _tokens(spec: TrainSpec, course: Sequence[Phase]) -> int:
    size = spec.training.batch_sequences
    n_tokens = real_tokens(spec.tokens)
    seen = tokens_seen(n_tokens, training_order(spec.seed, len(n_tokens)))
    tokens = 0
    for phase in course:
        last = spec.endpoints[phase.target]
        start, stop = (min(step * size, last) for step in (phase.start, phase.stop))
        tokens += seen[stop] - seen[start]
        if spec.online:
            chosen_from = spec.online.candidates(stop) - spec.online.candidates(start)
            tokens += chosen_from * open_tokens(spec.tokens).shape[1]
    return int(tokens)


def tokens_seen(n_tokens: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return the number of tokens in the first 0, 1, 2, ... sequences of an order."""
    return np.concatenate([[0], np.cumsum(n_tokens[order])])
