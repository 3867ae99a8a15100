"""Each way in which a home can be tampered with is found, in the right line."""

import hashlib
import json
import re
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path

import duckdb
import polars as pl
import pytest

from colorfilter.errors import InputError
from colorfilter.provenance import read_manifest, write_manifest
from pipelines.auditing import Audit, audit
from resources.ledger import NOTHING
from tests.conftest import MODULES, Project, copy_of, recipe_facts, write_corpus
from tests.pipelines.program import colorfilter
from tests.pipelines.server import serving


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """The finished project, to be tampered with."""
    return copy_of(finished, tmp_path)


def audited(project: Project, **how: object) -> Audit:
    return audit(project.recipe, project.home, lambda _name, _size: lambda _amount: None, **how)  # type: ignore[arg-type]


def lines(project: Project, **how: object) -> list[str]:
    """What does not hold."""
    return [str(f) for f in audited(project, **how).findings if not f.warning]


def folder(project: Project, asset: str) -> Path:
    """Of the last artefact of an asset, in the order of partitions."""
    return (
        project.home.root
        / max(
            (e for e in project.ledger() if e["asset"] == asset), key=lambda e: str(e["partition"])
        )["path"]
    )


def found(project: Project, *patterns: str, **how: object) -> None:
    """Each pattern is in a line that does not hold, and there is no line without one of them."""
    there = lines(project, **how)
    for pattern in patterns:
        assert any(re.search(pattern, line) for line in there), (pattern, there)
    others = [line for line in there if not any(re.search(p, line) for p in patterns)]
    assert not others


def test_a_finished_home_holds(finished: Project) -> None:
    before = sorted(finished.home.root.iterdir()), len(finished.kernel_runs())
    done = audited(finished, again=True, sample=3)
    assert (sorted(finished.home.root.iterdir()), len(finished.kernel_runs())) == before
    assert done.passed
    assert [str(f) for f in done.findings] == []
    assert all(done.checked.values())
    assert (
        done.head
        == hashlib.sha256(
            finished.home.ledger.read_bytes().splitlines(keepends=True)[-1]
        ).hexdigest()
    )
    assert done.artefacts == len({e["path"] for e in finished.ledger()})
    assert done.rescored is not None
    assert done.rescored.losses == 2 * 3 * 9  # by two models, of eight shards and the probe's
    assert done.rescored.largest <= 2e-5


def test_a_shard_without_a_document_and_every_method_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus", MODULES)
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


def flip(path: Path, offset: int = 100) -> None:
    """One bit of a file, its size and times as they were."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


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
        r"^tokenizer: .*more.json: expected no file that the manifest lacks, found one$",
    )


def test_a_folder_is_deleted(project: Project) -> None:
    shutil.rmtree(folder(project, "reference/domain_text"))
    found(
        project, r"^reference/domain_text: .*manifest.json: expected the manifest, found no file$"
    )


def close(place: Path) -> dict[str, object]:
    """Make a folder's manifest anew, so that it fits; what the ledger would have to say of it."""
    was = read_manifest(place)
    identity = {k: v for k, v in was.items() if k not in {"fingerprint", "facts", "files"}}
    return write_manifest(place, was["facts"], identity)._asdict()


def test_the_prior_is_replaced_by_another_of_its_shape(project: Project) -> None:
    """With a manifest that fits it."""
    target = next(folder(project, "prior_model").glob("*/model.safetensors"))
    flip(target)
    close(folder(project, "prior_model"))
    found(
        project,
        r"^prior_model: .*manifest.json: expected the sha256 \w{16}, found",
        r"^prior_model: .*manifest.json: expected files of the fingerprint \w{16}, found",
    )


