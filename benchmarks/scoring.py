"""Speed of scoring: this project's kernel and body against what else computes the same losses.

    python benchmarks/scoring.py [--vocabulary 16384 50304] [--type gpt_neox] [--threads 1]

One process, one set of random weights, the same sequences. The variants take turns, several rounds;
reported are medians of CPU time (on a CPU; of wall time on a GPU), the ratio to the naive form, the
largest error against float64, and the model's arithmetic as a share of what matrix products of the
same shapes reach in the same process.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from colorfilter import body, models
from colorfilter.labels import shifted_labels
from colorfilter.loss import sequence_nll
from colorfilter.recipe import Model

LAYERS, WIDTH, HEADS, LENGTH, BATCH = 8, 512, 8, 512, 4
CONFIG = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "max_position_embeddings": LENGTH,
}
Variant = Callable[[torch.Tensor], torch.Tensor]


def naive(model: PreTrainedModel) -> Variant:
    """Transformers' own loss, a sequence at a time: it gives one number per batch."""
    return lambda tokens: torch.stack(
        [model(input_ids=row[None], labels=row[None]).loss for row in tokens]
    )


def full_logits(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Variant:
    """Full logits of a batch, then cross entropy in a dtype."""

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].to(dtype)
        nll = functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        return nll.view(len(tokens), -1).mean(dim=1)

    return losses


def reference_style(model: PreTrainedModel) -> Variant:
    """As the paper's code describes it: bf16 autocast, shifted full logits, mean over positions."""

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].contiguous()
            nll = functional.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
            )
        return nll.view(len(tokens), -1).mean(dim=1)

    return losses


def rolling(model: PreTrainedModel) -> Variant:
    """As evaluation harnesses do it: log-softmax of full logits in the model's dtype, gathered."""

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        chosen = logits.log_softmax(dim=-1).gather(2, tokens[:, 1:, None])[..., 0]
        return -chosen.sum(dim=1) / (tokens.shape[1] - 1)

    return losses


def fused_by_torch(model: PreTrainedModel) -> Variant:
    """Torch's own linear and cross entropy in one."""

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        nll = functional.linear_cross_entropy(
            hidden.flatten(0, 1),
            model.get_output_embeddings().weight,
            tokens[:, 1:].flatten(),
            reduction="none",
        )
        return nll.float().view(len(tokens), -1).mean(dim=1)

    return losses


def ours(model: PreTrainedModel) -> Variant:
    """Scoring as the pipeline does it."""
    weight = model.get_output_embeddings().weight

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        n_tokens = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return sequence_nll(hidden, weight, shifted_labels(tokens, n_tokens))[0]

    return losses


def products(model: PreTrainedModel, dtype: torch.dtype) -> Variant:
    """Matrix products of the shapes of the model's weights and nothing else: the limit."""
    embedding = model.get_input_embeddings().weight
    weights = [
        p.detach().to(dtype) for p in model.parameters() if p.ndim == 2 and p is not embedding
    ]

    def run(tokens: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            rows = weight.new_empty(tokens.numel(), weight.shape[1])
            for block in weight.split(4096):  # no allocation of whole logits
                torch.mm(rows, block.T)
        return torch.zeros(len(tokens))

    return run


def variants(family: str, vocab_size: int, device: str) -> tuple[dict[str, Variant], Variant]:
    """The variants by name, and the exact losses in float64."""
    config = CONFIG if family != "llama" else {**CONFIG, "intermediate_size": 1408}

    def fresh(dtype: torch.dtype) -> PreTrainedModel:
        model = models.build(Model(type=family, config=config), vocab_size, LENGTH, seed=0)
        return models.to_device(model.eval().to(dtype), torch.device(device))

    plain, half = fresh(torch.float32), fresh(torch.bfloat16)
    fast, fast_half = fresh(torch.float32), fresh(torch.bfloat16)
    if device == "cpu":
        body.prepare(fast)
        body.prepare(fast_half)
    named = {
        "transformers, labels, float32": naive(plain),
        "transformers, full logits, float32": full_logits(plain),
        "transformers, full logits, bf16": full_logits(half),
        "the paper's code, bf16 autocast": reference_style(plain),
        "evaluation harness, bf16": rolling(half),
        "ours, float32": ours(fast),
        "ours, bf16": ours(fast_half),
        "products alone, float32": products(plain, torch.float32),
        "products alone, bf16": products(plain, torch.bfloat16),
        "torch linear_cross_entropy, bf16": fused_by_torch(half),
    }
    return named, full_logits(fresh(torch.float64), torch.float64)


def measure(named: dict[str, Variant], tokens: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round; the variants take turns."""
    on_cpu = tokens.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(rounds + 1):  # the first warms up
        for name, variant in named.items():
            begun = clock()
            variant(tokens)
            if not on_cpu:
                torch.cuda.synchronize()
            seconds[name].append(clock() - begun)
    return {name: taken[1:] for name, taken in seconds.items()}


def main() -> None:
    """Measure and print a table for every vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[16_384, 50_304])
    parser.add_argument("--type", default="gpt_neox", help="transformers' model_type")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}, ", end="")
    print(f"{options.threads} threads; {options.type}, {LAYERS} layers, width {WIDTH}, T {LENGTH}")
    for vocab_size in options.vocabulary:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, vocab_size, (BATCH, LENGTH), generator=generator).to(device)
        with torch.inference_mode():
            named, exact = variants(options.type, vocab_size, device)
            truth = exact(tokens)
            seconds = measure(named, tokens, options.rounds)
            errors = {n: (v(tokens).double() - truth).abs().max().item() for n, v in named.items()}
        median = {n: statistics.median(s) for n, s in seconds.items()}
        first = median["transformers, labels, float32"]
        print(f"\n| V {vocab_size:,} | tokens/s | x | spread | products' share | error |")
        print("|---|---|---|---|---|---|")
        for n, taken in seconds.items():
            spread = (max(taken) - min(taken)) / median[n]
            limit = median[f"products alone, {'float32' if 'float32' in n else 'bf16'}"]
            share, error = f"{limit / median[n]:.0%}", f"{errors[n]:.1e}"
            alone = n.startswith("products")
            print(
                f"| {n} | {tokens.numel() / median[n]:,.0f} | {first / median[n]:.2f} "
                f"| {spread:.0%} | {'' if alone else share} | {'' if alone else error} |"
            )


if __name__ == "__main__":
    main()
