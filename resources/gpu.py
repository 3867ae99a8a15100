"""The one way from an asset to torch: three verbs on whatever device there is.

`score`, `train` and `evaluate` hold alike locally and on a cluster. torch is imported and the
device opened at the first call; loaded models are kept by fingerprint within the process and
freed in teardown. Every kernel run leaves lines in `kernel_runs.jsonl` of the home.
"""

import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import PrivateAttr

from colorfilter import provenance
from colorfilter.errors import InputError
from colorfilter.progress import Progress, silent
from resources.artifacts import append_line
from resources.home import Home

if TYPE_CHECKING:
    import torch

    from colorfilter.scoring import Receipt, Scorer
    from colorfilter.training import Checkpoint, TrainSpec


class Gpu(dg.ConfigurableResource):
    """The device that runs the loss kernel: CUDA, else MPS, else CPU."""

    home: str
    precision: str = "float32"

    _scorers: dict[str, "Scorer"] = PrivateAttr(default_factory=dict)
    _run_id: str = PrivateAttr(default_factory=lambda: uuid.uuid4().hex)

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:  # noqa: ARG002
        if self._scorers:
            self._scorers.clear()
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def device(self) -> "torch.device":
        import torch

        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")

    def score(
        self,
        models: Mapping[str, Path | str],
        tokens: Path,
        shard: str,
        out: Path,
        progress: Progress = silent,
    ) -> list["Receipt"]:
        """Score packed tokens by models (fingerprint -> checkpoint) into chunks in `out`."""
        from colorfilter.scoring import score_shard

        scorers = {name: self._scorer(name, path) for name, path in models.items()}
        receipts = score_shard(scorers, tokens, shard, out, self.precision, progress)
        for receipt in receipts:
            if receipt.seconds:
                facts = {
                    "shard": shard,
                    "chunk": receipt.file,
                    "sequences": receipt.sequences,
                    "precision": self.precision,
                }
                self._record("score", ",".join(models), receipt.tokens, receipt.seconds, facts)
        return receipts

    def train(self, spec: "TrainSpec", progress: Progress = silent) -> list["Checkpoint"]:
        """Train as the spec says; a checkpoint per end point."""
        from colorfilter import training

        done = 0

        def count(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(tokens)

        begun = time.perf_counter()
        checkpoints = training.train(spec, self.device(), count)
        seconds = time.perf_counter() - begun
        facts = {"precision": "float32", "seed": spec.seed}
        self._record("train", str(spec.out), done, seconds, facts)
        return checkpoints

    def evaluate(
        self, name: str, checkpoint: Path | str, tokens: Path, progress: Progress = silent
    ) -> tuple[Any, Any]:
        """Losses of packed tokens: float32 [n] nats per token, int32 [n] number of labels."""
        from colorfilter.scoring import sequence_losses
        from colorfilter.tokens import open_tokens, real_tokens

        scorer = self._scorer(name, checkpoint)
        return sequence_losses(scorer, open_tokens(tokens), real_tokens(tokens), progress)

    def _scorer(self, name: str, path: Path | str) -> "Scorer":
        if name not in self._scorers:
            from colorfilter import models
            from colorfilter.scoring import Scorer

            device = self.device()
            if device.type == "cpu" and self.precision == "fp16":
                raise InputError("precision: fp16 is emulated on a CPU; use float32 or bf16")
            model = models.load(path, self.precision)
            self._scorers[name] = Scorer(models.to_device(model, device))
        return self._scorers[name]

    def _record(
        self, verb: str, model: str, tokens: int, seconds: float, facts: Mapping[str, Any]
    ) -> None:
        line = {
            "run_id": self._run_id,
            "verb": verb,
            "model": model,
            "shard": None,
            "chunk": None,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "device": str(self.device()),
            "kernel": "torch",
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": provenance.environment(),
            **facts,
        }
        append_line(Home(self.home).kernel_runs, line)
