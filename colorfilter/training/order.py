"""The order in which a model trains on packed sequences."""

import numpy as np


def training_order(seed: int, sequences: int) -> np.ndarray:
    """The rows in the order in which they are trained on, int64 [sequences].

    A run to an end point of n sequences has trained on the first n of these, each of them once.
    """
    return np.random.default_rng(seed).permutation(sequences)
