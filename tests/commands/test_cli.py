"""The command line: invalid input gives one line and exit code 2, and no partial artifacts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import yaml

from resources.artifacts import ArtifactStore
from resources.home import Home
from tests.conftest import MODULES, Project, copy_of, recipe_facts, write_corpus
from tests.program import REPOSITORY, Caller, colorfilter, command


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "corpus"
    write_corpus(folder, MODULES[:3])
    return folder


def refuse(call: Caller, facts: dict, root: Path) -> str:
    """Run a recipe that must be refused; the one line that says why."""
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(facts))
    done = call("run", "--recipe", str(path), "--home", str(root / "home"))
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for folder in (root / "home" / "artifacts").rglob("*"):
        if folder.is_dir() and not any(p.is_dir() for p in folder.iterdir()):
            inside = [folder, *folder.parents]
            assert any((p / "manifest.json").exists() for p in inside), f"{folder} is half-made"
    return lines[0]


def test_an_unknown_recipe_names_those_there_are() -> None:
    done = colorfilter("run", "--recipe", "nothing")
    assert done.returncode == 2
    assert "no recipe named 'nothing'" in done.stderr
    assert "sample" in done.stderr


def test_an_impossible_value_names_its_place(call: Caller, corpus: Path, tmp_path: Path) -> None:
    facts = recipe_facts(corpus)
    facts["arms"][0]["tau"] = 0.5
    assert "arms.0.tau" in refuse(call, facts, tmp_path)


def test_an_unknown_key_names_its_place(call: Caller, corpus: Path, tmp_path: Path) -> None:
    facts = recipe_facts(corpus)
    facts["target"]["learning_rate"] = 1
    assert "target.learning_rate: unknown key" in refuse(call, facts, tmp_path)


def test_a_source_that_matches_nothing(call: Caller, corpus: Path, tmp_path: Path) -> None:
    facts = recipe_facts(corpus)
    facts["corpus"]["sources"][0]["files"] = str(tmp_path / "*.jsonl")
    assert "source code: nothing matches" in refuse(call, facts, tmp_path)


def test_a_source_without_a_usable_document(call: Caller, corpus: Path, tmp_path: Path) -> None:
    facts = recipe_facts(corpus)
    facts["corpus"]["sources"][0]["text_field"] = "body"
    line = refuse(call, facts, tmp_path)
    assert "holds no usable document" in line
    assert "text_field" in line


def test_an_unreadable_source(call: Caller, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    write_corpus(folder, [])
    (folder / "broken.jsonl.gz").write_bytes(b"not gzip")
    facts = recipe_facts(folder)
    facts["corpus"]["sources"][0]["files"] = str(folder / "*.gz")
    line = refuse(call, facts, tmp_path)
    assert "broken.jsonl.gz cannot be read" in line


def test_more_training_tokens_than_the_selection_holds(
    call: Caller, finished: Project, tmp_path: Path
) -> None:
    facts = copy_of(finished, tmp_path).facts
    target = {**facts["target"], "training_tokens": 10_000_000}
    assert "target.training_tokens: needs" in refuse(call, {**facts, "target": target}, tmp_path)


def test_a_corpus_too_small_for_the_sample(call: Caller, corpus: Path, tmp_path: Path) -> None:
    facts = recipe_facts(corpus)
    facts["prior"]["sample_chars"] = 10_000_000
    line = refuse(call, facts, tmp_path)
    assert "prior.sample_chars: a D_prior of 10000000 characters would take" in line


def test_a_domain_too_small_to_split(call: Caller, corpus: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": "one document"}))
    facts = recipe_facts(corpus)
    facts["domains"][0]["sources"] = [{"name": "one", "files": str(one)}]
    line = refuse(call, facts, tmp_path)
    assert "domain reference: 1 documents are too few to split" in line


def test_a_domain_that_shares_documents_with_the_corpus(
    call: Caller, corpus: Path, tmp_path: Path
) -> None:
    facts = recipe_facts(corpus)
    facts["domains"][0]["sources"].append({"name": "same", "files": str(corpus / "ast.jsonl")})
    line = refuse(call, facts, tmp_path)
    assert "no_shared_documents" in line
    assert "remove each from all places but one" in line


def test_a_sequence_longer_than_the_models_context(
    call: Caller, corpus: Path, tmp_path: Path
) -> None:
    facts = recipe_facts(corpus)
    facts["sequence_length"] = 64
    assert "longer than the model's context" in refuse(call, facts, tmp_path)


def test_a_tokenizer_that_does_not_fit_the_checkpoint(
    call: Caller, finished: Project, corpus: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    small = GPTNeoXConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    GPTNeoXForCausalLM(small).save_pretrained(tmp_path / "model")
    facts = recipe_facts(corpus)
    facts["prior"] = {"sample_chars": 20_000, "path": str(tmp_path / "model")}
    line = refuse(call, facts, tmp_path)
    assert "do not fit the 100" in line
    assert "tokenizer.path" in line


def test_a_home_of_another_recipe(
    call: Caller, finished: Project, corpus: Path, tmp_path: Path
) -> None:
    facts = {**recipe_facts(corpus), "name": "other"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(facts))
    home = str(finished.home.root)
    done = call("run", "--recipe", str(tmp_path / "recipe.yaml"), "--home", home)
    assert done.returncode == 2
    assert "belongs to the recipe 'tests', not to 'other'" in done.stderr


def test_a_home_that_cannot_be_written(call: Caller, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_facts(corpus)))
    home = str(tmp_path / "recipe.yaml" / "home")
    done = call("run", "--recipe", str(tmp_path / "recipe.yaml"), "--home", home)
    assert done.returncode == 2
    assert "cannot be used" in done.stderr


@pytest.mark.slow
def test_ctrl_c_stops_a_run_and_says_so_in_a_line(finished: Project, tmp_path: Path) -> None:
    """While the prior is being trained, or is about to be."""
    process = subprocess.Popen(
        # Where these tests run in the background of a shell, what they start ignores SIGINT.
        [
            *("env", "--default-signal=INT"),
            *command("run", "--recipe", str(finished.path), "--home", str(tmp_path / "home")),
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "home" / "artifacts" / "prior_model").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "stopped; run the same command again to resume"
    assert "Traceback" not in said
    assert "dagster" not in said.lower()


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_ends_the_same(finished: Project, tmp_path: Path) -> None:
    arguments = ["run", "--recipe", str(finished.path), "--home", str(tmp_path)]
    process = subprocess.Popen(
        command(*arguments),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    chunks = tmp_path / "artifacts" / "prior_scores"
    while not list(chunks.rglob("losses-*.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    written = {path.name for path in chunks.rglob("losses-*.parquet")}
    # Up to the filtered datasets: the target models would take most of the time.
    assert colorfilter(*arguments, "--job", "refresh").returncode == 0
    assert written <= {path.name for path in chunks.rglob("losses-*.parquet")}
    made = Home(tmp_path).kernel_runs.read_text().splitlines()
    scored = [r["chunk"] for r in map(json.loads, made) if r["verb"] == "score"]
    assert len(scored) == len(set(scored))
    for arm in ("color_tau4", "random"):
        asset = f"reference/{arm}/selection"
        before, after = (
            ArtifactStore(home=str(home)).current(asset).fingerprint
            for home in (finished.home.root, tmp_path)
        )
        assert before == after


def test_status_tells_what_stands(call: Caller, finished: Project) -> None:
    arguments = ("--recipe", str(finished.path), "--home", str(finished.home.root))
    done = call("status", *arguments)
    assert done.returncode == 0, done.stderr
    shards = len(finished.home.shards()) + 1
    (line,) = [row for row in done.stdout.splitlines() if " raw_corpus " in row]
    assert f"{shards} of {shards}" in line
    assert "reference/report" in done.stdout


RUN = """
import sys
from commands import cli
if __name__ == "__main__":
    code = cli.call(sys.argv[1:])
    print({"torch", "transformers.modeling_utils"} & sys.modules.keys())
    sys.exit(code)