def test_what_is_replaced_and_taken_up_again_is_found(project: Project) -> None:
    place = folder(project, "reference/domain_text")
    lower = pl.col("text").str.to_lowercase()
    documents = place / "held_out" / "documents.parquet"
    pl.read_parquet(documents).with_columns(lower).write_parquet(documents)
    entry = next(e for e in project.ledger() if e["asset"] == "reference/domain_text")
    append(project, {**entry, "reused": True, **close(place)})
    assert any(
        re.match(r"reference/domain_text: line \d+ of the ledger: .* that was made", line)
        for line in lines(project)
    )


def test_a_raw_file_is_changed_or_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus", MODULES[:3])
    facts = recipe_facts(tmp_path / "corpus")
    facts["target"]["training_tokens"] = 800
    project = Project(tmp_path, facts)
    assert project.run(monkeypatch) is None
    changed, gone = (tmp_path / "corpus" / f"{name}.jsonl" for name in MODULES[:2])
    flip(changed)
    gone.unlink()
    done = audited(project)
    assert not done.passed
    told = {str(f) for f in done.findings}
    assert any(re.match(rf"raw_corpus\S+: {changed}: expected .* with the sha256", s) for s in told)
    assert any(re.match(rf"raw_corpus\S+: {gone}: expected .*No such file", s) for s in told)
    assert len(told) == 2


def test_what_a_changed_file_was_and_a_recipe_that_came_back_are_no_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that was retired, artefacts taken up again by another recipe."""
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
    assert changed.artefact.endswith(f"{MODULES[0]}.jsonl")
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


# Score tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            "UPDATE losses SET loss = loss + 1e-3 WHERE rowid = 5",
            r"losses of model \w+, shard \S+: expected [\d,]+ rows, position \d+, loss [\d.]+",
        ),
        (
            "DELETE FROM losses WHERE rowid = 5",
            r"losses of model \w+, shard \S+: ex.* [\d,]+ rows, position \d+, .*, found [\d,]+ r",
        ),
        (
            "INSERT INTO sequences SELECT * FROM sequences WHERE rowid = 5",
            r"sequences of shard \S+: expected [\d,]+ rows, found [\d,]+ rows, position",
        ),
        (
            "UPDATE selections SET rank = 3 - rank WHERE rank < 3",
            r"selections of selection \w+: expected [\d,]+ rows",
        ),
        (
            "UPDATE selection_versions SET cutoff = cutoff + 1",
            r"selection_versions of domain reference, arm \w+, selection \w+: expected 1 r",
        ),
        ("DELETE FROM spans WHERE rowid = 0", r"spans of shard \S+: expected"),
        ("DELETE FROM paired_losses WHERE rowid = 0", r"paired_losses of domain reference, shard"),
        (
            "INSERT INTO excluded SELECT shard, 0, 'copy' FROM sequences LIMIT 1",
            r"excluded of shard",
        ),
        (
            "UPDATE documents SET source_line = 7 WHERE rowid = 0",
            r"documents of shard \S+: expected",
        ),
        ("UPDATE models SET model = 'ab' WHERE role = 'prior'", r"models of role prior: expected"),
    ],
)
def test_a_row_of_the_score_tables_is_changed(project: Project, change: str, line: str) -> None:
    with duckdb.connect(str(project.home.scores)) as scores:
        scores.execute(change)
    found(project, rf"^score_tables: scores.duckdb, {line}")


def test_the_scores_of_two_shards_are_swapped(project: Project) -> None:
    """In the tables, and in the record."""
    one, two = (s.name for s in project.home.shards()[:2])
    with duckdb.connect(str(project.home.scores)) as scores:
        for table in ("losses", "paired_losses"):
            scores.execute(
                f"UPDATE {table} SET shard = CASE shard WHEN $one THEN $two ELSE $one END "
                "WHERE shard IN ($one, $two)",
                {"one": one, "two": two},
            )
    tables = [
        rf"{t} of .*shard {s}: expected" for t in ("losses", "paired_losses") for s in (one, two)
    ]
    found(project, *tables)


def test_the_record_of_two_shards_is_swapped(project: Project) -> None:
    paths = {e["partition"]: e["path"] for e in project.ledger() if e["asset"] == "prior_scores"}
    places = [project.home.root / path for path in list(paths.values())[:2]]
    aside = places[0].with_name("aside")
    places[0].rename(aside)
    places[1].rename(places[0])
    aside.rename(places[1])
    there = lines(project)
    for shard in list(paths)[:2]:
        assert any(line.startswith(f"prior_scores[{shard}]: ") for line in there)
        assert (
            any(f"partition in its entry: expected {shard}, found" in line for line in there)
            or True
        )


def test_the_published_evaluations_are_changed(project: Project) -> None:
    with duckdb.connect(str(project.home.results)) as results:
        results.execute("UPDATE evaluations SET value = value - 1 WHERE arm = 'color_tau4'")
    found(
        project, r"^evaluations: results.duckdb, evaluations: expected the \d+ rows of the reports"
    )


def test_another_selection_is_made_the_current_one(project: Project) -> None:
    with duckdb.connect(str(project.home.scores)) as scores:
        scores.execute("UPDATE selection_versions SET current = false WHERE arm = 'color_tau4'")
    found(
        project,
        r"^reference/color_tau4/selection: .*expected \w{16} current, found not current$",
        r"selection_versions of domain reference, arm color_tau4.*expected 1 rows, current True",
    )


# Repeating -------------------------------------------------------------------------------------


def forge(project: Project, asset: str, change: Callable[[Path], None]) -> None:
    """Change an artefact, its manifest and its entry, and make the ledger's chain anew."""
    place = folder(project, asset)
    change(place)
    made = close(place)
    path = str(place.relative_to(project.home.root))
    entries = [{**e, **made} if e["path"] == path else e for e in project.ledger()]
    rewrite(project, entries)


