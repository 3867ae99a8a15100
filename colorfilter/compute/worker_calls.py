"""The calls that worker processes run on their devices: scoring, training and evaluation."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from transformers import PreTrainedModel

from colorfilter.compute import local_pool
from colorfilter.compute.local_pool import Timing
from colorfilter.data.tokens import Encoder, open_tokens, read_tokens, real_tokens
from colorfilter.models import attention, checkpoints
from colorfilter.scoring import scoring, token_losses
from colorfilter.scoring.chunks import Chunk, Receipt
from colorfilter.scoring.scoring import Losses, Scorer
from colorfilter.storage.remote import MirroredFolder, Place, borrowed, here
from colorfilter.storage.scratch import scratch
from colorfilter.training import training
from colorfilter.training.process_group import Group, Single
from colorfilter.training.spec import Checkpoint, TrainSpec

# Precisions to try in order, by the requested one.
FALLBACKS = {
    "fp16": ("fp16", "bf16", "float32"),
    "bf16": ("bf16", "float32"),
    "float32": ("float32",),
}
TOLERANCE = 5e-3  # nats per token: largest error of a sequence's loss against float64

_loaded: dict[tuple[str, str], Scorer] = {}


def kind() -> str:
    """Return the kind of device that this machine uses: cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def multiplies(precision: str) -> bool:
    """Return whether the device multiplies natively in a precision (on a CPU, fp16 is emulated)."""
    if precision == "bf16" and kind() == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if precision == "bf16" and kind() == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return precision != "fp16" or kind() != "cpu"


def devices() -> tuple[str, int]:
    """Return the kind of device that this machine uses, and how many workers it can hold."""
    counts = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": local_pool.cores()}
    return kind(), counts[kind()]


def own_device() -> torch.device:
    """Return the device of this worker."""
    if kind() == "cuda":
        return torch.device("cuda", local_pool.index() % torch.cuda.device_count())
    return torch.device(kind())


def _took(tokens: int, begun: float) -> Timing:
    return Timing(tokens, time.perf_counter() - begun, kind(), local_pool.node())


def score(chunk: Chunk) -> list[Receipt]:
    """Score a chunk with its models and commit the losses; return one receipt per model."""
    torch.set_num_threads(1)
    for gone in _loaded.keys() - {(m, chunk.precision) for m in chunk.models}:
        del _loaded[gone]
    sample = read_tokens(chunk.tokens, 0, 1)
    paths = {m: here(place) for m, place in chunk.models.items()}
    scorers = {m: scorer(m, path, chunk.precision, sample) for m, path in paths.items()}
    receipts = scoring.score_chunk(
        scorers,
        chunk.tokens,
        chunk.shard,
        chunk.start,
        chunk.stop,
        chunk.outs,
        chunk.eot_id,
        exact=lambda model: scorer(model, paths[model], "float32", sample),
        progress=local_pool.report,
    )
    return [
        replace(r, matrix_share=_matrix_share(scorers[r.model], r), node=local_pool.node())
        for r in receipts
    ]


def parameters(spec: TrainSpec) -> int:
    """Return the number of parameters of the model that a run trains."""
    length = open_tokens(spec.tokens).shape[1]
    return checkpoints.parameters_of(spec.start, Encoder(spec.tokenizer).vocab_size, length)


def train(
    spec: TrainSpec, threads: int, places: Mapping[Path, Place]
) -> tuple[list[Checkpoint], Timing]:
    """Train by a spec on `threads` CPU threads; return the checkpoints and what it took.

    `places` maps the spec's folders to locations that all machines can read. In a torch process
    group, its processes train the model jointly, and the first one reports progress.
    """
    unload()
    tokens = 0

    def count(amount: int) -> None:
        nonlocal tokens
        tokens += amount
        local_pool.report(amount if group.rank == 0 else 0)

    begun = time.perf_counter()
    group = Group() if distributed.is_initialized() else Single()
    with _on_this_machine(spec, places, group.rank == 0) as (own, keep):
        torch.set_num_threads(threads)
        attention.prefer_onednn()
        ends = training.train(own, own_device(), count, keep, group)
    made = [replace(c, path=spec.out / c.path.name) for c in ends]
    return made, _took(tokens, begun)


