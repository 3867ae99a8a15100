"""Speed and memory of a training step, compared with full logits and torch's attention.

    python benchmarks/training.py [--threads 1] [--rounds 15]

Uses random weights and tokens at three sizes: the sample's auxiliary and target models, and a
larger one of 8 layers and a vocabulary of 50,304, for which a CPU takes fewer tokens and a single
step. The variants take turns. Each has its own process, so that memory freed by one is not reused
by the next. Prints the median CPU time per step (on a GPU: wall time), the speedup over full logits
in float32, and the peak memory above that before the model was created.
"""

import argparse
import contextlib
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import colorfilter  # noqa: F401  (before torch: it sets how OpenMP threads wait)

# isort: split
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from colorfilter.config.recipe import Model
from colorfilter.models import attention, checkpoints
from colorfilter.scoring.labels import IGNORED, shifted_labels
from colorfilter.training.objective import summed_nll

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Size(NamedTuple):
    """A model size, and the tokens of a step, which is one micro batch."""

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    tokens: int


def sizes(on_cpu: bool) -> list[Size]:
    """Return the sizes to measure."""
    return [
        Size("sample, auxiliary", 2, 64, 2, 2_048, 128, 1_024),
        Size("sample, target", 2, 128, 4, 2_048, 128, 1_024),
        Size("larger", 8, 512, 8, 50_304, 512, 1_024 if on_cpu else 16_384),
    ]


def full_logits(model: PreTrainedModel) -> Loss:
    """Return the baseline loss: full logits as float32, then cross entropy."""

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits
        return functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    return loss


def full_logits_autocast(model: PreTrainedModel) -> Loss:
    """Return the loss with products in bf16 by autocast, like the pipeline on CUDA."""

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            return summed_nll(model, None, tokens, labels)

    return loss


def ours(model: PreTrainedModel) -> Loss:
    """Return the pipeline's loss in float32."""
    head_weight = checkpoints.head_weight(model)
    attention.attend_by_blocks(model)
    return lambda tokens, labels: summed_nll(model, head_weight, tokens, labels)


VARIANTS = {
    "full logits, float32": full_logits,
    "full logits, bf16 autocast": full_logits_autocast,
    "ours, float32": ours,
}


def peak() -> float:
    """Return the peak memory of this process so far, in MB: allocated on its GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1_024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class Steps:
    """A variant at a size, in the process that runs its steps."""

    def __init__(self, size: Size, variant: str) -> None:
        self.before = peak()
        on_cpu = not torch.cuda.is_available()
        config = {
            "hidden_size": size.width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "intermediate_size": 4 * size.width,
            "max_position_embeddings": size.length,
        }
        architecture = Model(type="gpt_neox", config=config)
        self.model = checkpoints.build(architecture, size.vocabulary, size.length, seed=0).train()
        checkpoints.to_device(self.model, torch.device("cpu" if on_cpu else "cuda"))
        self.loss = VARIANTS[variant](self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        shape = size.tokens // size.length, size.length
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, size.vocabulary, shape, generator=generator)
        self.tokens = tokens.to(self.model.device)
        n_tokens = torch.full((len(tokens),), size.length, device=self.model.device)
        self.labels = shifted_labels(self.tokens, n_tokens)
        self.clock = time.process_time if on_cpu else time.perf_counter

    def take(self) -> float:
        """Run one step and return the seconds."""
        begun = self.clock()
        nll = self.loss(self.tokens, self.labels)
        (nll / self.labels.numel()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        nll.item()
        return self.clock() - begun


_steps: list[Steps] = []


def begin(size: Size, variant: str, threads: int) -> None:
    """Set up a variant in its process."""
    torch.set_num_threads(threads)
    attention.prefer_onednn()
    _steps.append(Steps(size, variant))


def take() -> tuple[float, float]:
    """Run a step in a variant's process. Return the seconds, and the peak memory in MB."""
    seconds = _steps[0].take()
    return seconds, peak() - _steps[0].before


def measure(size: Size, threads: int, rounds: int) -> dict[str, tuple[list[float], float]]:
    """Return the seconds of every variant in every round, and its peak memory in MB."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = {
            name: stack.enter_context(
                ProcessPoolExecutor(1, context, initializer=begin, initargs=(size, name, threads))
            )
            for name in VARIANTS
        }
        for warm in [pool.submit(take) for pool in pools.values()]:
            warm.result()
        taken = [
            {name: pool.submit(take).result() for name, pool in pools.items()}
            for _ in range(rounds)
        ]
    return {n: ([t[n][0] for t in taken], taken[-1][n][1]) for n in VARIANTS}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    on_cpu = not torch.cuda.is_available()
    capability = torch.backends.cpu.get_cpu_capability()
    name = capability if on_cpu else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}, ", end="")
    print(f"{options.threads} threads; gpt_neox\n")
    print("| model | loss | ms per step | tokens/s | speedup | spread | peak MB |")
    print("|---|---|---|---|---|---|---|")
    for size in sizes(on_cpu):
        rounds = 1 if on_cpu and size.name == "larger" else options.rounds
        measured = measure(size, options.threads, rounds)
        median = {n: statistics.median(seconds) for n, (seconds, _) in measured.items()}
        former = median["full logits, float32"]
        for variant, (seconds, memory) in measured.items():
            spread = (max(seconds) - min(seconds)) / median[variant]
            print(
                f"| {size.name} | {variant} | {1e3 * median[variant]:,.1f} "
                f"| {size.tokens / median[variant]:,.0f} | {former / median[variant]:.2f} "
                f"| {spread:.0%} | {memory:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