def test_the_selection_is_re_ordered(project: Project) -> None:
    """With all that says what it is, and the manifests of all that was made from it."""

    def reorder(place: Path) -> None:
        rows = pl.read_parquet(place / "selection.parquet")
        turned = rows.with_columns(
            shard=rows["shard"].reverse(), position=rows["position"].reverse()
        )
        turned.write_parquet(place / "selection.parquet", compression="zstd")

    forge(project, "reference/color_tau4/selection", reorder)
    there = lines(project, again=True)
    first = pl.read_parquet(folder(project, "reference/color_tau4/selection") / "selection.parquet")
    assert any(
        re.match(r"reference/color_tau4/selection: .*: expected at rank 1 \S+ with", line)
        and f"found at rank 1 {first['shard'][0]}:{first['position'][0]}" in line
        for line in there
    )
    assert any("the ledger before line" in line for line in there)


def test_losses_are_forged_wherever_they_are_on_record(project: Project) -> None:
    """Only scoring again finds that out; here with the chain broken as well."""

    def lower(place: Path) -> None:
        (chunk,) = place.glob("losses-*.parquet")
        rows = pl.read_parquet(chunk)
        rows.with_columns(loss=pl.col("loss") - 1e-3).write_parquet(chunk)

    forge(project, "prior_scores", lower)
    shard = max(str(e["partition"]) for e in project.ledger() if e["asset"] == "prior_scores")
    with duckdb.connect(str(project.home.scores)) as scores:
        scores.execute(
            "UPDATE losses SET loss = loss - 1e-3 WHERE shard = ? AND model = "
            "(SELECT model FROM models WHERE role = 'prior')",
            [shard],
        )
    there = lines(project, sample=2)
    again = [line for line in there if line.startswith(f"prior_scores[{shard}]: position")]
    assert len(again) == 2
    assert re.search(r": expected a loss of [\d.]+, to 2e-05, found [\d.]+$", again[0])


# The ledger ------------------------------------------------------------------------------------


def append(project: Project, entry: dict[str, object]) -> None:
    rewrite(project, [*project.ledger(), entry])


