"""Packed sequences, and models to score them with."""

import copy
from pathlib import Path

import numpy as np
import polars as pl
import torch
from transformers import PreTrainedModel

from colorfilter.config.recipe import Model
from colorfilter.models import checkpoints
from colorfilter.progress import Progress, silent
from colorfilter.scoring.chunks import Receipt
from colorfilter.scoring.labels import IGNORED
from colorfilter.scoring.scoring import (
    Scorer,
    score_shard,
)

CHUNK = 5
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0}
MODELS = {
    "gpt_neox": Model(type="gpt_neox", config=SMALL),
    "llama": Model(type="llama", config={**SMALL, "tie_word_embeddings": True}),
    "gemma2": Model(type="gemma2", config={**SMALL, **GEMMA}),
    "cohere": Model(type="cohere", config={**SMALL, "logit_scale": 0.25}),
}


@torch.no_grad()
def lively(model: Model, seed: int, vocab_size: int = 280) -> PreTrainedModel:
    """A fresh model with embeddings large enough for losses to differ by much."""
    built = checkpoints.build(model, vocab_size, 16, seed).eval()
    for weight in {built.get_input_embeddings().weight, built.get_output_embeddings().weight}:
        weight.mul_(20)
    return built


def reference(model: PreTrainedModel, rows: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    exact = copy.deepcopy(model).double()
    losses = []
    with torch.no_grad():
        for row, n in zip(rows, n_tokens, strict=True):
            ids = torch.tensor([row[:n].tolist()])
            logits = exact(input_ids=ids).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())
    return np.array(losses)


def write_packed(folder: Path, n_tokens: list[int], length: int = 16) -> tuple[Path, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(n_tokens))
    rows = rng.integers(1, 280, size=(len(n_tokens), length)).astype(np.uint16)
    for row, n in zip(rows, n_tokens, strict=True):
        row[n:] = 0
    np.save(folder / "tokens.npy", rows)
    pl.DataFrame(
        {"position": range(len(n_tokens)), "n_tokens": n_tokens},
        schema={"position": pl.Int64, "n_tokens": pl.Int32},
    ).write_parquet(folder / "sequences.parquet")
    return folder, rows


def read_chunks(out: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(p) for p in sorted(out.glob("*.parquet"))])


class Counting(Scorer):
    """Counts the sequences that it scores."""

    scored = 0

    def losses(
        self, tokens: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.scored += int((labels != IGNORED).any(dim=1).sum())
        return super().losses(tokens, labels)


def score(
    scorer: Scorer,
    tokens: Path,
    out: Path,
    eot_id: int | None = None,
    progress: Progress = silent,
) -> list[Receipt]:
    return score_shard({"m": scorer}, tokens, "s", {"m": out}, CHUNK, eot_id, progress)["m"]
