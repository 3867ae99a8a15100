"""`cost` and `run --dry-run`: what they print, and that nothing is opened or written."""

import io
import json
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from colorfilter.config.load import load
from commands.cost import print_cost
from pipelines.settings import RECIPES, recipe_path
from resources.artifacts import ArtifactStore
from resources.home import FORMAT, Home
from tests.conftest import Project, recipe_facts
from tests.program import Caller


def shown(recipe: str, home: Path, width: int = 200, **options: float) -> str:
    console = Console(file=io.StringIO(), width=width)
    plan = load(recipe_path(recipe), sources=False)
    print_cost(console, plan, Home(home), **options)
    return console.file.getvalue()


def cells(text: str, name: str, table: int = 0) -> list[str]:
    """The cells of a row, by its name, in the first table that has one or a later one."""
    rows = [line for line in text.splitlines() if re.match(rf" {re.escape(name)}  ", line)]
    return re.split(r" {2,}", rows[table].strip())[1:]


def files_under(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_has_a_cost(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("COLORFILTER_BOOKS", "COLORFILTER_TASKS", "CORPUS", "DOMAIN"):
        monkeypatch.delenv(variable, raising=False)
    text = shown(recipe, tmp_path / "home")
    assert "prior_scores" in text
    assert "--tflops" in text
    assert not files_under(tmp_path)


def test_the_books_recipe_in_the_papers_figures(tmp_path: Path) -> None:
    text = shown("c4-books-150m", tmp_path, corpus_tokens=172_000_000_000, tflops=400)
    assert cells(text, "prior_model")[:2] == ["3.1 B", "9.3"]
    assert cells(text, "books/conditional_scores")[:2] == ["172 B", "172"]
    # 3 x 3.1 + 2 x 16 x 3.1 + 3 x 3.1, the target being as large as the prior.
    assert cells(text, "color_tau16")[:2] == ["3.1 B", "117.8"]
    flops = float(cells(text, "prior_scores")[2])
    assert cells(text, "prior_scores")[3] == f"{flops / 400e12 / 3600:.3g} h"


def test_tables_fit_a_narrow_terminal(tmp_path: Path) -> None:
    text = shown("c4-tasks-1b", tmp_path, width=80, tflops=400)
    assert len(cells(text, "tasks/color_tau64/target_model")) == 4


def test_predicted_against_measured(finished: Project) -> None:
    text = shown(str(finished.path), finished.home.root)
    _, _, seconds, rate_seconds = cells(text, "prior_model", table=1)
    trained = [r for r in finished.kernel_runs() if r["verb"] == "train"]
    (prior,) = [r for r in trained if "/prior_model/" in r["folder"]]
    assert rate_seconds == f"{prior['seconds']:.3g} s"
    assert seconds.endswith(" s")
    scores = [r for r in finished.kernel_runs() if r["verb"] == "score"]
    scored = sum(r["tokens"] for r in scores if r["shard"] != "sample") / 2
    sampled = sum(r["tokens"] for r in [*scores, *trained] if "/cutoff_confidence/" in r["folder"])
    assert cells(text, "reference/cutoff_confidence", table=1)[1] == f"{sampled / 1e3:.3g} k"
    evaluated = [r for r in finished.kernel_runs() if r["verb"] == "evaluate"]
    by_arm = sum(r["tokens"] for r in evaluated if "/evaluation/" in r["folder"])
    assert cells(text, "reference/*/evaluation", table=1)[1] == f"{by_arm / 1e3:.3g} k"
    for asset in ("prior_scores", "reference/conditional_scores"):
        assert cells(text, asset, table=1)[1] == f"{scored / 1e3:.3g} k"
    assert "rates measured in the home on cpu: train" in text
    assert "no longer current" not in text


def test_what_is_not_in_the_ledger_stands_apart(finished: Project, tmp_path: Path) -> None:
    (tmp_path / "home.json").write_text(json.dumps({"recipe": "tests", "format": FORMAT}))
    (tmp_path / "ledger.jsonl").write_text(finished.home.ledger.read_text())
    old = {"verb": "train", "folder": "artifacts/prior_model/0", "tokens": 5_000, "seconds": 7.0}
    gone = {"verb": "score", "folder": "artifacts/gone/s/0", "tokens": 10_000, "seconds": 1.0}
    chosen = ArtifactStore(home=str(finished.home.root)).current("reference/random/selection")
    folder = chosen.path.relative_to(finished.home.root) / "proxy"
    proxy = {"verb": "train", "folder": str(folder), "tokens": 70, "seconds": 3.0}
    lines = [json.dumps({**line, "device": "cuda"}) for line in (old, gone, proxy)]
    (tmp_path / "kernel_runs.jsonl").write_text("\n".join([*lines, '{"verb": "tra']))
    text = shown(str(finished.path), tmp_path)
    assert cells(text, "no longer current") == ["-", "15 k", "-", "8 s"]
    assert cells(text, "reference/random/selection") == ["-", "70", "-", "3 s"]
    assert cells(text, "total", table=1)[-1] == "11 s"
    assert "Times are not known" in text


def test_rates_are_those_of_the_device_used_last(finished: Project, tmp_path: Path) -> None:
    (tmp_path / "home.json").write_text(json.dumps({"recipe": "tests", "format": FORMAT}))
    (tmp_path / "ledger.jsonl").write_text(finished.home.ledger.read_text())
    (prior,) = [r for r in finished.kernel_runs() if "/prior_model/" in r["folder"]]
    slow = {**prior, "seconds": 1000.0}
    fast = {**prior, "device": "cuda", "tokens": 13_333, "seconds": 2.0}
    (tmp_path / "kernel_runs.jsonl").write_text(f"{json.dumps(slow)}\n{json.dumps(fast)}\n")
    text = shown(str(finished.path), tmp_path)
    assert cells(text, "prior_model")[3] == "2 s"  # 60,000 characters are 13,333 tokens
    assert cells(text, "prior_scores")[3] == "-"
    assert cells(text, "total")[-1] == "-"


def test_records_of_another_recipe_are_not_used(finished: Project) -> None:
    text = shown("sample", finished.home.root)
    assert "is another recipe's" in text
    assert "measured in the home" not in text


@pytest.mark.parametrize(
    ("option", "value"), [("--corpus-tokens", "10"), ("--tflops", "0"), ("--tflops", "nan")]
)
def test_bad_input_is_one_line(call: Caller, option: str, value: str, tmp_path: Path) -> None:
    done = call("cost", "--home", str(tmp_path / "home"), option, value)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {option}")
    assert not files_under(tmp_path)


def dry_run(
    call: Caller, monkeypatch: pytest.MonkeyPatch, facts: dict, root: Path
) -> tuple[int, str, str]:
    """A dry run, and that it left nothing behind, in the user's own folder neither."""
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(facts))
    before = files_under(root)
    monkeypatch.setenv("HOME", str(root))
    done = call("run", "--dry-run", "--recipe", str(path), "--home", str(root / "home"))
    assert files_under(root) == before
    return done.returncode, done.stdout, done.stderr


def test_a_dry_run_opens_no_source_and_writes_nothing(
    call: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = recipe_facts(tmp_path / "not-there")
    code, out, error = dry_run(call, monkeypatch, facts, tmp_path)
    assert code == 0, error
    assert not error
    assert "not-there/*.jsonl (corpus)" in out
    assert "home: would be created" in out
    assert re.search(r"arms +color_tau4, .*random", out)
    assert cells(out, "reference/random/target_model x2")
    assert "nothing was written" in out


def test_a_dry_run_refuses_what_a_run_would(
    call: Caller, monkeypatch: pytest.MonkeyPatch, finished: Project, tmp_path: Path
) -> None:
    facts = recipe_facts(tmp_path)
    facts["target"] = {**facts["target"], "model": {"type": "gpt_neox", "config": {"layers": 1}}}
    code, _, error = dry_run(call, monkeypatch, facts, tmp_path)
    assert code == 2
    assert error.splitlines() == [
        "error: model.config.layers: not a setting of gpt_neox; remove it"
    ]
    done = call("run", "--dry-run", "--recipe", "sample", "--home", str(finished.home.root))
    assert done.returncode == 2
    assert "belongs to the recipe 'tests', not to 'sample'" in done.stderr
