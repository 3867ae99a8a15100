"""Speed of scoring: this project's kernels compared with other ways to compute the same losses.

    python benchmarks/scoring.py [--size 150m] [--vocabulary 16384 50304] [--family gpt_neox llama]

All variants run in one process with the same random weights and sequences, taking turns for several
rounds. Prints the median CPU time on one thread (on a GPU: wall time), the speedup over the naive
variant, the largest error against float64, and the speed as a share of that of matrix products of
the same shapes. The first family is measured with all variants; the others only with the naive one
and ours, at the first vocabulary size. Precisions that the device only emulates are skipped. Liger
and cut-cross-entropy are measured if installed. On a GPU it takes less than ten minutes.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import colorfilter  # noqa: F401  (before torch: it sets how OpenMP threads wait)

# isort: split
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from colorfilter.compute.worker_calls import multiplies
from colorfilter.config.recipe import Model
from colorfilter.models import attention, checkpoints
from colorfilter.scoring.labels import shifted_labels
from colorfilter.scoring.scoring import Scorer

# Layers, hidden size, heads, feed-forward size. 150m is the paper's auxiliary model.
SIZES = {"small": (8, 512, 8, 2048), "150m": (12, 1024, 16, 4096)}
GATED = {"llama", "olmo", "olmo2", "qwen3", "mistral"}
LENGTH = 512
BATCH = {"cpu": 2, "cuda": 128}
Variant = Callable[[torch.Tensor], torch.Tensor]


def naive(model: PreTrainedModel) -> Variant:
    """Use the loss of transformers, one sequence at a time, since it returns a mean per batch."""
    return lambda tokens: torch.stack(
        [model(input_ids=row[None], labels=row[None]).loss for row in tokens]
    )


def full_logits(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Variant:
    """Compute the full logits of a batch, then cross entropy in `dtype`."""

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].to(dtype)
        nll = functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        return nll.view(len(tokens), -1).mean(dim=1)

    return losses


def reference_style(model: PreTrainedModel) -> Variant:
    """Score like the paper's code: bf16 autocast, shifted full logits, mean over positions."""

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].contiguous()
            nll = functional.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
            )
        return nll.view(len(tokens), -1).mean(dim=1)

    return losses


def rolling(model: PreTrainedModel) -> Variant:
    """Score like evaluation harnesses: gather from log-softmax of full logits, in model dtype."""

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        chosen: torch.Tensor = logits.log_softmax(dim=-1).gather(2, tokens[:, 1:, None])[..., 0]
        return -chosen.sum(dim=1) / (tokens.shape[1] - 1)

    return losses


def fused(model: PreTrainedModel, library: str) -> Variant:
    """Compute head and loss in one fused call of a library, in the model's dtype."""
    weight = model.get_output_embeddings().weight

    def nll(rows: torch.Tensor, targets: torch.Tensor) -> Any:
        if library == "liger":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            return LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, rows, targets)
        if library == "cut_cross_entropy":
            from cut_cross_entropy import linear_cross_entropy

            return linear_cross_entropy(rows, weight, targets, reduction="none")
        return functional.linear_cross_entropy(rows, weight, targets, reduction="none")

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        per_token: torch.Tensor = nll(hidden.flatten(0, 1), tokens[:, 1:].flatten())
        return per_token.float().view(len(tokens), -1).mean(dim=1)

    return losses


def ours(scorer: Scorer) -> Variant:
    """Score like the pipeline."""

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        n_tokens = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        return scorer.losses(tokens, shifted_labels(tokens, n_tokens))[0]

    return losses


def products(model: PreTrainedModel, dtype: torch.dtype) -> Variant:
    """Only compute matrix products with the shapes of the model's weights: the upper bound."""
    embedding = model.get_input_embeddings().weight
    weights = [
        p.detach().to(dtype) for p in model.parameters() if p.ndim == 2 and p is not embedding
    ]

    def run(tokens: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            rows = weight.new_empty(tokens.numel(), weight.shape[1])
            for block in weight.split(4096):  # avoids allocating full logits
                torch.mm(rows, block.T)
        return torch.zeros(len(tokens), device=tokens.device)

    return run


def config(family: str, size: str) -> dict[str, int]:
    """Return the configuration of a model of a family and size.

    Gated feed-forward layers are narrower, so that all families have as many weights.
    """
    layers, width, heads, inner = SIZES[size]
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner * 11 // 16 if family in GATED else inner,
        "max_position_embeddings": LENGTH,
    }


