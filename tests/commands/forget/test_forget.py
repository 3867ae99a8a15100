"""Forgetting a document removes every trace of it and changes nothing else."""

import contextlib
import itertools
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import duckdb
import numpy as np
import polars as pl
import pytest

from colorfilter.data.redaction import Forgotten
from colorfilter.errors import InputError, UnreachableError
from colorfilter.storage import manifest
from colorfilter.storage.files import lock
from colorfilter.storage.remote import names
from colorfilter.storage.staging import RemoteStaging
from colorfilter.training.schedule import training_order
from commands.backup.backup import back_up, restore
from commands.forget import artifacts, history
from commands.forget.forget import forget as take_out
from commands.forget.forget import look_up
from pipelines.settings import Job
from resources.artifacts import ArtifactStore
from resources.gpu import Gpu
from resources.ledger import Ledger
from tests.commands.audit.tampering import audited, lines
from tests.commands.forget.traces import letters, pieces, telling
from tests.conftest import Project
from tests.program import colorfilter

ARM = "reference/color_tau4"


@pytest.fixture
def project(movable: Project) -> Project:
    """The finished project, its runs' history with it."""
    return movable


def store(project: Project) -> ArtifactStore:
    return ArtifactStore(home=str(project.home.root))


def documents(project: Project) -> pl.DataFrame:
    """The corpus's documents, each with its shard."""
    entries = store(project).entries()
    return pl.concat(
        pl.read_parquet(project.home.root / e["path"] / "documents.parquet").with_columns(
            shard=pl.lit(partition)
        )
        for (asset, partition), e in sorted(entries.items(), key=str)
        if asset == "raw_corpus"
    )


def own_pieces(project: Project, sha256: str) -> set[str]:
    """Pieces of a text that no other text of the home has."""
    rows = documents(project).select("sha256", "text").unique("sha256")
    domain = project.home.artifacts / "reference" / "domain_text"
    others = [pl.read_parquet(f, columns=["sha256", "text"]) for f in domain.rglob("documents.*")]
    texts = pl.concat([rows, *others]).rows()
    (mine,) = {text for sha, text in texts if sha == sha256}
    own = pieces(letters(mine))
    for sha, text in texts:
        if sha != sha256:
            own -= pieces(letters(text))
    assert len(own) > 20
    return own


def rows_of(project: Project, name: str = ARM) -> pl.DataFrame:
    path = store(project).current(f"{name}/filtered_dataset").path
    return pl.read_parquet(path / "tokens" / "sequences.parquet")


def carrying(project: Project, doc_id: str, shard: str) -> list[int]:
    """Positions of the sequences that carry a document."""
    with duckdb.connect(str(project.home.scores), read_only=True) as connection:
        query = "SELECT DISTINCT position FROM spans WHERE shard = ? AND doc_id = ? ORDER BY 1"
        return [p for (p,) in connection.execute(query, [shard, doc_id]).fetchall()]


def selected_documents(project: Project) -> Iterator[dict]:
    """Documents of the color arm's dataset, the longest first, with their sequences."""
    rows = rows_of(project)
    for row in documents(project).sort("n_chars", descending=True).iter_rows(named=True):
        positions = carrying(project, row["doc_id"], row["shard"])
        mine = rows.filter(pl.col("shard") == row["shard"], pl.col("position").is_in(positions))
        if len(mine) and not row["shard"].startswith("_"):
            yield {**row, "positions": positions}


def selected_document(project: Project) -> dict:
    return next(selected_documents(project))


def models_that_reached(project: Project, document: dict) -> set[str]:
    """Target models whose order of training comes to a sequence of a document."""
    found = set()
    for entry in store(project).entries().values():
        if entry["asset"].endswith("/target_model"):
            rows = rows_of(project, entry["asset"].removesuffix("/target_model"))
            here = pl.col("shard") == document["shard"]
            mine = rows.filter(here, pl.col("position").is_in(document["positions"]))["row"]
            order = training_order(entry["seed"], len(rows)).tolist()
            if {order.index(row) for row in mine} & set(range(max(entry["recipe"]["endpoints"]))):
                found.add(f"{entry['asset']}[{entry['partition']}]")
    return found


