"""The audit reports every kind of tampering with files and history, in the right line."""

import hashlib
import json
import os
import re
import shutil
import urllib.request
from pathlib import Path

import polars as pl
import pytest

from colorfilter.errors import InputError
from pipelines.settings import Job
from tests.commands.audit.tampering import (
    append,
    audited,
    close,
    flip,
    folder,
    found,
    lines,
)
from tests.conftest import MODULES, Project, copy_of, recipe_facts, write_corpus
from tests.pipelines.server import serving
from tests.program import Caller


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """The finished project, to be tampered with."""
    return copy_of(finished, tmp_path)


def test_a_finished_home_holds(project: Project) -> None:
    before = sorted(project.home.root.iterdir()), len(project.kernel_runs())
    done = audited(project, again=True, sample=3)
    assert (sorted(project.home.root.iterdir()), len(project.kernel_runs())) == before
    assert done.passed
    assert [str(f) for f in done.findings] == []
    assert all(done.checked.values())
    assert (
        done.head
        == hashlib.sha256(
            project.home.ledger.read_bytes().splitlines(keepends=True)[-1]
        ).hexdigest()
    )
    assert done.artifacts == len({e["path"] for e in project.ledger()})
    assert done.rescored is not None
    shards = len(project.home.shards()) + 1  # the probe's too
    assert done.rescored.losses == 2 * 3 * shards  # by two models
    assert done.rescored.largest <= 2e-5


@pytest.mark.slow
def test_a_shard_without_a_document_and_every_method_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus", MODULES[:3])
    (tmp_path / "corpus" / "blank.jsonl").write_text("\n" * 60_000)
    facts = recipe_facts(tmp_path / "corpus")
    facts["arms"] = [
        {"method": "color", "tau": 4, "batch": 8},
        {"method": "rho_down", "tau": 4},
        {"method": "dsir"},
        {"method": "random"},
        {"method": "full"},
    ]
    facts["scoring"] = {"precision": "bf16"}
    facts["evaluation"] = {"seeds": [1], "finetune": True}
    project = Project(tmp_path, facts)
    assert project.run(monkeypatch) is None
    done = audited(project, again=True, sample=2)
    assert done.passed, [str(f) for f in done.findings]
    told = [f.asset for f in done.findings]
    assert sorted(told) == ["reference/dsir/selection", "reference/rho_down_tau4/selection"]


# Files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asset", "file"),
    [
        ("corpus_tokens", "tokens.npy"),
        ("prior_model", "**/model.safetensors"),
        ("raw_corpus", "documents.parquet"),
        ("prior_scores", "losses-*.parquet"),
        ("reference/color_tau4/selection", "selection.parquet"),
        ("reference/color_tau4/filtered_dataset", "tokens/tokens.npy"),
        ("recipe", "recipe.yaml"),
    ],
)
def test_a_bit_is_flipped(project: Project, asset: str, file: str) -> None:
    (path,) = folder(project, asset).glob(file)
    flip(path)
    where = re.escape(f"{path.relative_to(project.home.root)}: expected ")
    there = lines(project)
    assert any(re.match(rf"{asset}.*: {where}.* bytes with the sha256", line) for line in there)


def test_a_file_is_deleted_or_brought_in(project: Project) -> None:
    path = folder(project, "tokenizer") / "tokenizer.json"
    path.unlink()
    (path.parent / "more.json").write_text("{}")
    found(
        project,
        r"^tokenizer: .*tokenizer.json: expected a file of [\d,]+ bytes, found none$",
        r"^tokenizer: .*more.json: expected no file that is not in the manifest, found one$",
    )


def test_a_folder_is_deleted(project: Project) -> None:
    shutil.rmtree(folder(project, "reference/domain_text"))
    found(
        project, r"^reference/domain_text: .*manifest.json: expected the manifest, found no file$"
    )


def test_the_prior_is_replaced_by_another_of_its_shape(project: Project) -> None:
    """With a manifest that fits it."""
    target = next(folder(project, "prior_model").glob("*/model.safetensors"))
    flip(target)
    close(folder(project, "prior_model"))
    found(
        project,
        r"^prior_model: .*manifest.json: expected the sha256 \w{16}, found",
        r"^prior_model: .*manifest.json: expected files with the fingerprint \w{16}, found",
    )


def test_what_is_replaced_and_taken_up_again_is_found(project: Project) -> None:
    place = folder(project, "reference/domain_text")
    lower = pl.col("text").str.to_lowercase()
    documents = place / "held_out" / "documents.parquet"
    pl.read_parquet(documents).with_columns(lower).write_parquet(documents)
    entry = next(e for e in project.ledger() if e["asset"] == "reference/domain_text")
    append(project, {**entry, "reused": True, **close(place)})
    assert any(
        re.match(r"reference/domain_text: line \d+ of the ledger: .* that was built", line)
        for line in lines(project)
    )