"""


def test_run_ends_with_the_comparison_and_where_things_lie(
    finished: Project, tmp_path: Path
) -> None:
    """Its own process loads neither torch nor transformers' models."""
    project = copy_of(finished, tmp_path)
    for asset in ("report", "color_tau4/evaluation"):
        shutil.rmtree(project.home.artifacts / "reference" / asset)
    arguments = "--recipe", str(project.path), "--home", str(project.home.root)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, "run", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "color_tau4" in done.stdout
    assert "probe_auc" in done.stdout
    for what in ("report.html", "scores.duckdb", "results.duckdb", "filtered_dataset"):
        assert what in done.stdout
    assert "set()" in done.stdout.splitlines()


def test_a_backup_is_restored_to_another_home(
    call: Caller, finished: Project, tmp_path: Path
) -> None:
    folder, home = str(tmp_path / "backup"), str(tmp_path / "home")
    made = len({entry["path"] for entry in finished.ledger()})
    for verb, place, there in (
        ("backup", str(finished.home.root), 0),
        ("backup", str(finished.home.root), made),
        ("restore", home, 0),
    ):
        done = call(verb, folder, "--home", place)
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.strip().splitlines()
        assert line.startswith(f"{made - there} artifacts copied, {there} already there; ")
        assert not done.stderr.strip()
    shown = [
        call("status", "--recipe", str(finished.path), "--home", place).stdout
        for place in (str(finished.home.root), home)
    ]
    assert shown[0] == shown[1]


