"""Mutation testing: inject deliberate faults, one at a time, and check that a test finds each.

    python benchmarks/mutations.py [--results FILE] [--only NAME ...]

Each fault is injected into a copy of the working tree. The tests closest to it run first, then all
tests of `make test`, then those that `make test-all` adds, until one fails. Results are kept in
FILE, one JSON line per fault; a fault that is in FILE is not tried again. Exits with 1 if `make
test` misses more than two faults, or `make test-all` misses any.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FAST, SLOW = "not slow", "slow"
MISSED_BY_FAST = 2  # faults that `make test` is allowed to miss
HUNG_SECONDS = 1_200
TEST_HUNG_SECONDS = 300


class Fault(NamedTuple):
    """A fault: replaces `old`, which occurs once in `path`, by `new`. `tests` are the closest."""

    name: str
    path: str
    old: str
    new: str
    tests: str


FAULTS = [
    Fault(
        "a label on padding",
        "colorfilter/scoring/labels.py",
        "ignored = following >= n_tokens[:, None]",
        "ignored = following > n_tokens[:, None]",
        "tests/colorfilter/scoring/test_labels.py",
    ),
    Fault(
        "blocks of the vocabulary joined without their maximum",
        "colorfilter/scoring/kernels/chunked.py",
        "total = total * (top - new_top).exp() + part",
        "total = total + part",
        "tests/colorfilter/scoring/test_loss.py",
    ),
    Fault(
        "columns past the vocabulary counted",
        "colorfilter/scoring/kernels/triton.py",
        'logits = tl.where(column[None, :] < vocab, logits, float("-inf"))',
        "logits = tl.where(column[None, :] < vocab, logits, 0.0)",
        "tests/colorfilter/scoring/kernels",
    ),
    Fault(
        "an existing chunk is scored again",
        "colorfilter/scoring/chunks.py",
        'whole = sha256.startswith(path.stem.rpartition("-")[2]) and stop <= len(n_tokens)',
        "whole = False",
        "tests/colorfilter/scoring/test_chunks.py",
    ),
    Fault(
        "color with the wrong sign",
        "resources/score_store.py",
        "loss_conditional::DOUBLE - loss_prior::DOUBLE AS color",
        "loss_prior::DOUBLE - loss_conditional::DOUBLE AS color",
        "tests/resources/test_score_store.py",
    ),
    Fault(
        "ties not broken by shard",
        "colorfilter/selection/select.py",
        "ORDER BY score, number, position\n    LIMIT",
        "ORDER BY score, position, number\n    LIMIT",
        "tests/colorfilter/selection/test_select.py",
    ),
    Fault(
        "one sequence too many",
        "colorfilter/selection/select.py",
        "keep = int(candidates / tau)",
        "keep = int(candidates / tau) + 1",
        "tests/colorfilter/selection/test_select.py",
    ),
    Fault(
        "later copies are candidates",
        "colorfilter/selection/score_tables.py",
        "    connection.execute(COPIES)\n",
        "",
        "tests/colorfilter/selection/test_select.py",
    ),
    Fault(
        "the seed of a draw ignored",
        "colorfilter/data/sampling.py",
        'f"{seed}|{sha256}"',
        'f"0|{sha256}"',
        "tests/colorfilter/data/test_sampling.py",
    ),
    Fault(
        "spans always at the start of a document",
        "colorfilter/data/tokens.py",
        '"doc_start": start,',
        '"doc_start": 0,',
        "tests/colorfilter/data/test_tokens.py",
    ),
    Fault(
        "duplicates within a shard kept",
        "colorfilter/data/documents.py",
        "seen.add(bytes.fromhex(sha256))",
        "pass",
        "tests/colorfilter/data/test_documents.py",
    ),
    Fault(
        "fourteen words in a row instead of thirteen",
        "colorfilter/selection/decontamination.py",
        "NGRAM_WORDS = 13",
        "NGRAM_WORDS = 14",
        "tests/colorfilter/selection/test_decontamination.py",
    ),
    Fault(
        "moments of AdamW lost when training resumes",
        "colorfilter/training/training.py",
        'for key in ("step", "exp_avg", "exp_avg_sq")',
        'for key in ("step", "exp_avg_sq")',
        "tests/colorfilter/training/test_training_resume.py",
    ),
    Fault(
        "a decay that ends a step early",
        "colorfilter/training/schedule.py",
        "rate *= (end - step) / (",
        "rate *= (end - step - 1) / (",
        "tests/colorfilter/training/test_schedule.py",
    ),
    Fault(
        "rows counted twice in a group",
        "colorfilter/training/training.py",
        "torch.full_like(labels[:idle], IGNORED)",
        "labels[:idle]",
        "tests/colorfilter/training/test_process_group.py",
    ),
    Fault(
        "RHO-down chooses the highest",
        "colorfilter/training/rho_down.py",
        "scores = self._conditional[seen].astype(np.float64) - current",
        "scores = current - self._conditional[seen].astype(np.float64)",
        "tests/colorfilter/training/test_rho_down.py",
    ),
    Fault(
        "better without the confidence interval",
        "colorfilter/evaluation/metrics.py",
        "difference.mean + difference.half_width < 0",
        "difference.mean < 0",
        "tests/colorfilter/evaluation/test_metrics.py",
    ),
    Fault(
        "tokens-to-match interpolated in tokens",
        "colorfilter/evaluation/metrics.py",
        "n0 * (n1 / n0) ** share / tokens",
        "(n0 + (n1 - n0) * share) / tokens",
        "tests/colorfilter/evaluation/test_metrics.py",
    ),
    Fault(
        "drift scaled by the deviation of the new shards",
        "colorfilter/selection/drift.py",
        "stddev_samp(score) FILTER (NOT is_new)",
        "stddev_samp(score) FILTER (is_new)",
        "tests/colorfilter/selection/test_drift.py",
    ),
    Fault(
        "a file renamed before it is on the disk",
        "colorfilter/storage/files.py",
        '    with temporary.open("rb") as stream:\n        os.fsync(stream.fileno())\n',
        "",
        "tests/colorfilter/storage/test_files.py",
    ),
    Fault(
        "unknown keys of a recipe accepted",
        "colorfilter/config/section.py",
        'extra="forbid"',
        'extra="ignore"',
        "tests/colorfilter/config/test_recipe.py",
    ),
    Fault(
        "workers not told to stop",
        "colorfilter/compute/local_pool.py",
        "        if self.stop.is_set():\n            raise StoppedError\n",
        "",
        "tests/colorfilter/compute/test_local_pool.py",
    ),
    Fault(
        "training by a group runs in one process",
        "colorfilter/compute/machine.py",
        "members += [(IN_GROUP, rank, size, meeting, *train) for rank in range(size)]",
        "members += [(IN_GROUP, 0, 1, meeting, *train)]",
        "tests/colorfilter/compute/test_machine.py",
    ),
    Fault(
        "entries of the ledger unchained",
        "resources/ledger.py",
        '{"previous": _sha256(last), **entry}',
        '{"previous": NOTHING, **entry}',
        "tests/resources/test_ledger.py",
    ),
    Fault(
        "a lease that is not released",
        "resources/artifacts.py",
        "        self._lease.close()\n",
        "        globals().setdefault('_kept', []).append(self._lease)\n",
        "tests/resources/test_artifacts.py",
    ),
    Fault(
        "a damaged file counts as complete",
        "colorfilter/storage/manifest.py",
        "path.stat().st_size == size for path",
        "path.exists() for path",
        "tests/colorfilter/storage/test_manifest.py",
    ),
    Fault(
        "a redacted version that outdates what was built from it",
        "colorfilter/storage/manifest.py",
        'f.get("origin", f["sha256"])',
        'f["sha256"]',
        "tests/colorfilter/storage/test_manifest.py",
    ),
    Fault(
        "a forgotten sequence stays a candidate",
        "assets/declaration.py",
        "return exclusions(artifacts)",
        "return exclusions(artifacts)[:0]",
        "tests/commands/forget/test_forget.py",
    ),
    Fault(
        "a folder in use is pruned",
        "resources/pruning.py",
        "if path in needed or at_work(artifacts, folder):",
        "if path in needed:",
        "tests/resources/test_pruning.py",
    ),
    Fault(
        "a backup restored unchecked",
        "commands/backup/backup.py",
        "if not stands(folder / path) or file_sha256(folder / path / MANIFEST) != sha256:",
        "if not stands(folder / path):",
        "tests/commands/backup/test_backup.py",
    ),
    Fault(
        "a home of another recipe taken",
        "resources/home.py",
        'if facts["recipe"] != recipe:',
        "if False:",
        "tests/resources/test_home.py",
    ),
    Fault(
        "duplicate losses published",
        "resources/score_parts.py",
        "    if twice:\n",
        "    if twice and not bad and False:\n",
        "tests/resources/test_score_parts.py",
    ),
    Fault(
        "a check that always passes",
        "assets/auxiliary/models.py",
        "passed = math.isfinite(conditional) and conditional < prior",
        "passed = True",
        "tests/assets/test_pipeline.py",
    ),
    Fault(
        "a downward drift ignored",
        "assets/filtered/change_checks.py",
        'abs(found["drift"]) > limits.drift',
        'found["drift"] > limits.drift',
        "tests/assets/filtered/test_change_checks.py",
    ),
    Fault(
        "the target model's seed not in its key",
        "assets/evaluated/target_models.py",
        'settings={**learned(recipe), "endpoints": ends},\n                seed=seed,\n',
        'settings={**learned(recipe), "endpoints": ends},\n                seed=0,\n',
        "tests/assets/test_pipeline.py",
    ),
    Fault(
        "a code version that settings do not change",
        "assets/declaration.py",
        "canonical_json([names, self.settings, self.seed, self.precision])",
        "canonical_json([names, self.seed, self.precision])",
        "tests/assets/test_declaration.py",
    ),
    Fault(
        "a device held by a run that is gone",
        "pipelines/stale_runs.py",
        "        instance.event_log_storage.free_concurrency_slots_for_run(run_id)\n",
        "",
        "tests/pipelines/test_stale_runs.py",
    ),
    Fault(
        "an unfinished refresh not resumed",
        "pipelines/automation.py",
        "if not wanted and not unfinished(artifacts, recipe, found.shards):",
        "if not wanted:",
        "tests/pipelines/test_automation.py",
    ),
    Fault(
        "invalid input exits with 1",
        "commands/cli.py",
        "        return 2\n",
        "        return 1\n",
        "tests/commands/test_cli.py",
    ),
    Fault(
        "a call lost with its worker is not repeated",
        "colorfilter/compute/ray_pool.py",
        '            self.waiting.appendleft(call)\n            self._say(call, f"lost with',
        '            self._say(call, f"lost with',
        "tests/colorfilter/compute/test_ray_pool.py",
    ),
]


class Found(NamedTuple):
    """Which test found a fault, and in which suite; both are None if no test did."""

    fault: str
    test: str | None
    suite: str | None
    seconds: float


def copy_tree(folder: Path) -> None:
    """Copy tracked files, and untracked files that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def put_in(fault: Fault, folder: Path) -> None:
    """Inject a fault into a copy of the tree. Raises ValueError if `old` does not occur once."""
    file = folder / fault.path
    text = file.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.name}: occurs {text.count(fault.old)} times in {fault.path}; must be once"
        )
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def first_failure(folder: Path, tests: str, suite: str) -> str | None:
    """Return the first test that fails in a copy of the tree, or None if none fails.

    Raises RuntimeError if pytest fails without naming a test, for example because it was killed.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-rfE", "-m", suite, tests]
    # That test checks that every fault fits the tree, so it would fail for any injected fault.
    command += ["--ignore", "tests/test_mutations.py", "--timeout", str(TEST_HUNG_SECONDS)]
    if (folder / tests).is_dir() and suite == FAST:
        command += ["-n", "2", "--dist", "loadfile"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HUNG_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{tests} (still running after {HUNG_SECONDS} s)"
    if done.returncode in {0, 5}:
        return None
    named = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if named is None:
        ends = (done.stdout + done.stderr)[-1_000:]
        raise RuntimeError(f"pytest {tests} exited with {done.returncode}: {ends}")
    return named[1]


def find(fault: Fault) -> Found:
    """Inject a fault into a copy of the tree and run tests until one fails.

    Raises RuntimeError if a test outside the closest ones fails, and also fails without the fault.
    """
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="colorfilter-") as name:
        folder = Path(name)
        copy_tree(folder)
        whole = (folder / fault.path).read_text(encoding="utf-8")
        put_in(fault, folder)
        for suite in (FAST, SLOW):
            for tests in (fault.tests, "tests"):
                test = first_failure(folder, tests, suite)
                if not test:
                    continue
                seconds = round(time.monotonic() - begun, 1)
                (folder / fault.path).write_text(whole, encoding="utf-8")
                if tests != fault.tests and first_failure(folder, test.partition("[")[0], suite):
                    raise RuntimeError(f"{test} also fails without the fault")
                return Found(fault.name, test, suite, seconds)
    return Found(fault.name, None, None, round(time.monotonic() - begun, 1))


def main() -> int:
    """Try every fault that has no result yet, and print which tests found them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / ".mutations.jsonl")
    parser.add_argument("--only", nargs="+", choices=[f.name for f in FAULTS], metavar="NAME")
    options = parser.parse_args()
    known = {}
    if options.results.exists():
        lines = options.results.read_text(encoding="utf-8").splitlines()
        known = {found.fault: found for found in (Found(**json.loads(line)) for line in lines)}
    for number, fault in enumerate(FAULTS, 1):
        if options.only and fault.name not in options.only:
            continue
        if fault.name not in known or options.only:
            known[fault.name] = found = find(fault)
            with options.results.open("a", encoding="utf-8") as results:
                results.write(json.dumps(found._asdict()) + "\n")
        found = known[fault.name]
        by = {FAST: "make test", SLOW: "make test-all"}.get(found.suite or "", "nothing")
        shown = f"found by {by}: {found.test}" if found.test else "NOT FOUND"
        print(f"{number:>2} of {len(FAULTS)}  {fault.name:<55} {shown}", flush=True)
    tried = [known[f.name] for f in FAULTS if f.name in known]
    fast = sum(found.suite == FAST for found in tried)
    found_at_all = sum(found.test is not None for found in tried)
    print(f"{len(tried)} faults: make test finds {fast}, make test-all finds {found_at_all}")
    return int(found_at_all < len(tried) or fast < len(tried) - MISSED_BY_FAST)


if __name__ == "__main__":
    sys.exit(main())
