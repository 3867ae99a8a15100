"""Selection during training: a model's own current loss decides what it trains on.

RHO-down (arXiv 2406.10670, algorithm 2) selects from each tau * b candidates the b with the lowest
`conditional - current` loss, where current is the loss under the model that is then trained on
them. Candidates are read once, in the order of their rows. Choices are recorded as they are made,
so that a killed run resumes with the same choices.
"""

import os
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from colorfilter.data.tokens import open_tokens, real_tokens
from colorfilter.progress import Progress
from colorfilter.scoring.scoring import Scorer, sequence_losses
from colorfilter.training.spec import Online

CHOSEN = np.dtype([("row", "<i8"), ("score", "<f8")])


class Chooser:
    """Chooses from a folder of packed candidates and records its choices in `chosen.bin`."""

    def __init__(self, online: Online, tokens: Path, out: Path, progress: Progress) -> None:
        self._online = online
        self._tokens = open_tokens(tokens)
        self._n_tokens = real_tokens(tokens)
        self._conditional = np.load(online.conditional, mmap_mode="r")
        self._progress = progress
        self._scorer: Scorer | None = None
        self._record = (out / "chosen.bin").open("ab")

    def choose(self, model: PreTrainedModel, first: int, stop: int) -> np.ndarray:
        """Return the rows of choices [first, stop), int64, lowest score first; ties by row."""
        seen = slice(self._online.candidates(first), self._online.candidates(stop))
        if self._scorer is None:
            # A fixed kernel, not the fastest measured one: a resumed run must choose the same.
            self._scorer = Scorer(model, kernel="chunked")
        training = model.training
        model.eval()
        ((current, _),) = sequence_losses(
            [self._scorer],
            self._tokens[seen],
            self._n_tokens[seen],
            self._online.eot_id,
            self._progress,
        )
        model.train(training)
        scores = self._conditional[seen].astype(np.float64) - current
        best = np.argsort(scores, kind="stable")[: stop - first]
        chosen = np.empty(len(best), CHOSEN)
        chosen["row"], chosen["score"] = seen.start + best, scores[best]
        self._record.write(chosen.tobytes())
        return chosen["row"].copy()

    def go_on_from(self, first: int) -> None:
        """Discard choices number `first` and later; they will be made again."""
        self._record.truncate(first * CHOSEN.itemsize)

    def sync(self) -> None:
        """Flush all choices so far to disk."""
        self._record.flush()
        os.fsync(self._record.fileno())


def chosen_rows(out: Path) -> np.ndarray:
    """Return what a finished run in `out` chose, in order: candidate `row` and `score`."""
    rows: np.ndarray = np.fromfile(out / "chosen.bin", CHOSEN)
    return rows
