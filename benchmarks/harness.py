"""The pipeline's accuracies on tasks compared with lm-evaluation-harness's own command line.

    python benchmarks/harness.py --home HOME [--out FOLDER]

Takes the first target model of a home with a domain of tasks, and the test items of the tasks. They
are evaluated with the pipeline's code and with `lm_eval --model hf` in float32, which loads the
same checkpoint with transformers and the same items from task files written to `--out`. Prints both
accuracies per task, and the largest difference of a log-likelihood. `lm_eval` needs accelerate (pip
install accelerate).
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import colorfilter  # noqa: F401  (before torch: it sets how OpenMP threads wait)

# isort: split
import torch

from colorfilter.data.tokens import Encoder
from colorfilter.evaluation import harness
from colorfilter.models import attention, checkpoints
from resources.artifacts import ArtifactStore


def command_line(checkpoint: Path, names: list[str], folder: Path) -> dict[str, Any]:
    """Run the harness's command line. Return its results, with log-likelihoods in `samples`."""
    out = Path(mkdtemp(dir=folder))
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf"),
        *("--model_args", f"pretrained={checkpoint},dtype=float32"),
        *("--tasks", ",".join(names), "--include_path", str(folder)),
        *("--device", "cpu", "--batch_size", "16"),
        *("--log_samples", "--output_path", str(out)),
    ]
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.rglob("results_*.json")
    found: dict[str, Any] = json.loads(path.read_text())["results"]
    for name in names:
        (path,) = out.rglob(f"samples_{name}_*.jsonl")
        found[name]["samples"] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def largest_difference(scored: harness.ScoredModel, samples: list[dict[str, Any]]) -> float:
    """Return the largest difference, in nats, between our and the logged log-likelihoods."""
    differences = []
    for sample in samples:
        for arguments, (answer, *_) in zip(
            sample["arguments"].values(), sample["resps"], strict=True
        ):
            ours, _ = scored.answers[arguments["arg_0"], arguments["arg_1"]]
            differences.append(abs(ours - float(answer[0])))
    return max(differences)


def main() -> None:
    """Evaluate with both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder for the task files (default: temporary)")
    options = parser.parse_args()
    store = ArtifactStore(home=str(options.home.resolve()))
    on_tasks = (
        (store.current(asset, seed), items)
        for asset, seed in store.entries()
        if asset.endswith("/target_model")
        and (items := store.current(f"{asset.split('/')[0]}/domain_text").path / "tasks").is_dir()
    )
    target, items = next(on_tasks, (None, Path()))
    if target is None:
        parser.error(f"{options.home} has no target model of a domain with tasks")
    checkpoint = target.path / next(iter(target.facts["checkpoints"].values()))
    folder = (options.out or Path(mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)

    model = attention.prepare(checkpoints.load(checkpoint), torch.device("cpu"))
    scored = harness.ScoredModel(model, Encoder(checkpoint))
    ours = harness.evaluate(scored, items)
    names = list(harness.write_tasks(items, folder, scored.fits))
    theirs = command_line(checkpoint, names, folder)

    print(f"\n{target.name}, {target.facts['parameters']:,} parameters\n")
    print("| task | items | acc, ours | CLI | acc_norm, ours | CLI | largest difference, nats |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        measured = [
            found
            for metric in harness.METRICS
            for found in (ours.get(f"{name}_{metric}"), theirs[name].get(f"{metric},none"))
        ]
        cells = [
            name,
            f"{ours[f'{name}_items']:.0f}",
            *("-" if value is None else f"{value:.4f}" for value in measured),
            f"{largest_difference(scored, theirs[name]['samples']):.1e}",
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