def variants(
    family: str, size: str, vocab_size: int, device: torch.device, all_peers: bool
) -> tuple[dict[str, Variant], Variant]:
    """Return the variants by name, the naive one first, and a variant for float64 losses."""

    def fresh(dtype: torch.dtype) -> PreTrainedModel:
        made = Model(type=family, config=config(family, size))
        model: PreTrainedModel = (
            checkpoints.build(made, vocab_size, LENGTH, seed=0).eval().to(dtype)
        )
        return model

    def plain(dtype: torch.dtype) -> PreTrainedModel:
        return checkpoints.to_device(fresh(dtype), device)

    halves = [p for p in ("bf16", "fp16") if multiplies(p)]
    exact = plain(torch.float32)
    peer, half = ("bf16", plain(torch.bfloat16)) if "bf16" in halves else ("float32", exact)
    named = {"transformers, labels, float32": naive(exact)}
    if all_peers:
        named |= {
            "transformers, full logits, float32": full_logits(exact),
            f"evaluation harness, {peer}": rolling(half),
            f"torch linear_cross_entropy, {peer}": fused(half, "torch"),
        }
        if peer == "bf16":
            named["transformers, full logits, bf16"] = full_logits(half)
            named["the paper's code, bf16 autocast"] = reference_style(exact)
        for library in ("liger", "cut_cross_entropy"):
            if device.type == "cuda" and find_spec(f"{library}{'_kernel' * (library == 'liger')}"):
                named[f"{library}, {peer}"] = fused(half, library)
    fast = attention.prepare(fresh(torch.float32), device)
    named["ours, float32"] = ours(Scorer(fast, kernel="chunked"))
    for name in halves:
        fast = attention.prepare(fresh(checkpoints.DTYPES[name]), device)
        for kernel in ("triton", "chunked") if device.type == "cuda" else ("chunked",):
            label = f"ours, {name}" + f", {kernel}" * (device.type == "cuda")
            named[label] = ours(Scorer(fast, name, kernel))
    for name in ("float32", *halves):
        named[f"products alone, {name}"] = products(exact, checkpoints.DTYPES[name])
    return named, full_logits(plain(torch.float64), torch.float64)


def measure(named: dict[str, Variant], tokens: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every variant in every round. The variants take turns."""
    on_cpu = tokens.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(rounds + 1):  # the first is a warm-up
        for name, variant in named.items():
            begun = clock()
            variant(tokens)
            if not on_cpu:
                torch.cuda.synchronize()
            seconds[name].append(clock() - begun)
    return {name: taken[1:] for name, taken in seconds.items()}


def table(named: dict[str, Variant], exact: Variant, tokens: torch.Tensor, rounds: int) -> None:
    """Measure and print a row per variant."""
    with torch.inference_mode():
        few = slice(0, 4)  # full logits in float64 need much memory
        truth = exact(tokens[few])
        seconds = measure(named, tokens, rounds)
        errors = {n: (v(tokens)[few].double() - truth).abs().max().item() for n, v in named.items()}
    median = {n: statistics.median(s) for n, s in seconds.items()}
    first = next(iter(median.values()))
    for n, taken in seconds.items():
        spread = (max(taken) - min(taken)) / median[n]
        precision = next(p for p in ("float32", "fp16", "bf16") if p in n)
        share, error = (
            f"{median[f'products alone, {precision}'] / median[n]:.0%}",
            f"{errors[n]:.1e}",
        )
        alone = n.startswith("products")
        print(
            f"| {n} | {tokens.numel() / median[n]:,.0f} | {first / median[n]:.2f} "
            f"| {spread:.0%} | {'' if alone else share} | {'' if alone else error} |",
            flush=True,
        )


def main() -> None:
    """Measure and print a table for every family and vocabulary size."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="150m" if on_gpu else "small")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[16_384, 50_304])
    parser.add_argument("--family", nargs="+", default=["gpt_neox", "llama", "olmo"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if on_gpu else "cpu")
    name = torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability()
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}")
    for family in options.family:
        all_peers = family == options.family[0]
        for vocab_size in options.vocabulary if all_peers else options.vocabulary[:1]:
            shape = ", ".join(f"{k} {v}" for k, v in config(family, options.size).items())
            print(f"\n{family}, {shape}, vocabulary {vocab_size:,}\n")
            print("| | tokens/s | speedup | spread | share of products | error |")
            print("|---|---|---|---|---|---|")
            generator = torch.Generator().manual_seed(0)
            shape_BxT = BATCH[device.type], LENGTH
            tokens = torch.randint(0, vocab_size, shape_BxT, generator=generator).to(device)
            table(
                *variants(family, options.size, vocab_size, device, all_peers),
                tokens,
                options.rounds,
            )


if __name__ == "__main__":
    main()