def test_what_cannot_be_backed_up_or_restored_is_told_in_a_line(
    call: Caller, finished: Project, tmp_path: Path
) -> None:
    home = str(finished.home.root)
    (tmp_path / "file").write_text("in the way")
    for arguments, why in (
        (("backup", f"{home}/backup", "--home", home), "is inside the home"),
        (("backup", str(tmp_path), "--home", home), "is not empty and not a backup"),
        (("backup", str(tmp_path / "file"), "--home", home), "File exists"),
        (("restore", str(tmp_path), "--home", str(tmp_path / "new")), "is not a backup"),
    ):
        done = call(*arguments)
        assert done.returncode == 2, done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert why in line


def test_select_says_what_would_change_and_then_does_it(
    call: Caller, finished: Project, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path)
    where = ("--recipe", str(project.path), "--home", str(project.home.root))
    before = len(project.ledger())
    asked = call("select", "--domain", "reference", "--tau", "3", "--dry-run", *where)
    assert asked.returncode == 0, asked.stderr
    facts = dict(line.rsplit(maxsplit=1) for line in asked.stdout.splitlines() if line.strip())
    assert facts["arm"] == "color_tau3"
    assert int(facts["leaving"]) == 0  # the best third holds the best quarter
    assert int(facts["entering"]) > 0
    assert facts["overlap"] == "1.0000"
    assert len(project.ledger()) == before
    done = call("select", "--domain", "reference", "--tau", "3", *where)
    assert done.returncode == 0, done.stderr
    made = ArtifactStore(home=str(project.home.root)).current("reference/color_tau3/selection")
    assert made.facts["selected"] == int(facts["selected"])
    wrong = call("select", "--domain", "nowhere", "--tau", "3", *where)
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == (
        "error: domain: the recipe has no domain 'nowhere'; give one of reference"
    )


def test_explain_tells_a_person_or_a_program_and_writes_nothing(
    call: Caller, finished: Project
) -> None:
    where = ("--recipe", str(finished.path), "--home", str(finished.home.root))
    made = ArtifactStore(home=str(finished.home.root)).current("reference/color_tau4/selection")
    best = pl.read_parquet(made.path / "selection.parquet").row(0, named=True)
    before = len(finished.ledger())
    place = f"{best['shard']}:{best['position']}"
    told = call("explain", place, *where)
    assert told.returncode == 0, told.stderr
    assert f"color {best['color']:+.4f}" in told.stdout
    assert f"1 of {made.facts['selected']:,}" in told.stdout
    facts = json.loads(call("explain", place, "--json", *where).stdout)
    (score,) = facts["sequence"]["standing"]["scores"]
    assert (score["color"], score["rank"]) == (best["color"], 1)
    doc_id = facts["sequence"]["spans"][0]["doc_id"]
    for what, words in (
        (doc_id, f"document {doc_id}, shard {best['shard']}: corpus"),
        ("reference/color_tau4", "This is the first dataset of its arm"),
    ):
        told = call("explain", what, *where)
        assert told.returncode == 0, told.stderr
        assert words in told.stdout
    wrong = call("explain", "0123456789", *where)
    assert wrong.returncode == 2
    (line,) = wrong.stderr.splitlines()
    assert line.startswith("error: doc_id 0123456789: no document")
    assert len(finished.ledger()) == before


def test_prune_says_what_it_would_remove_and_asks(finished: Project, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path)
    where = ("--recipe", str(project.path), "--home", str(project.home.root))
    left = project.home.artifacts / "prior_model" / ("0" * 16)
    left.mkdir()
    (left / "half").write_bytes(b"x" * 1_000_000)
    asked = colorfilter("prune", *where)  # nobody is there to say yes
    assert asked.returncode == 1
    assert "unfinished" in asked.stdout
    assert "Remove 1 folders, 1.0 MB?" in asked.stdout
    assert left.exists()
    done = colorfilter("prune", "--yes", *where)
    assert done.returncode == 0, done.stderr
    assert "removed 1 folders, 1.0 MB" in done.stdout
    assert not left.exists()
    assert "nothing to remove" in colorfilter("prune", *where).stdout


@pytest.mark.parametrize("verb", ["run", "select", "cost", "status", "explain", "prune", "ui"])
def test_help_says_what_a_command_takes(call: Caller, verb: str) -> None:
    done = call(verb, "--help")
    assert done.returncode == 0
    assert "--recipe" in done.stdout
    assert "--home" in done.stdout