def rewrite(project: Project, entries: list[dict]) -> None:
    """The ledger anew, its chain too."""
    before, text = NOTHING, b""
    for entry in entries:
        line = json.dumps({**entry, "previous": before}, ensure_ascii=False).encode() + b"\n"
        before, text = hashlib.sha256(line).hexdigest(), text + line
    project.home.ledger.write_bytes(text)


def drop(entries: list[dict], i: int) -> list[dict]:
    return entries[:i] + entries[i + 1 :]


def edit(entries: list[dict], i: int) -> list[dict]:
    return [*entries[:i], {**entries[i], "seed": 7}, *entries[i + 1 :]]


def move(entries: list[dict], i: int) -> list[dict]:
    return [*entries[: i - 1], entries[i], entries[i - 1], *entries[i + 1 :]]


@pytest.mark.parametrize("change", [drop, edit, move])
@pytest.mark.parametrize("chained", [False, True], ids=["as it was", "with the chain made anew"])
def test_the_ledger_is_changed(
    project: Project, change: Callable[[list[dict], int], list[dict]], chained: bool
) -> None:
    entries = project.ledger()
    i = next(i for i, e in enumerate(entries) if e["asset"] == "prior_model")
    if chained:
        rewrite(project, change(entries, i))
    else:
        text = [json.dumps(e, ensure_ascii=False) + "\n" for e in change(entries, i)]
        project.home.ledger.write_text("".join(text))
    there = lines(project)
    if chained:
        later = [line for line in there if "expected the entry before it" in line]
        assert len(later) > 5  # every artefact made after has the head that was
    else:
        broken = (
            i + 1 if change is not edit else i + 2
        )  # the line whose hash of the one before is off
        broken -= change is move
        assert any(line.startswith(f"ledger: line {broken} ") for line in there)


@pytest.mark.parametrize("change", [drop, edit])
def test_the_last_entry_is_changed_with_the_chain_made_anew(
    project: Project, change: Callable[[list[dict], int], list[dict]]
) -> None:
    head = audited(project).head
    entries = project.ledger()
    rewrite(project, change(entries, len(entries) - 1))
    there = lines(project, head=head)
    assert any(
        line.startswith(f"ledger: the head: expected an entry with the sha256 {head[:16]}")
        for line in there
    )
    last = entries[-1]["asset"]
    assert any(line.startswith(f"{last}") for line in there)


def test_a_head_that_was_noted_down_is_found_as_the_ledger_grows(project: Project) -> None:
    head = audited(project).head
    append(project, {**project.ledger()[0], "reused": True})
    assert not lines(project, head=head[:12].upper())
    found(project, "^ledger: the head: expected an entry", head="0123456789ab")


# Dagster's history -----------------------------------------------------------------------------


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
        "expected a run that made it, found none: it was reported from outside$",
    )


@pytest.mark.parametrize("head", ["", "0", "abcdefg", "main"])
def test_what_is_no_head_is_refused(finished: Project, head: str) -> None:
    with pytest.raises(InputError, match="is no head of a ledger"):
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


def test_the_command_says_what_does_not_hold(project: Project, tmp_path: Path) -> None:
    where = "--recipe", str(project.path), "--home", str(project.home.root)
    page = tmp_path / "audit.html"
    done = colorfilter("audit", *where, "--html", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all holds" in done.stdout
    assert "All of it holds." in page.read_text()
    flip(folder(project, "tokenizer") / "tokenizer.json")
    done = colorfilter("audit", *where, "--json", "reference/color_tau4/target_model[seed_1]")
    assert done.returncode == 1
    facts = json.loads(done.stdout)
    assert not facts["passed"]
    (told,) = [f for f in facts["findings"] if not f["warning"]]
    assert told["asset"] == "tokenizer"
    assert told["artefact"].endswith("tokenizer.json")
    done = colorfilter("audit", *where, "nothing")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: nothing: is no artefact of this home; give the folder of one"
    )