def forget(project: Project, what: str) -> None:
    surveys = look_up(project.home, [what])
    take_out(project.home, surveys, Gpu(home=str(project.home.root)))


def explained(project: Project, what: str) -> dict:
    arguments = "--json", "--recipe", str(project.path), "--home", str(project.home.root)
    return json.loads(colorfilter("explain", what, *arguments).stdout)


def test_a_selected_document_leaves_nothing_behind(project: Project) -> None:
    gone, next_ = itertools.islice(selected_documents(project), 2)
    own = own_pieces(project, gone["sha256"])
    told = {path.name for path in telling(project.home.root, own)}
    assert {"tokens.npy", "documents.parquet"} <= told
    learned = models_that_reached(project, gone)
    learned_next = models_that_reached(project, next_)
    before, scored = documents(project), len(project.kernel_runs())
    tokens = {
        p: np.load(store(project).current("corpus_tokens", p).path / "tokens.npy")
        for asset, p in store(project).entries()
        if asset == "corpus_tokens"
    }
    last = rows_of(project)

    done = colorfilter(
        *("forget", gone["doc_id"], "--yes", "--recipe", str(project.path)),
        *("--home", str(project.home.root)),
    )
    assert done.returncode == 0, done.stderr
    assert telling(project.home.root, own) == []
    assert gone["source_file"] in done.stdout
    said = set(re.findall(r"trained on it: (\S+)", done.stdout))
    assert said == learned
    assert learned

    assert len(project.kernel_runs()) == scored  # nothing was scored again
    entered = [e["path"] for e in project.ledger() if e.get("replaces") or e.get("removed")]
    assert sorted(entered) == sorted(set(entered))
    after = documents(project)
    others = pl.col("doc_id") != gone["doc_id"]
    assert after.filter(others).equals(before.filter(others))
    for shard, was in tokens.items():
        now = np.load(store(project).current("corpus_tokens", str(shard)).path / "tokens.npy")
        changed = np.flatnonzero((now != was).any(1)).tolist()
        assert changed == (gone["positions"] if shard == gone["shard"] else [])
    kept = rows_of(project)
    places = set(kept.select("shard", "position").rows())
    withdrawn = {(gone["shard"], position) for position in gone["positions"]}
    assert not places & withdrawn
    had = set(last.select("shard", "position").rows())
    assert had - places <= withdrawn  # and nothing else left
    with duckdb.connect(str(project.home.scores), read_only=True) as connection:
        query = "SELECT shard, position FROM excluded WHERE reason = 'forgotten'"
        assert set(connection.execute(query).fetchall()) == withdrawn

    held = audited(project, again=True, sample=5)
    assert [str(f) for f in held.findings if not f.warning] == []
    warned = {f.asset for f in held.findings if "which was forgotten" in f.expected}
    assert warned == learned
    # The datasets that they trained on are gone, and it is known all the same.
    (found,) = look_up(project.home, [next_["doc_id"]])
    assert {name for name, _ in found.learned} == learned_next
    document = explained(project, gone["doc_id"])["document"]
    change = explained(project, ARM)
    assert change["leaving"] == [
        {"why": "it contained a document that was forgotten", "sequences": len(withdrawn & had)}
    ]
    assert {c["why"] for c in change["entering"]} <= {"other candidates beside it"}
    assert [d["name"] for d in change["inputs"]] == [f"forgotten[{gone['sha256'][:20]}]"]
    assert document["became"].startswith("forgotten: ")
    assert document["text"] == ""


