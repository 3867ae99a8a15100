"""Evaluate tasks by lm-evaluation-harness: its prompts and metrics, this project's losses.

The tasks are the harness's own YAML files, each pointed at a local file of items (`write_tasks`),
so that the harness's command line can run the same tasks. The accuracy of small models is at
chance, so the mean loss of the correct answer, in nats per token, is measured as well.
"""

import contextlib
import io
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
import torch
import yaml
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import resolve_max_length
from transformers import PreTrainedModel

from colorfilter.data.tasks import Item, read_items
from colorfilter.data.tokens import Encoder
from colorfilter.errors import InputError
from colorfilter.progress import Progress, silent
from colorfilter.scoring.chunks import batch_sequences
from colorfilter.scoring.labels import IGNORED
from colorfilter.scoring.scoring import Scorer
from colorfilter.storage.scratch import scratch

SHIPPED = Path(lm_eval.tasks.__file__).parent
CONFIGS = {
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "sciq": "sciq/sciq.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "winogrande": "winogrande/default.yaml",
}
METRICS = ("acc", "acc_norm")
LEAST_WIDTH = 64

Request = tuple[tuple[str, str], list[int], list[int]]


def write_tasks(items: Path, folder: Path, fits: Callable[[Item], bool]) -> dict[str, int]:
    """Write `<task>.jsonl` and `<task>.yaml` for every `<task>.jsonl` in `items`.

    `<task>.jsonl` holds the items that fit, in the form written by `tasks.split_tasks`.
    `<task>.yaml` is the harness's own file with these items as its data set, so
    `lm_eval --include_path <folder>` runs the same tasks. Returns the number of items by task.
    Raises InputError if no item of a task fits.
    """
    counts = {}
    for path in sorted(items.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line, item in zip(lines, read_items(path), strict=True) if fits(item)]
        if not kept:
            raise InputError(
                f"task {path.stem}: no item's choices fit the model's context; "
                "use a longer context or remove the task"
            )
        data = folder / path.name
        data.write_text("\n".join(kept) + "\n")
        config = {
            "include": str(SHIPPED / CONFIGS[path.stem]),
            "task": path.stem,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(folder / "cache"),
            },
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
            "num_fewshot": 0,
        }
        (folder / f"{path.stem}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        counts[path.stem] = len(kept)
    return counts


class ScoredModel(TemplateLM):  # type: ignore[misc]
    """A model wrapped for the harness, for tasks that need log-likelihoods of continuations.

    The harness's template tokenizes prompts. A continuation's log-likelihood is computed from the
    loss that Scorer returns when only the continuation's tokens are labels. The harness also
    expects whether the continuation is the model's greedy choice; it is not computed and always
    False, because neither accuracy nor length-normalised accuracy reads it. `answers` holds the
    log-likelihood in nats and the number of tokens by (context, continuation). `tokens` counts the
    tokens passed through the model. `progress` is called with the number of choices done.
    """

    def __init__(self, model: PreTrainedModel, encoder: Encoder, progress: Progress = silent):
        super().__init__()
        self._scorer = Scorer(model)
        self._encoder = encoder
        self._progress = progress
        self._context: int = resolve_max_length(model.config)
        self.tokens = 0
        self.answers: dict[tuple[str, str], tuple[float, int]] = {}

    @property
    def eot_token_id(self) -> int:
        return self._encoder.end_of_text

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        ids: list[int] = self._encoder.encode([string])[0].ids
        return ids

    def fits(self, item: Item) -> bool:
        """Return whether every choice fits the model's context, cutting the question if needed."""
        pairs = zip(item.contexts, item.continuations, strict=True)
        return all(len(self._encode_pair(*pair)[1]) <= self._context for pair in pairs)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood, in nats, of every request's continuation.

        A request longer than the model's context is truncated at its beginning, like in the
        harness's own models. Its continuation is kept completely, because only items that fit are
        evaluated (see `fits`).
        """
        inputs, labels = [], []
        for _pair, before, after in requests:
            tokens = (before + after)[-(self._context + 1) :]
            inputs.append(tokens[:-1])
            labels.append([IGNORED] * (len(tokens) - 1 - len(after)) + after)
        for i, (loss, n) in self._losses(inputs, labels):
            self.answers[requests[i][0]] = -loss * n, n
        return [(self.answers[pair][0], False) for pair, _, _ in requests]

    def _losses(
        self, inputs: Sequence[list[int]], labels: Sequence[list[int]]
    ) -> Iterator[tuple[int, tuple[float, int]]]:
        """Yield (row, (loss in nats per token, number of labels)) for every row of inputs.

        Rows of similar length are computed together, in few batch shapes, because a compiled model
        body is compiled once per shape.
        """
        device = self._scorer.device
        by_length = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        for width, group in itertools.groupby(by_length, lambda i: self._width(len(inputs[i]))):
            rows = list(group)
            size = batch_sequences(width, device.type)
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                tokens_BxW = np.zeros((size, width), dtype=np.int64)
                labels_BxW = np.full((size, width), IGNORED, dtype=np.int64)
                for row, i in enumerate(batch):
                    tokens_BxW[row, : len(inputs[i])] = inputs[i]
                    labels_BxW[row, : len(labels[i])] = labels[i]
                nll, n = self._scorer.losses(
                    torch.from_numpy(tokens_BxW).to(device), torch.from_numpy(labels_BxW).to(device)
                )
                yield from zip(batch, zip(nll.tolist(), n.tolist(), strict=True), strict=False)
                self.tokens += sum(len(inputs[i]) for i in batch)
                self._progress(len(batch))

    def _width(self, length: int) -> int:
        """Return the smallest power of two that holds a length, within limits."""
        return int(min(self._context, max(LEAST_WIDTH, 1 << (length - 1).bit_length())))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        """Raise: a task that needs this abstract method of the harness must fail, not score 0."""
        raise NotImplementedError("only tasks that need loglikelihood are supported")

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        """Raise: a task that needs this abstract method of the harness must fail, not score 0."""
        raise NotImplementedError("only tasks that need loglikelihood are supported")


def evaluate(scored: ScoredModel, items: Path) -> dict[str, float]:
    """Evaluate a model on the test items of tasks, the files `<task>.jsonl` in `items`.

    Returns for each task `<task>_acc`, `<task>_acc_norm` (if the harness has it for the task) and
    `<task>_loss` (mean over items of the loss of the correct answer, in nats per token), each with
    its standard error `..._stderr`, and `<task>_items`, the number of items. Items with a choice
    longer than the model's context are excluded. Raises InputError if no item of a task fits.
    """
    with scratch() as folder, _quiet():
        counts = write_tasks(items, folder, scored.fits)
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        loaded = manager.load(list(counts))
        for name, task in loaded["tasks"].items():
            unknown = task.aggregation().keys() - set(METRICS)
            if unknown:  # they may read values that ScoredModel does not compute
                raise RuntimeError(f"task {name}: unsupported metrics {', '.join(sorted(unknown))}")
        found = evaluator.evaluate(scored, loaded, log_samples=False)["results"]
        tested = {name: read_items(folder / f"{name}.jsonl") for name in counts}
    results: dict[str, float] = {}
    for name, tested_items in tested.items():
        for metric in METRICS:
            for suffix in ("", "_stderr"):
                value = found[name].get(f"{metric}{suffix},none")
                if isinstance(value, float):
                    results[f"{name}_{metric}{suffix}"] = value
        correct = np.array([scored.answers[item.correct] for item in tested_items])
        losses = -correct[:, 0] / correct[:, 1]
        results[f"{name}_loss"] = float(losses.mean())
        if len(losses) > 1:
            results[f"{name}_loss_stderr"] = float(losses.std(ddof=1) / math.sqrt(len(losses)))
        results[f"{name}_items"] = len(losses)
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's progress bars and step logs while the context lasts."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
