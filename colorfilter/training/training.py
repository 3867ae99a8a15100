"""Train a causal language model on packed sequences: one pass, seeded, resumable.

A run follows colorfilter.training.schedule. Its state (weights, AdamW moments, step, curve) is one
safetensors file with scalars as JSON in its header, and is replaced atomically. A killed run
resumes from it and finishes with the same bits as an uninterrupted run on the same machine.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import safetensors
import safetensors.torch
import torch
from transformers import PreTrainedModel

from colorfilter.config.recipe import Model
from colorfilter.data.tokens import Encoder, open_tokens, real_tokens
from colorfilter.evaluation.metrics import mean_loss
from colorfilter.models import attention, checkpoints
from colorfilter.progress import Progress, silent
from colorfilter.scoring.labels import IGNORED, shifted_labels
from colorfilter.scoring.scoring import Scorer, sequence_losses
from colorfilter.storage.files import require_space, write_atomically
from colorfilter.training.objective import Objective
from colorfilter.training.process_group import Single
from colorfilter.training.rho_down import Chooser
from colorfilter.training.schedule import Phase, learning_rate, phases, training_order
from colorfilter.training.spec import (
    RUNNING,
    Checkpoint,
    TrainSpec,
    state_scalars,
    tokens_seen,
)

# By device type. On a CPU more is not faster, and every layer's attention weights are held.
MICRO_BATCH_TOKENS = {"cpu": 4_096, "cuda": 16_384}
CHECKPOINT_SECONDS = 30.0
SAVING_PAUSE = 20.0  # minimum pause between states, as a multiple of the time to save the last
CURVE_POINTS = 5


@dataclass
class _State:
    """Progress of a run. `curve` has one row per step since the run began."""

    phase: int = 0
    step: int = 0
    curve: list[dict[str, float | int | None]] = field(default_factory=list)


def keep_nothing() -> None:
    """Do nothing: the default `keep`, for folders that outlive the process."""


def train(
    spec: TrainSpec,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    keep: Callable[[], None] = keep_nothing,
    group: Single | None = None,
) -> list[Checkpoint]:
    """Run the training in `spec` and return a checkpoint per end point, `<out>/tokens-<n>/`.

    `<out>/curve.parquet` holds endpoint, step, tokens, loss (nats per token), learning_rate and,
    at some steps, held_out_loss. `progress` is called with the tokens of every finished step.
    A killed run resumes from its last state. `keep` is called after each state is written and at
    the end, to keep the contents of a folder that does not outlive the process. Each process of a
    `group` takes its share of every batch; only the first one reads and writes the folder.
    Raises OSError if the disk has no room for the states and checkpoints.
    """
    return Run(spec, torch.device(device), progress, keep, group or Single()).run()


class Run:
    """A training run: its model, its optimizer and its phases."""

    def __init__(
        self,
        spec: TrainSpec,
        device: torch.device,
        progress: Progress,
        keep: Callable[[], None],
        group: Single,
    ) -> None:
        self.spec = spec
        self.keep = keep
        self.device = device
        self.progress = progress
        self.phases = phases(spec.training, spec.endpoints)
        self.tokens = open_tokens(spec.tokens)
        self.n_tokens = real_tokens(spec.tokens)
        if spec.endpoints[-1] > len(self.tokens):
            raise ValueError(
                f"{spec.tokens}: {spec.endpoints[-1]} sequences requested, {len(self.tokens)} exist"
            )
        self.order = training_order(spec.seed, len(self.tokens))
        self.seen = tokens_seen(self.n_tokens, self.order)
        self.chooser = None
        if spec.online:
            spec.out.mkdir(parents=True, exist_ok=True)
            self.chooser = Chooser(spec.online, spec.tokens, spec.out, progress)
        self.amp = device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.group = group
        self._begin()
        self.saved, self.saving = time.monotonic(), 0.0

    def _begin(self) -> None:
        self.model = checkpoints.to_device(self._initial_model(), self.device).train()
        attention.attend_by_blocks(self.model)
        head_weight = None if self.amp else checkpoints.head_weight(self.model)
        self.objective = self.group.averaging(
            Objective(self.model, head_weight, self.spec.training.z_loss)
        )
        self.optimizer = self._optimizer()

    def _initial_model(self) -> PreTrainedModel:
        if isinstance(self.spec.start, Model):
            encoder = Encoder(self.spec.tokenizer)
            length = self.tokens.shape[1]
            model = checkpoints.build(self.spec.start, encoder.vocab_size, length, self.spec.seed)
            model.config.eos_token_id = encoder.end_of_text
            if model.generation_config is not None:
                model.generation_config.eos_token_id = encoder.end_of_text
            return model
        return checkpoints.load(self.spec.start)

    def _optimizer(self) -> torch.optim.AdamW:
        parameters = list(self.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        t = self.spec.training
        return torch.optim.AdamW(
            groups, lr=0.0, betas=t.betas, eps=t.epsilon, weight_decay=t.weight_decay, fused=True
        )

    def run(self) -> list[Checkpoint]:
        out = self.spec.out
        out.mkdir(parents=True, exist_ok=True)
        running = out / RUNNING
        ends = {i: self._checkpoint(i) for i in range(len(self.spec.endpoints))}
        if self.group.said_by_first((out / "curve.parquet").exists()):
            return list(ends.values())
        begun = self.group.said_by_first(running.exists())
        if not begun and self.first:
            require_space(out, self._bytes_on_disk(), "training")
        state = self._restore(running) if begun else _State()
        if self.chooser:
            self.chooser.go_on_from(state.step * self.spec.training.batch_sequences)
        for index in range(state.phase, len(self.phases)):
            phase = self.phases[index]
            if state.phase < index:
                if not phase.branch and phase.target > 0:
                    state = self._restore(self._trunk(phase.target - 1), curve=state.curve)
                elif phase.start == 0 and index > 0:
                    self._begin()
                state.phase, state.step = index, phase.start
            self._advance(phase, state, running)
            if not phase.branch:
                self._save(self._trunk(phase.target), state)
            elif self.first:
                checkpoints.save(self.model, ends[phase.target].path, self.spec.tokenizer)
        if self.chooser:
            self.chooser.sync()
        if self.first:
            curve = pl.DataFrame(state.curve, schema=_CURVE)
            curve.write_parquet(out / "curve.tmp", compression="zstd")
            write_atomically(out / "curve.tmp", out / "curve.parquet")
            for left in [*out.glob("*.safetensors"), *out.glob("*.tmp")]:
                left.unlink()
            self.keep()
        return list(ends.values())

    @property
    def first(self) -> bool:
        """Whether this process reads and writes the folder."""
        return self.group.rank == 0

    def _bytes_on_disk(self) -> int:
        """Return the disk space that a run needs, in bytes.

        A state is a model and two moments in float32: the running one, the next one, and one per
        trunk. There is one checkpoint per end point.
        """
        n: int = sum(p.numel() for p in self.model.parameters())
        return 4 * n * (6 + 4 * len(self.spec.endpoints))

    def _trunk(self, target: int) -> Path:
        """Return the path of the trunk's state at the fork to an end point.

        There is a file per fork, because a killed run may resume before a fork it already passed.
        """
        return self.spec.out / f"trunk-{target}.safetensors"

    def _checkpoint(self, endpoint: int) -> Checkpoint:
        tokens = int(self.seen[self.spec.endpoints[endpoint]])
        sizes = checkpoints.n_parameters(self.model)
        return Checkpoint(self.spec.out / f"tokens-{tokens}", tokens, sizes)

    def _advance(self, phase: Phase, state: _State, running: Path) -> None:
        size = self.spec.training.batch_sequences
        ends = [math.ceil(n / size) for n in self.spec.endpoints]
        every = max(1, ends[0] // CURVE_POINTS)
        while state.step < phase.stop:
            rate = learning_rate(
                self.spec.training, state.step, ends[0], ends[phase.target], phase.branch
            )
            last = self.spec.endpoints[phase.target]
            rows = self._rows(state.step * size, min((state.step + 1) * size, last))
            loss = self.step(rows, rate, state.step)
            state.step += 1
            finished = phase.branch and state.step == phase.stop
            measured = finished or state.step % every == 0
            held_out = self._held_out() if measured else None
            state.curve.append(
                {
                    "endpoint": self._checkpoint(phase.target).tokens if phase.branch else None,
                    "step": state.step,
                    "tokens": int(self.seen[min(state.step * size, last)]),
                    "loss": loss,
                    "learning_rate": rate,
                    "held_out_loss": held_out,
                }
            )
            self.progress(int(self.n_tokens[rows].sum()))
            pause = max(CHECKPOINT_SECONDS, SAVING_PAUSE * self.saving)
            if time.monotonic() - self.saved > pause:
                self._save(running, state)

    def _rows(self, first: int, stop: int) -> np.ndarray:
        """Return the rows of the sequences to train on as number [first, stop)."""
        if self.chooser:
            return self.chooser.choose(self.model, first, stop)
        return self.order[first:stop]

    def step(self, rows: np.ndarray, rate: float, step: int) -> float:
        """Take an optimizer step on some sequences and return their mean loss, nats per token."""
        self._seed_dropout(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Examples of tasks are mostly padding: columns beyond the batch's longest row are skipped.
        longest = self.n_tokens[rows].max()
        batch = self.tokens[rows][:, :longest].astype(np.int64)
        tokens_BxT = torch.from_numpy(batch).to(self.device)
        n_tokens = torch.from_numpy(self.n_tokens[rows]).to(self.device)
        labels = shifted_labels(tokens_BxT, n_tokens)
        n_labels = int((labels != IGNORED).sum())
        micro = max(1, MICRO_BATCH_TOKENS.get(self.device.type, 4_096) // tokens_BxT.shape[1])
        mine, share = self.group.share(len(rows))
        idle = share - len(mine)  # filled with ignored rows: all processes need the same number
        tokens_BxT = torch.cat([tokens_BxT[mine], tokens_BxT[:idle]])
        labels = torch.cat([labels[mine], torch.full_like(labels[:idle], IGNORED)])
        losses = []
        parts = torch.arange(share).split(micro)
        for part in parts:
            last = part is parts[-1]
            with contextlib.nullcontext() if last else self.group.not_yet(self.objective):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                    nll, objective = self.objective(tokens_BxT[part], labels[part])
                (objective * self.group.size / max(1, n_labels)).backward()
            losses.append(nll.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.training.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        here = np.array(sum(nll.item() for nll in losses))
        return float(self.group.total(here, self.device)) / max(1, n_labels)

    def _seed_dropout(self, step: int) -> None:
        """Seed the random numbers of a step.

        Only the device in use is seeded: torch.manual_seed also records the call, with a stack
        trace, for every other device type, which takes time and memory that is never freed.
        """
        seed = self.spec.seed * 1_000_003 + step + self.group.rank * 2**40
        if self.device.type in {"cuda", "mps"}:
            getattr(torch, self.device.type).manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def _held_out(self) -> float | None:
        if self.spec.held_out is None:
            return None
        value = held_out_loss(self.model, self.spec.held_out, self.group)
        self.model.train()
        return value

    def _save(self, path: Path, state: _State) -> None:
        if not self.first:
            return
        begun = time.monotonic()
        if self.chooser:
            self.chooser.sync()
        names = dict(self.model.named_parameters())
        tensors = {f"model.{n}": p.detach() for n, p in names.items()}
        for name, parameter in names.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        scalars = {"phase": state.phase, "step": state.step, "curve": state.curve}
        temporary = path.with_suffix(".tmp")
        cpu = {n: t.cpu().contiguous() for n, t in tensors.items()}
        safetensors.torch.save_file(cpu, temporary, metadata={"state": json.dumps(scalars)})
        write_atomically(temporary, path)
        self.keep()
        self.saved = time.monotonic()
        self.saving = self.saved - begun

    def _restore(self, path: Path, curve: list[Any] | None = None) -> _State:
        """Load a state. `curve` replaces a trunk's own curve, which is older than the run's."""
        read: dict[str, torch.Tensor] = {}
        scalars: dict[str, Any] = {}
        if self.first:
            scalars = state_scalars(path)
            with safetensors.safe_open(path, "pt") as file:
                read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        scalars = self.group.said_by_first(scalars)
        shapes = self.group.said_by_first({name: tuple(t.shape) for name, t in read.items()})
        tensors = {
            name: read[name].to(self.device)
            if self.first
            else torch.empty(shape, device=self.device)
            for name, shape in shapes.items()
        }
        self.group.copied_from_first(tensors.values())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
                self.optimizer.state[parameter] = {
                    key: tensors[f"optimizer.{name}.{key}"]
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"optimizer.{name}.{key}" in tensors
                }
        return _State(
            scalars["phase"], scalars["step"], scalars["curve"] if curve is None else curve
        )


_CURVE = {
    "endpoint": pl.Int64,
    "step": pl.Int64,
    "tokens": pl.Int64,
    "loss": pl.Float64,
    "learning_rate": pl.Float64,
    "held_out_loss": pl.Float64,
}


def held_out_loss(model: PreTrainedModel, tokens: Path, group: Single) -> float:
    """Return the mean loss over all labels of packed sequences, nats per token.

    Each process of the group scores its share. A sequence's loss has the same bits in any batch, so
    the mean is that of a single process.
    """
    sequences, real = open_tokens(tokens), real_tokens(tokens)
    losses = np.zeros((2, len(sequences)))  # losses and numbers of labels
    mine = slice(group.rank, None, group.size)
    if len(real[mine]):
        (losses[:, mine],) = sequence_losses([Scorer(model)], sequences[mine], real[mine])
    nll, n = group.total(losses, model.device)
    return mean_loss(nll, n)