def test_a_document_of_d_prior_taught_every_model(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the copies that a cluster has of what holds it go as well."""
    plan = store(project).current("sample_plan")
    gone = pl.read_parquet(plan.path / "documents.parquet").sort("n_chars").row(-1, named=True)
    own = own_pieces(project, gone["sha256"])
    (found,) = look_up(project.home, [f"{gone['source_file']}:{gone['source_line']}"])
    models = [e for e in project.ledger() if {"checkpoint", "checkpoints"} & e["facts"].keys()]
    taught = {(e["asset"], e["fingerprint"]) for e in models if "target" not in e["asset"]}
    taught.add(("tokenizer", store(project).current("tokenizer").fingerprint))
    of_plan = {(name.partition("[")[0], made) for name, made in found.learned}
    assert taught <= of_plan
    root, storage = project.home.root, str(tmp_path / "shared")
    shared = RemoteStaging(root, f"{storage}/{project.home.identity()}")
    copies = [shared.share(root / held.path) for held in found.holdings]
    gathered = store(project).current("prior_model").path / "gathered"  # as for a sample's losses
    gathered.mkdir()
    (gathered / "tokens.npy").touch()
    copies.append(shared.share(gathered))
    shutil.rmtree(gathered)
    assert all(names(copy) for copy in copies)
    (tmp_path / "away").touch()
    with pytest.raises(UnreachableError, match="cannot write to"):
        take_out(
            project.home,
            [found],
            Gpu(home=str(root), backend="ray", storage=str(tmp_path / "away")),
        )
    project.home.refuse_exclusive()  # nothing was begun
    take_out(project.home, [found], Gpu(home=str(root), backend="ray", storage=storage))
    assert not any(names(copy) for copy in copies)
    assert telling(root, own) == []
    assert lines(project) == []

    assert project.run(monkeypatch, Job.RETRAIN) is None
    drawn = pl.read_parquet(store(project).current("sample_plan").path / "documents.parquet")
    assert gone["sha256"] not in drawn["sha256"].to_list()
    now = audited(project)
    assert [str(f) for f in now.findings if not f.warning] == []
    warned = {f.asset.partition("[")[0] for f in now.findings if "forgotten" in f.expected}
    # What `evaluate` makes anew.
    assert {asset.rpartition("/")[2] for asset in warned} == {"target_model", "cutoff_confidence"}


def test_text_of_a_domain(project: Project) -> None:
    text = store(project).current("reference/domain_text").path
    largest = {
        split: pl.read_parquet(text / split / "documents.parquet")
        .sort("n_chars")
        .row(-1, named=True)
        for split in ("down", "held_out", "probe")
    }
    own = set().union(*(own_pieces(project, row["sha256"]) for row in largest.values()))
    surveys = look_up(project.home, [row["doc_id"] for row in largest.values()])
    learned = [{name for name, _ in found.learned} for found in surveys]
    of_down = {"reference/conditional_model", "reference/cutoff_confidence[conditional]"}
    assert learned == [of_down, set(), set()]
    take_out(project.home, surveys, Gpu(home=str(project.home.root)))
    assert telling(project.home.root, own) == []
    assert lines(project) == []


def test_copies_go_too_and_are_not_read_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = selected_document(project)
    own = own_pieces(project, gone["sha256"])

    def write(name: str) -> Path:
        path = project.root / "corpus" / name
        texts = [
            *[gone["text"]] * 2,
            *(f"number {i} of what {name} brings " * 9 for i in range(40)),
        ]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    twin = project.root / "elsewhere" / "twin.jsonl"
    twin.parent.mkdir()
    twin.write_text(json.dumps({"text": "what stands elsewhere alone " * 30}) + "\n")
    more = {"name": "more", "files": str(twin)}
    project.facts["corpus"]["sources"].append(more)
    project.write()
    surveys = look_up(project.home, [gone["doc_id"]])
    copy = write("twin.jsonl")
    assert project.run(monkeypatch, Job.REFRESH) is None
    with pytest.raises(InputError, match=r"several documents .*twin\.jsonl:1; .*twin\.jsonl:1"):
        artifacts.find(store(project), "twin.jsonl:1")
    (found,) = look_up(project.home, [f"{copy}:1"])
    assert found.document.places == {f"{copy}:1", f"{gone['source_file']}:{gone['source_line']}"}
    # Looked up before the copy was read.
    take_out(project.home, surveys, Gpu(home=str(project.home.root)))
    assert telling(project.home.root, own) == []

    again = write("again.jsonl")
    assert project.run(monkeypatch, Job.REFRESH) is None
    assert telling(project.home.root, own) == []
    (shard,) = documents(project).filter(pl.col("source_file") == str(again))["shard"].unique()
    rejects = pl.read_parquet(store(project).current("raw_corpus", shard).path / "rejects.parquet")
    assert rejects.select("source_line", "reason", "excerpt").rows() == [
        (1, "forgotten", ""),
        (2, "forgotten", ""),
    ]
    assert lines(project) == []


def test_what_still_shows_it_is_refused_until_it_is_gone(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "BUSY", 0.2)
    gone = selected_document(project)
    own = own_pieces(project, gone["sha256"])
    index = project.home.dagster / "history" / "runs" / "index.db"
    with contextlib.closing(sqlite3.connect(index)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM event_logs").fetchone()
        with pytest.raises(InputError, match=r"index\.db: in use.* stop the web UI and run"):
            forget(project, gone["doc_id"])
    notes = project.home.root / "notes.txt"
    notes.write_text(gone["text"])
    for _ in range(2):  # the text is still known the second time
        with pytest.raises(InputError, match=r"notes\.txt: still shows the text; delete it"):
            forget(project, gone["doc_id"])
    notes.unlink()
    forget(project, gone["doc_id"])
    assert telling(project.home.root, own) == []
    assert lines(project) == []


def test_losses_of_a_damaged_artifact_are_kept(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that lost its manifest, what was scored is not scored again."""
    gone = selected_document(project)
    shard = next(s.name for s in project.home.shards() if s.name != gone["shard"])
    losses = store(project).current("prior_scores", shard).path
    (losses / "manifest.json").unlink()
    chunks = sorted(losses.glob("losses-*.parquet"))
    scored = len(project.kernel_runs())
    forget(project, gone["doc_id"])
    assert sorted(losses.glob("losses-*.parquet")) == chunks
    assert project.run(monkeypatch, Job.REFRESH) is None
    assert len(project.kernel_runs()) == scored
    assert store(project).current("prior_scores", shard).path == losses


class KilledError(BaseException):
    """Ends what it is raised in as a kill does."""


def test_killed_at_any_step_it_goes_on(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = selected_document(project)
    own = own_pieces(project, gone["sha256"])
    losses = project.home.artifacts / "prior_scores" / "some" / ("0" * 16) / "losses-1.parquet"
    unfinished = project.home.artifacts / "prior_model" / ("1" * 16) / "d_prior" / "spans.parquet"
    for path in (losses, unfinished):
        path.parent.mkdir(parents=True)
        path.write_text("cut off")
    steps = 0
    allowed = 0

    def counted(function):
        def step(*arguments, **named):
            nonlocal steps
            steps += 1
            if steps > allowed:
                raise KilledError
            return function(*arguments, **named)

        return step

    for owner, name in (
        (artifacts, "write_redacted"),
        (manifest, "write_manifest"),
        (os, "fsync"),
        (Ledger, "append"),
        (Path, "unlink"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    killed = 0
    while True:
        steps = 0
        try:
            forget(project, gone["doc_id"])
            break
        except KilledError:
            killed += 1
            allowed += 1
            if killed == 5:  # meanwhile nothing runs that could take it up again
                steps = -1_000
                with pytest.raises(
                    InputError, match=r"`colorfilter forget .*` is at work or was interrupted"
                ):
                    project.run(monkeypatch, Job.REFRESH)
                # Nor a run of the web UI, whose process begins with its resources.
                context = SimpleNamespace(run=SimpleNamespace(run_id="of-the-ui"))
                with pytest.raises(
                    InputError, match=r"`colorfilter forget .*` is at work or was interrupted"
                ):
                    store(project).setup_for_execution(context)  # type: ignore[arg-type]
                with pytest.raises(
                    InputError, match=r"`colorfilter forget .*` is at work or was interrupted"
                ):
                    back_up(project.home, project.root / "backup", lambda _done, _total: None)
    monkeypatch.undo()
    assert losses.exists()
    assert not unfinished.exists()
    losses.unlink()
    assert killed > 10
    assert telling(project.home.root, own) == []
    found = audited(project)
    assert [str(f) for f in found.findings if not f.warning] == []


def test_the_audit_finds_what_came_back(project: Project) -> None:
    gone = selected_document(project)
    raw = store(project).current("raw_corpus", gone["shard"]).path
    before = project.root / "before"
    shutil.copytree(raw, before)
    forget(project, gone["doc_id"])
    shutil.copytree(before, raw)
    back = r"raw_corpus/\S+: \S+: expected no folder: it was replaced"
    assert any(re.match(back, line) for line in lines(project))
    shutil.rmtree(raw)
    raw = store(project).current("raw_corpus", gone["shard"]).path
    shutil.copy(before / "documents.parquet", raw)
    name = re.escape(f"raw_corpus[{gone['shard']}]")
    assert any(re.match(f"{name}: .*documents.parquet: .*sha256", line) for line in lines(project))
    shutil.copy(before / "manifest.json", raw)
    there = lines(project)
    assert any(re.match(f"{name}: .*manifest.json: expected the sha256", line) for line in there)
    assert any(re.match(f"{name}: .*documents.parquet: .*was forgotten", line) for line in there)


def test_a_backup_forgets_with_its_home(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = selected_document(project)
    own = own_pieces(project, gone["sha256"])
    backup = tmp_path / "backup"
    # A dataset that nobody looks through in the home, for it is pruned there.
    project.facts["filtered"] = {"whole_documents_from": 0.2}
    project.write()
    assert project.run(monkeypatch, Job.RESELECT) is None
    whole = store(project).current(f"{ARM}/filtered_dataset").path
    back_up(project.home, backup, lambda _done, _total: None)
    del project.facts["filtered"]
    project.write()
    assert project.run(monkeypatch, Job.RESELECT) is None
    shutil.rmtree(whole)
    assert any(whole.name in path.parts for path in telling(backup, own))
    forget(project, gone["doc_id"])
    back_up(project.home, backup, lambda _done, _total: None)
    assert telling(backup, own) == []
    (tmp_path / "restored").mkdir()
    other = Project(tmp_path / "restored", project.facts)
    restore(backup, other.home, lambda _done, _total: None)
    assert telling(other.home.root, own) == []
    assert lines(other) == []


def test_what_the_web_ui_has_shown_of_it_goes(project: Project) -> None:
    shown = pl.read_parquet(store(project).current(f"{ARM}/selection").path / "samples.parquet")
    rows = documents(project).join(shown, on="doc_id", how="semi").sort("n_chars")
    row = rows.row(-1, named=True)
    own = own_pieces(project, row["sha256"])
    assert any(path.suffix == ".db" for path in telling(project.home.root, own))
    forget(project, row["doc_id"])
    assert telling(project.home.root, own) == []
    for database in project.home.dagster.rglob("*.db"):
        with sqlite3.connect(database) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert lines(project) == []


def test_what_dagster_keeps_apart_from_runs_goes(project: Project) -> None:
    """Results of checks, logs of runs that are deleted, and errors of ticks."""
    gone = selected_document(project)
    own = own_pieces(project, gone["sha256"])
    quote = gone["text"][:400]
    dagster = project.home.dagster
    with dg.DagsterInstance.from_config(str(dagster)) as instance:
        (run,) = instance.get_runs(limit=1)
        kept = len(instance.get_runs())
        for text in (quote, "nothing of it"):
            result = dg.AssetCheckEvaluation(
                asset_key=dg.AssetKey("raw_corpus"),
                check_name=f"quotes_{len(text)}",
                passed=False,
                description=text,
                metadata={},
            )
            instance.report_runless_asset_event(result)
    log = dagster / "storage" / run.run_id / "compute_logs" / "step.err"
    log.parent.mkdir(parents=True)
    log.write_text(f"Traceback: {quote!r}")
    of_nobody = dagster / "logs" / "event.log"
    of_nobody.parent.mkdir(exist_ok=True)
    of_nobody.write_text(quote)
    ticks = dagster / "schedules" / "schedules.db"
    with contextlib.closing(sqlite3.connect(ticks)) as connection, connection:
        columns = "(job_origin_id, selector_id, status, type, tick_body)"
        tick = "'a', 'b', 'FAILURE', 'SENSOR'"
        for error in (quote, "another error"):
            query = f"INSERT INTO job_ticks {columns} VALUES ({tick}, ?)"
            connection.execute(query, [json.dumps({"error": {"message": error}})])
        connection.execute("CREATE TABLE without_key (number INTEGER, words TEXT)")
        connection.executemany(
            "INSERT INTO without_key VALUES (?, ?)", [(1, quote), (1, None), (None, "another")]
        )
    told = {path.name for path in telling(project.home.root, own) if dagster in path.parents}
    assert told >= {"index.db", "schedules.db", "step.err", "event.log"}
    forget(project, gone["doc_id"])
    assert telling(project.home.root, own) == []
    assert not log.parent.exists()
    with contextlib.closing(sqlite3.connect(ticks)) as connection:
        kept_ticks = connection.execute("SELECT tick_body FROM job_ticks").fetchall()
        others = connection.execute("SELECT * FROM without_key")
        assert others.fetchall() == [(1, None), (None, "another")]
    assert kept_ticks == [('{"error": {"message": "another error"}}',)]
    with dg.DagsterInstance.from_config(str(dagster)) as instance:
        checks = instance.event_log_storage
        key = dg.AssetCheckKey(dg.AssetKey("raw_corpus"), "quotes_13")
        assert checks.get_asset_check_execution_history(key, limit=5)
        assert len(instance.get_runs()) < kept
    assert lines(project) == []


def test_a_large_file_is_searched_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "BLOCK", 100)
    monkeypatch.setattr(artifacts, "OVERLAP", 40)
    piece = "".join(map(chr, range(65, 65 + 26)))
    gone = Forgotten("", set(), set(), piece)
    for before in range(80, 120):
        (tmp_path / f"{before}.log").write_text("." * before + piece + "." * 300)
    (tmp_path / "other.log").write_text("." * 500)
    found = list(artifacts.showing(tmp_path.iterdir(), artifacts.any_of([gone])))
    assert found == sorted(tmp_path.glob("[0-9]*"))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("abcdef0123", "abcdef0123: no document in this home matches"),
        ("nowhere.jsonl:3", "nowhere.jsonl:3: no document in this home matches"),
        (
            "Tom",
            "'Tom' is not the name of a document; give at least 6 digits of a doc_id, or FILE:LINE",
        ),
    ],
)
def test_what_names_no_document_is_refused(finished: Project, what: str, said: str) -> None:
    arguments = "--recipe", str(finished.path), "--home", str(finished.home.root)
    done = colorfilter("forget", what, "--yes", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_nothing_is_forgotten_while_a_run_is_at_work_or_without_consent(project: Project) -> None:
    gone = selected_document(project)["doc_id"]
    arguments = "--recipe", str(project.path), "--home", str(project.home.root)
    before = project.home.ledger.read_bytes()
    done = colorfilter("forget", gone, *arguments)  # with nobody to say yes
    assert done.returncode == 1
    with lock(project.home.run_lease("some")):
        done = colorfilter("forget", gone, "--yes", *arguments)
    assert done.returncode == 2
    assert "a run is at work" in done.stderr
    assert project.home.ledger.read_bytes() == before
