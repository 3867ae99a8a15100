"""The loss on a GPU: head product and log-sum-exp fused, so that logits are never stored.

`nll_t = ln 2 * log2 sum_v 2^(x_v log2 e) - x_label` with logits x = hidden @ head_weight.T held in
float32 accumulators. Each program takes a tile of tokens and a split of the vocabulary and keeps a
running maximum and sum of powers (online softmax, arXiv 1805.02867). A second kernel combines the
splits of each sequence in order. Nothing is added atomically and the splits depend only on the
vocabulary, so a sequence's loss has the same bits in every run, in every batch and at every row.

Memory: 8 bytes per token and split, and 4 bytes per token for the label's logit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn import functional

from colorfilter.scoring.labels import IGNORED, mean_over_labels

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = triton.knobs.runtime.interpret
SPLIT_COLUMNS = 4096
JOINED_TOKENS = 512
DESCRIPTOR_ALIGNMENT = 16


class Tile(NamedTuple):
    """Tile size in tokens, vocabulary entries and hidden dimensions, with its warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory for the 16-bit operands in flight."""
        return (self.rows + self.columns) * self.depth * self.stages * 2


# Both operands of a tile are read through the cache: 6 bytes per 256 products for WIDE, 8 for
# NARROW. But two NARROW tiles fit on a multiprocessor: one exponentiates, the other multiplies.
WIDE = Tile(128, 256, 64, warps=8, stages=4)
NARROW = Tile(128, 128, 64, warps=8, stages=3)
EXACT = Tile(64, 64, 16, warps=8, stages=3)


def sequence_nll(
    hidden: torch.Tensor, head_weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses specified in colorfilter.scoring.loss.

    hidden [B, T, D] and head_weight [V, D] of one dtype: float16, bfloat16 or float32;
    labels int64 [B, T]. A label outside the vocabulary makes its sequence's loss NaN.
    """
    return sequence_nll_by(hidden, head_weight, labels, tile_for(hidden), SPLIT_COLUMNS)


def tile_for(hidden: torch.Tensor) -> Tile:
    """Return the largest tile that fits. The batch is ignored, so losses do not depend on it."""
    if hidden.dtype == torch.float32:
        return EXACT
    if hidden.is_cuda:
        device = triton.runtime.driver.active.utils.get_device_properties(hidden.get_device())
        if device["max_shared_mem"] > WIDE.shared_memory:
            return WIDE
    return NARROW


