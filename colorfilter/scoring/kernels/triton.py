"""The loss on a GPU: head product and log-sum-exp fused, so that logits are never stored.

`nll_t = ln 2 * log2 sum_v 2^(x_v log2 e) - x_label` with logits x = hidden @ head_weight.T held in
float32 accumulators. A program takes a tile of tokens and a split of the vocabulary and keeps a
running maximum and sum of powers (online softmax, arXiv 1805.02867); a second kernel joins the
splits of each sequence in their order. Nothing is added atomically and the splits depend on the
vocabulary alone, so a sequence's loss has the same bits in every run, batch and place.

Memory: 8 bytes per token and split, 4 per token for the label's logit.
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
    """Tokens x vocabulary entries x hidden dimensions at a time, and who works on them."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def shared_memory(self) -> int:
        """Bytes of 16-bit operands in flight."""
        return (self.rows + self.columns) * self.depth * self.stages * 2


# Both operands of a tile come from the cache: 6 bytes to 256 products where WIDE, 8 where NARROW,
# of which in turn two fit on a multiprocessor, one raising powers while the other multiplies.
WIDE = Tile(128, 256, 64, warps=8, stages=4)
NARROW = Tile(128, 128, 64, warps=8, stages=3)
EXACT = Tile(64, 64, 16, warps=8, stages=3)


def sequence_nll(
    hidden: torch.Tensor, head_weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean negative log-likelihood of each sequence. Contract as in colorfilter.scoring.loss.

    hidden [B, T, D] and head_weight [V, D] of one dtype: float16, bfloat16 or float32;
    labels int64 [B, T]. A label outside the vocabulary makes its sequence NaN.
    """
    return sequence_nll_by(hidden, head_weight, labels, tile_for(hidden), SPLIT_COLUMNS)


def tile_for(hidden: torch.Tensor) -> Tile:
    """The largest tile that fits; never by batch, which must not change a loss."""
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
    """The same with a given tile and number of vocabulary entries to a split."""
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
    """The matrix with rows that begin where a descriptor can point; zeros change no product."""
    padding = -matrix.shape[1] % (DESCRIPTOR_ALIGNMENT // matrix.element_size())
    if padding or matrix.data_ptr() % DESCRIPTOR_ALIGNMENT:
        return functional.pad(matrix, (0, padding)).contiguous()
    return matrix.contiguous()


def _scratch(size: int, _alignment: int, _stream: int | None) -> torch.Tensor:
    """Memory in which a kernel writes its descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@triton.jit
def split_log_sums(
    hidden: tl.tensor, head_weight: tl.tensor, labels: tl.tensor,
    maxima: tl.tensor, sums: tl.tensor, label_logits: tl.tensor,
    n_rows: tl.tensor, vocab: tl.tensor, width: tl.tensor, n_splits: tl.tensor,
    TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Of ROWS tokens and TILES * COLUMNS vocabulary entries: the largest logit in bits, the sum of
    the powers of two below it, and the label's logit in nats.

    hidden [n_rows, width], head_weight [vocab, width], labels [n_rows] -> maxima and sums
    [n_splits, n_rows], label_logits [n_rows].
    """
    # Neighbours in the grid share their tokens, so the tiles that run together stay in the cache.
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
            if INTERPRETED:  # where bfloat16 would be multiplied as the integers that hold it
                states, weights = states.to(tl.float32), weights.to(tl.float32)
            logits = tl.dot(states, weights.T, logits, input_precision="ieee")
        if first_column + COLUMNS > vocab:
            column = first_column + tl.arange(0, COLUMNS)
            logits = tl.where(column[None, :] < vocab, logits, float("-inf"))
        # A maximum passes over NaN; the sum does not, and infinity less itself is NaN there too.
        new_maximum = tl.maximum(maximum, tl.max(logits, 1) * LOG2_E)
        powers = tl.exp2(logits * LOG2_E - new_maximum[:, None])
        total = total * tl.exp2(maximum - new_maximum) + tl.sum(powers, 1)
        maximum = new_maximum
    tl.store(maxima + split * n_rows + row, maximum, row < n_rows)
    tl.store(sums + split * n_rows + row, total, row < n_rows)

    # Picked out of the tiles above it would cost a comparison per logit and many registers.
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
    """Of one sequence of `length` tokens: the mean loss in nats over its labels, their number."""
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