@contextlib.contextmanager
def _on_this_machine(
    spec: TrainSpec, places: Mapping[Path, Place], first: bool
) -> Iterator[tuple[TrainSpec, Callable[[], None]]]:
    """Yield the spec with its folders on this machine, and a function that saves output so far.

    The function mirrors the output folder to its location in `places`. In a group, only the first
    process's function does so.
    """
    with contextlib.ExitStack() as until_trained:

        @functools.cache
        def local(folder: Path) -> Path:
            return until_trained.enter_context(borrowed(places[folder]))

        out, keep = places[spec.out], training.keep_nothing
        if not isinstance(out, Path):
            out = until_trained.enter_context(scratch())
            if first:
                keep = MirroredFolder(out, places[spec.out]).push
        start, online = spec.start, spec.online
        if isinstance(start, str) and Path(start) in places:
            start = str(local(Path(start)))
        if online:
            pool = local(online.conditional.parent)
            online = replace(online, conditional=pool / online.conditional.name)
        own = replace(
            spec,
            start=start,
            tokens=local(spec.tokens),
            tokenizer=local(spec.tokenizer),
            held_out=spec.held_out and local(spec.held_out),
            online=online,
            out=out,
        )
        yield own, keep


def evaluate(checkpoint: Place, tokens: Place) -> tuple[Losses, Timing]:
    """Compute the losses of packed tokens with a checkpoint, in float32; also return the cost."""
    torch.set_num_threads(1)
    scorers = [Scorer(_load(here(checkpoint), "float32"))]
    begun = time.perf_counter()
    rows, n_tokens = read_tokens(tokens), real_tokens(tokens)
    (losses,) = scoring.sequence_losses(scorers, rows, n_tokens, progress=local_pool.report)
    return losses, _took(int(n_tokens.sum()), begun)


def evaluate_tasks(checkpoint: Place, items: Place) -> tuple[dict[str, float], Timing]:
    """Compute task metrics with a checkpoint, in float32 (see harness.evaluate), and the cost."""
    from colorfilter.evaluation import harness

    torch.set_num_threads(1)
    folder = here(checkpoint)
    model = _load(folder, "float32")
    scored = harness.ScoredModel(model, Encoder(folder), local_pool.report)
    begun = time.perf_counter()
    with borrowed(items) as folder_of_items:
        metrics = harness.evaluate(scored, folder_of_items)
    return metrics, _took(scored.tokens, begun)


def losses_by_token(
    checkpoint: Place, tokens: np.ndarray, eot_id: int | None
) -> tuple[np.ndarray, Timing]:
    """Compute the loss of every token [N, T] with a checkpoint, in float32; also return the cost.

    See token_losses.token_losses.
    """
    torch.set_num_threads(1)
    model = checkpoints.to_device(checkpoints.load(here(checkpoint)), own_device())
    begun = time.perf_counter()
    losses = token_losses.token_losses(model, tokens, eot_id)
    return losses, _took(tokens.size, begun)


def scorer(model: str, checkpoint: Path, precision: str, sample: np.ndarray) -> Scorer:
    """Return the scorer of a model, loaded on first use and cached.

    Its precision is the first one, starting with `precision`, in which the losses of a sample of
    sequences [N, T] are accurate.
    """
    key = model, precision
    if key not in _loaded:
        for candidate in filter(multiplies, FALLBACKS[precision]):
            found = Scorer(_load(checkpoint, candidate), candidate)
            if candidate == "float32" or _holds(found, checkpoint, sample):
                break
        _loaded[key] = found
    return _loaded[key]


def unload() -> None:
    """Release the cached models."""
    _loaded.clear()


def _load(checkpoint: Path, precision: str) -> PreTrainedModel:
    return attention.prepare(checkpoints.load(checkpoint, precision), own_device())


def _holds(scorer: Scorer, checkpoint: Path, sample: np.ndarray) -> bool:
    """Return whether losses of a sample [N, T] are within tolerance of those in float64."""
    device = torch.device("cpu") if kind() == "mps" else own_device()
    exact = checkpoints.to_device(checkpoints.load(checkpoint).double(), device)
    n_tokens = np.full(len(sample), sample.shape[1])
    ((here, _),) = scoring.sequence_losses([scorer], sample, n_tokens)
    ((truth, _),) = scoring.sequence_losses(
        [Scorer(exact, "float64", "reference")], sample, n_tokens
    )
    return bool((np.abs(here - truth) <= TOLERANCE).all())


def _matrix_share(scorer: Scorer, receipt: Receipt) -> float:
    rate = scorer.flops_per_token * receipt.tokens / receipt.seconds
    return rate / _matrix_rate(checkpoints.DTYPES[scorer.precision])


@functools.cache
def _matrix_rate(dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large matrix product on this device."""
    size = 1024 if kind() == "cpu" else 8192
    left, right = torch.ones(2, size, size, dtype=dtype, device=own_device())
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)
