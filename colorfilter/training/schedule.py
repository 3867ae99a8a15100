"""The schedule of a training run: its phases, learning rates, and order of sequences.

The learning rate follows warm-up, stable, decay (arXiv 2405.18392) or a cosine. With warm-up,
stable, decay, further end points of a run cost only their decays: the trunk continues at a constant
rate, and each end point is a branch with a full decay. A run is then a list of phases,

    trunk to 0.8 a | branch to a | trunk to 0.8 b | branch to b | ...

where a branch starts from the trunk's last state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from colorfilter.config.recipe import Training


@dataclass(frozen=True)
class Phase:
    """Steps [start, stop) towards end point `target` (an index), which only a branch reaches."""

    target: int
    start: int
    stop: int
    branch: bool


def phases(training: Training, endpoints: Sequence[int]) -> list[Phase]:
    """Return the phases of a run to `endpoints`, which are in sequences and rising."""
    ends = [math.ceil(n / training.batch_sequences) for n in endpoints]
    course, trunk = [], 0
    for target, end in enumerate(ends):
        if training.schedule == "cosine":
            course.append(Phase(target, 0, end, branch=True))
            continue
        fork = max(trunk, end - math.ceil(training.decay * end))
        course.append(Phase(target, trunk, fork, branch=False))
        course.append(Phase(target, fork, end, branch=True))
        trunk = fork
    return course


def planned_sequences(training: Training, endpoints: Sequence[int]) -> int:
    """Return how many sequences a run to `endpoints` trains on in all, branches included."""
    size = training.batch_sequences
    sequences = 0
    for phase in phases(training, endpoints):
        last = endpoints[phase.target]
        sequences += min(phase.stop * size, last) - min(phase.start * size, last)
    return sequences


def learning_rate(training: Training, step: int, first_end: int, end: int, branch: bool) -> float:
    """Return the learning rate at a step.

    Warm-up is a share of the first end point, so that all end points share one trunk.
    """
    warmup = math.ceil(training.warmup * first_end)
    rate = training.learning_rate * min(1.0, (step + 1) / max(1, warmup))
    if training.schedule == "cosine":
        done = max(0.0, (step - warmup) / max(1, end - warmup))
        low = training.final_learning_rate
        return rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
    if branch:
        rate *= (end - step) / (math.ceil(training.decay * end) + 1)
    return rate


def training_order(seed: int, sequences: int) -> np.ndarray:
    """Return the rows in training order, int64 [sequences].

    A run to an end point of n sequences trains on the first n rows of this order, each once.
    """
    return np.random.default_rng(seed).permutation(sequences)