def sequence_nll_by(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    tile: Tile,
    split_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like sequence_nll, with a given tile and number of vocabulary entries per split."""
    if not labels.numel():
        return mean_over_labels(labels.float(), labels)
    rows, weight = _addressable(hidden.flatten(0, 1)), _addressable(head_weight)
    (n_rows, width), vocab = rows.shape, len(weight)
    tiles_per_split = triton.cdiv(split_columns, tile.columns)
    n_splits = triton.cdiv(vocab, tiles_per_split * tile.columns)
    maxima, sums = torch.empty(2, n_splits, n_rows, dtype=torch.float32, device=rows.device)
    label_logits = torch.empty(n_rows, dtype=torch.float32, device=rows.device)
    nll = torch.empty(len(labels), dtype=torch.float32, device=rows.device)
    n_labels = torch.empty(len(labels), dtype=torch.int32, device=rows.device)
    targets = labels.contiguous()

    triton.set_allocator(_scratch)
    with torch.cuda.device_of(rows):
        split_log_sums[(n_splits * triton.cdiv(n_rows, tile.rows),)](
            rows, weight, targets, maxima, sums, label_logits, n_rows, vocab, width, n_splits,
            tiles_per_split, tile.rows, tile.columns, tile.depth, INTERPRETED,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        join[(len(labels),)](
            maxima, sums, label_logits, targets, nll, n_labels, n_rows, labels.shape[1], n_splits,
            IGNORED, JOINED_TOKENS,
        )  # fmt: skip
    return nll, n_labels


def _addressable(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with rows aligned for descriptors; zero padding changes no product."""
    padding = -matrix.shape[1] % (DESCRIPTOR_ALIGNMENT // matrix.element_size())
    if padding or matrix.data_ptr() % DESCRIPTOR_ALIGNMENT:
        return functional.pad(matrix, (0, padding)).contiguous()
    return matrix.contiguous()


def _scratch(size: int, _alignment: int, _stream: int | None) -> torch.Tensor:
    """Allocate memory in which a kernel writes its descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@triton.jit
def split_log_sums(
    hidden: tl.tensor, head_weight: tl.tensor, labels: tl.tensor,
    maxima: tl.tensor, sums: tl.tensor, label_logits: tl.tensor,
    n_rows: tl.tensor, vocab: tl.tensor, width: tl.tensor, n_splits: tl.tensor,
    TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Store partial log-sums of ROWS tokens over TILES * COLUMNS vocabulary entries.

    They are the largest logit in bits, the sum of powers of two relative to it, and the label's
    logit in nats.

    hidden [n_rows, width], head_weight [vocab, width], labels [n_rows] -> maxima and sums
    [n_splits, n_rows], label_logits [n_rows].
    """
    # Neighbouring programs share their tokens, so tiles that run together stay in the cache.
    split = tl.program_id(0) % n_splits
    first_row = tl.program_id(0) // n_splits * ROWS
    row = first_row + tl.arange(0, ROWS)
    hidden_tiles = tl.make_tensor_descriptor(hidden, [n_rows, width], [width, 1], [ROWS, DEPTH])
    weight_tiles = tl.make_tensor_descriptor(
        head_weight, [vocab, width], [width, 1], [COLUMNS, DEPTH]
    )
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    begin = split * TILES * COLUMNS
    for first_column in range(begin, min(begin + TILES * COLUMNS, vocab), COLUMNS):
        logits = tl.zeros([ROWS, COLUMNS], tl.float32)
        for depth in range(0, width, DEPTH):
            states = hidden_tiles.load([first_row, depth])
            weights = weight_tiles.load([first_column, depth])
            if INTERPRETED:  # the interpreter would multiply bfloat16 as integers
                states, weights = states.to(tl.float32), weights.to(tl.float32)
            logits = tl.dot(states, weights.T, logits, input_precision="ieee")
        if first_column + COLUMNS > vocab:
            column = first_column + tl.arange(0, COLUMNS)
            logits = tl.where(column[None, :] < vocab, logits, float("-inf"))
        # The maximum ignores NaN, but the sum keeps it. Infinity makes it NaN too (inf - inf).
        new_maximum = tl.maximum(maximum, tl.max(logits, 1) * LOG2_E)
        powers = tl.exp2(logits * LOG2_E - new_maximum[:, None])
        total = total * tl.exp2(maximum - new_maximum) + tl.sum(powers, 1)
        maximum = new_maximum
    tl.store(maxima + split * n_rows + row, maximum, row < n_rows)
    tl.store(sums + split * n_rows + row, total, row < n_rows)

    # The label's logit is computed again: picking it out of the tiles above would cost a comparison
    # per logit and many registers.
    if split == 0:
        label = tl.load(labels + row, row < n_rows, -1)
        known = (label >= 0) & (label < vocab)
        label_logit = tl.zeros([ROWS], tl.float32)
        for depth in range(0, width, DEPTH):
            dimension = depth + tl.arange(0, DEPTH)
            states = hidden_tiles.load([first_row, depth])
            weights = tl.load(
                head_weight + label[:, None] * width + dimension[None, :],
                known[:, None] & (dimension[None, :] < width),
                0.0,
            )
            label_logit += tl.sum(states.to(tl.float32) * weights.to(tl.float32), 1)
        tl.store(label_logits + row, tl.where(known, label_logit, float("nan")), row < n_rows)


@triton.jit
def join(
    maxima: tl.tensor, sums: tl.tensor, label_logits: tl.tensor, labels: tl.tensor,
    nll: tl.tensor, n_labels: tl.tensor, n_rows: tl.tensor, length: tl.tensor, n_splits: tl.tensor,
    IGNORED: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    """Store one sequence's mean loss in nats over its labels, and the number of labels."""
    sequence = tl.program_id(0)
    losses = tl.zeros([TOKENS], tl.float32)
    counts = tl.zeros([TOKENS], tl.int32)
    for first in range(0, length, TOKENS):
        place = first + tl.arange(0, TOKENS)
        row = sequence * length + place
        maximum = tl.full([TOKENS], float("-inf"), tl.float32)
        total = tl.zeros([TOKENS], tl.float32)
        for split in range(n_splits):
            split_maximum = tl.load(maxima + split * n_rows + row, place < length, 0.0)
            split_total = tl.load(sums + split * n_rows + row, place < length, 1.0)
            new_maximum = tl.maximum(maximum, split_maximum)
            total *= tl.exp2(maximum - new_maximum)
            total += split_total * tl.exp2(split_maximum - new_maximum)
            maximum = new_maximum
        label = tl.load(labels + row, place < length, IGNORED)
        label_logit = tl.load(label_logits + row, place < length, 0.0)
        loss = LN_2 * (maximum + tl.log2(total)) - label_logit
        losses += tl.where(label == IGNORED, 0.0, loss)
        counts += (label != IGNORED).to(tl.int32)
    count = tl.sum(counts)
    tl.store(nll + sequence, tl.sum(losses) / count)
    tl.store(n_labels + sequence, count)
