"""The error of 16-bit scores, and its effect on a selection.

    python benchmarks/precision.py [--home .colorfilter] [--sequences 10000]

Uses the prior, a conditional and the packed corpus of a home in which a recipe has run. First
compares losses of a thousand sequences in float32 and bf16, computed by the pipeline and by other
implementations, with float64. Then scores `--sequences` sequences in float32 and bf16 and selects
the best 1/tau by float32, by bf16 alone, and by refined scores (float32 within six root-mean-square
errors of the cutoff). Counts the sequences that differ from the float32 selection. The second part
is skipped on processors that only emulate bf16, which is slow.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import colorfilter  # noqa: F401  (before torch: it sets how OpenMP threads wait)

# isort: split
import numpy as np
import torch
from torch.nn import functional

from colorfilter.compute.worker_calls import multiplies
from colorfilter.data.tokens import open_tokens, real_tokens
from colorfilter.models import attention, checkpoints
from colorfilter.scoring.scoring import Scorer, sequence_losses
from colorfilter.selection.refinement import RADIUS
from resources.artifacts import ArtifactStore

TAUS = (7, 16, 64)
SAMPLE = 1_000
CPU = torch.device("cpu")
Loss = Callable[[np.ndarray], np.ndarray]


def ours(checkpoint: Path, precision: str, kernel: str = "chunked") -> Loss:
    """Return a function for losses of rows [n, T] like the pipeline's, or float64 references."""
    if precision == "float64":
        scorer = Scorer(checkpoints.load(checkpoint).double(), precision, "reference")
    else:
        scorer = Scorer(
            attention.prepare(checkpoints.load(checkpoint, precision), CPU), precision, kernel
        )

    def losses(rows: np.ndarray) -> np.ndarray:
        ((nll, _),) = sequence_losses([scorer], rows, np.full(len(rows), rows.shape[1]))
        return nll.astype(np.float64)

    return losses


def by_logits(checkpoint: Path, autocast: bool, half_sums: bool) -> Loss:
    """Return a function for losses from full bf16 logits, by float32 cross entropy or in bf16.

    With `half_sums`, log-softmax and sum are in bf16.
    """
    model = checkpoints.load(checkpoint, "float32" if autocast else "bf16")

    @torch.inference_mode()
    def losses(rows: np.ndarray) -> np.ndarray:
        found = []
        for batch in torch.from_numpy(rows.astype(np.int64)).split(16):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
            if half_sums:
                chosen = logits.log_softmax(dim=-1).gather(2, batch[:, 1:, None])[..., 0]
                found.append(-chosen.sum(dim=1).float() / chosen.shape[1])
            else:
                nll = functional.cross_entropy(
                    logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
                )
                found.append(nll.view(len(batch), -1).mean(dim=1))
        return torch.cat(found).double().numpy()

    return losses


def kept(scores: np.ndarray, tau: int) -> set[int]:
    """Return the indices of the lowest 1/tau scores; ties are broken by index."""
    return set(np.argsort(scores, kind="stable")[: len(scores) // tau].tolist())


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=Path(".colorfilter"))
    parser.add_argument("--sequences", type=int, default=10_000, help="sequences to select from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = ArtifactStore(home=str(options.home.resolve()))
    prior = store.current("prior_model")
    domain = next(a.split("/")[0] for a, _ in store.entries() if a.endswith("/conditional_model"))
    conditional = store.current(f"{domain}/conditional_model")
    pair = [m.path / str(m.facts["checkpoint"]) for m in (prior, conditional)]
    rows = []
    for shard in store.at.shards():
        packed = store.current("corpus_tokens", shard.name).path
        tokens = open_tokens(packed)
        rows.append(tokens[real_tokens(packed) == tokens.shape[1]])
    whole = np.concatenate(rows)
    corpus = whole[np.random.default_rng(0).permutation(len(whole))[: options.sequences]]
    sample = corpus[:SAMPLE]

    print(f"{len(corpus):,} sequences of {corpus.shape[1]} tokens, a sample of {len(sample):,}\n")
    exact = [ours(m, "float64")(sample) for m in pair]
    spread = (exact[1] - exact[0]).std()
    print(f"standard deviation of the score: {spread:.4f}\n")
    print("| sample, against float64 | largest error of a loss | score, rms | share of spread |")
    print("|---|---|---|---|")
    forms: dict[str, Callable[[Path], Loss]] = {
        "ours, float32": lambda m: ours(m, "float32"),
        "ours, bf16": lambda m: ours(m, "bf16"),
        "bf16 autocast, full logits": lambda m: by_logits(m, True, False),
        "bf16, full logits": lambda m: by_logits(m, False, False),
        "bf16, log-softmax and sum in bf16": lambda m: by_logits(m, False, True),
    }
    for name, form in forms.items():
        found = [form(m)(sample) for m in pair]
        largest = max(np.abs(f - e).max() for f, e in zip(found, exact, strict=True))
        rms = np.sqrt(np.mean(((found[1] - found[0]) - (exact[1] - exact[0])) ** 2))
        print(f"| {name} | {largest:.1e} | {rms:.1e} | {rms / spread:.3%} |", flush=True)

    if not multiplies("bf16"):
        print("\nskipping the selections: bf16 is only emulated on this processor")
        return
    fine, coarse = (
        np.subtract(*(ours(m, precision)(corpus) for m in reversed(pair)))
        for precision in ("float32", "bf16")
    )
    error = np.sqrt(np.mean((coarse - fine) ** 2))
    print(f"\n| all {len(corpus):,} | bf16 alone | refined | scored again |")
    print("|---|---|---|---|")
    for tau in TAUS:
        cutoff = np.sort(coarse)[len(coarse) // tau - 1]
        near = np.abs(coarse - cutoff) <= RADIUS * error
        refined = np.where(near, fine, coarse)
        wanted = kept(fine, tau)
        alone, again = (len(wanted - kept(s, tau)) for s in (coarse, refined))
        print(f"| tau {tau}: differ from float32 | {alone} | {again} | {near.mean():.2%} |")


if __name__ == "__main__":
    main()
