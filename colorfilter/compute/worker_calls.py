"""What is done in a worker process that has a device: chunks scored, models trained, evaluated."""

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

# What is tried in turn where a precision is asked for.
FALLBACKS = {
    "fp16": ("fp16", "bf16", "float32"),
    "bf16": ("bf16", "float32"),
    "float32": ("float32",),
}
TOLERANCE = 5e-3  # nats per token, of a sequence's loss in 16 bits against float64

_loaded: dict[tuple[str, str], Scorer] = {}


def kind() -> str:
    """The kind of device that this machine works on: cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def multiplies(precision: str) -> bool:
    """Whether the device has products in a precision. (On a CPU, fp16 is emulated and slow.)"""
    if precision == "bf16" and kind() == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if precision == "bf16" and kind() == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return precision != "fp16" or kind() != "cpu"


def devices() -> tuple[str, int]:
    """The kind of device that this machine works on, and how many of it can work at once."""
    counts = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": local_pool.cores()}
    return kind(), counts[kind()]


def own_device() -> torch.device:
    """The worker's own device of that kind."""
    if kind() == "cuda":
        return torch.device("cuda", local_pool.index() % torch.cuda.device_count())
    return torch.device(kind())


def _took(tokens: int, begun: float) -> Timing:
    return Timing(tokens, time.perf_counter() - begun, kind(), local_pool.node())


def score(chunk: Chunk) -> list[Receipt]:
    """Score and commit a chunk."""
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
    return [replace(r, matrix_share=_matrix_share(scorers[r.model], r)) for r in receipts]


def parameters(spec: TrainSpec) -> int:
    """Number of parameters of the model that a run trains."""
    length = open_tokens(spec.tokens).shape[1]
    return checkpoints.parameters_of(spec.start, Encoder(spec.tokenizer).vocab_size, length)


def train(
    spec: TrainSpec, threads: int, places: Mapping[Path, Place]
) -> tuple[list[Checkpoint], Timing]:
    """Train as the spec says, on so many CPU threads; also what it took.

    `places` says where the spec's folders lie for all machines. Where torch has a process group,
    its processes train the model together, and the first one counts.
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
    """The spec with its folders on this machine, and what keeps what was made so far elsewhere,
    which is for the first process of a group.
    """
    with contextlib.ExitStack() as until_trained:

        @functools.cache
        def lent(folder: Path) -> Path:
            return until_trained.enter_context(borrowed(places[folder]))

        out, keep = places[spec.out], training.keep_nothing
        if not isinstance(out, Path):
            out = until_trained.enter_context(scratch())
            if first:
                keep = MirroredFolder(out, places[spec.out]).push
        start, online = spec.start, spec.online
        if isinstance(start, str) and Path(start) in places:
            start = str(lent(Path(start)))
        if online:
            pool = lent(online.conditional.parent)
            online = replace(online, conditional=pool / online.conditional.name)
        own = replace(
            spec,
            start=start,
            tokens=lent(spec.tokens),
            tokenizer=lent(spec.tokenizer),
            held_out=spec.held_out and lent(spec.held_out),
            online=online,
            out=out,
        )
        yield own, keep


def evaluate(checkpoint: Place, tokens: Place) -> tuple[Losses, Timing]:
    """Losses of packed tokens by one checkpoint, in float32; also what it took."""
    torch.set_num_threads(1)
    scorers = [Scorer(_load(here(checkpoint), "float32"))]
    begun = time.perf_counter()
    rows, n_tokens = read_tokens(tokens), real_tokens(tokens)
    (losses,) = scoring.sequence_losses(scorers, rows, n_tokens, progress=local_pool.report)
    return losses, _took(int(n_tokens.sum()), begun)


def evaluate_tasks(checkpoint: Place, items: Place) -> tuple[dict[str, float], Timing]:
    """Metrics of tasks by one checkpoint, in float32, as harness.evaluate gives them; also what it
    took.
    """
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
    """Losses of every token [N, T] by one checkpoint, in float32, as of token_losses; also what it
    took.
    """
    torch.set_num_threads(1)
    model = checkpoints.to_device(checkpoints.load(here(checkpoint)), own_device())
    begun = time.perf_counter()
    losses = token_losses.token_losses(model, tokens, eot_id)
    return losses, _took(tokens.size, begun)


def scorer(model: str, checkpoint: Path, precision: str, sample: np.ndarray) -> Scorer:
    """Return the scorer of a model, which is loaded once and kept.

    It has the first precision, from the given one on, in which the losses of a sample of sequences
    [N, T] are accurate.
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
    """Let go of the models that are kept."""
    _loaded.clear()


def _load(checkpoint: Path, precision: str) -> PreTrainedModel:
    return attention.prepare(checkpoints.load(checkpoint, precision), own_device())


def _holds(scorer: Scorer, checkpoint: Path, sample: np.ndarray) -> bool:
    """Whether losses of a sample of sequences [N, T] are those in float64, within tolerance."""
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
    """Floating point operations per second of one large matrix product on this device."""
    size = 1024 if kind() == "cpu" else 8192
    left, right = torch.ones(2, size, size, dtype=dtype, device=own_device())
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        (left @ right)[0, 0].item()  # which waits for a device
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)