def test_a_raw_file_is_changed_or_gone(
    movable: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path / "corpus").iterdir():
        os.utime(path, (1, 1))
    assert movable.run(monkeypatch, Job.REFRESH) is None  # it is read where it lies now
    changed, gone = (tmp_path / "corpus" / f"{name}.jsonl" for name in MODULES[:2])
    flip(changed)
    gone.unlink()
    done = audited(movable)
    assert not done.passed
    told = {str(f) for f in done.findings}
    assert any(re.match(rf"raw_corpus\S+: {changed}: expected .* with the sha256", s) for s in told)
    assert any(re.match(rf"raw_corpus\S+: {gone}: expected .*No such file", s) for s in told)
    assert len(told) == 2


@pytest.mark.slow
def test_what_a_changed_file_was_and_a_recipe_that_came_back_are_no_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that was retired, artifacts taken up again by another recipe."""
    write_corpus(tmp_path / "corpus", MODULES[:4])
    facts = recipe_facts(tmp_path / "corpus")
    facts["target"]["training_tokens"] = 800
    project = Project(tmp_path, facts)
    assert project.run(monkeypatch) is None
    for tau in (3, 4):
        project.facts["arms"][0]["tau"] = tau
        project.facts["refresh"] = {"stale_after_hours": tau}
        project.write()
        assert project.run(monkeypatch) is None
    (tmp_path / "corpus" / f"{MODULES[0]}.jsonl").write_text('{"text": "changed"}\n' * 2)
    assert project.run(monkeypatch) is None
    done = audited(project, again=True)
    assert [str(f) for f in done.findings if not f.warning] == []
    changed, of_an_arm_that_was = done.findings
    assert changed.artifact.endswith(f"{MODULES[0]}.jsonl")
    assert of_an_arm_that_was.asset == "reference/color_tau3/selection"


BREAKABLE = ["files", "evaluations", "selection", "scores.duckdb", "results.duckdb"]


@pytest.mark.parametrize("broken", BREAKABLE)
def test_what_cannot_be_read_is_told_among_the_rest(project: Project, broken: str) -> None:
    places = {
        "files": "raw_corpus",
        "evaluations": "reference/report",
        "selection": "reference/color_tau4/selection",
    }
    path = project.home.root / broken
    if broken in places:
        path = folder(project, places[broken]) / f"{broken}.parquet"
    path.write_bytes(b"broken")
    done = audited(project, again=True)
    assert not done.passed
    told = "\n".join(map(str, done.findings))
    assert broken in told


# Dagster's history -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_materialization_is_forged_through_the_web_server(project: Project) -> None:
    asset = "reference/color_tau4/filtered_dataset"
    with serving(project.path, project.home.root) as server:
        request = urllib.request.Request(
            f"{server.address}/report_asset_materialization/{asset}",
            json.dumps({"data_version": "forged"}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            assert response.status == 200
    found(
        project,
        rf"^{asset}: materialization of \S+ in Dagster's history: "
        "expected the run that produced it, found none: it was reported from outside$",
    )


@pytest.mark.parametrize("head", ["", "0", "abcdefg", "main"])
def test_what_is_no_head_is_refused(finished: Project, head: str) -> None:
    with pytest.raises(InputError, match="is not a sha256; give at least 8 hex digits of it"):
        audited(finished, head=head)


def test_dagsters_history_is_wiped(project: Project) -> None:
    for path in project.home.dagster.iterdir():
        if path.name != "dagster.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = audited(project)
    assert done.passed
    (told,) = done.findings
    assert re.match(
        r"dagster: its history: expected events of the \d+ .*, found none of \d+$", str(told)
    )


# The command -----------------------------------------------------------------------------------


def test_the_command_says_what_does_not_hold(
    call: Caller, project: Project, tmp_path: Path
) -> None:
    where = "--recipe", str(project.path), "--home", str(project.home.root)
    page = tmp_path / "audit.html"
    done = call("audit", *where, "--html", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no problems found" in done.stdout
    assert "No problems found." in page.read_text()
    flip(folder(project, "tokenizer") / "tokenizer.json")
    done = call("audit", *where, "--json", "reference/color_tau4/target_model[seed_1]")
    assert done.returncode == 1
    facts = json.loads(done.stdout)
    assert not facts["passed"]
    (told,) = [f for f in facts["findings"] if not f["warning"]]
    assert told["asset"] == "tokenizer"
    assert told["artifact"].endswith("tokenizer.json")
    done = call("audit", *where, "nothing")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: nothing: not an artifact of this home; give a folder, or one of"
    )
