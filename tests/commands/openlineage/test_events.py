"""OpenLineage events match the ledger, written to a file and sent over HTTP."""

import json
import shutil
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from colorfilter.errors import InputError
from colorfilter.storage.files import file_sha256
from commands.openlineage import command
from commands.openlineage.events import address
from resources.home import Home
from resources.ledger import Ledger
from tests.conftest import Project
from tests.program import Caller, colorfilter

Event = dict[str, Any]


def export(home: Path, file: Path) -> list[Event]:
    done = colorfilter("openlineage", "--home", str(home), "--file", str(file))
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert f"{len(found)} events written" in done.stdout
    return found


@pytest.fixture(scope="module")
def exported(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    return export(finished.home.root, tmp_path_factory.mktemp("events") / "events.jsonl")


@pytest.fixture
def copied_ledger(finished: Project, tmp_path: Path) -> Home:
    """A home that has lost all but its ledger."""
    home = Home(tmp_path / "home").claim(finished.recipe.name)
    shutil.copy(finished.home.ledger, home.ledger)
    return home


def name(entry: dict) -> str:
    return entry["asset"] + (f"[{entry['partition']}]" if entry["partition"] else "")


def version(dataset: dict) -> tuple[str, str]:
    return dataset["name"], dataset["facets"]["version"]["datasetVersion"]


def made_from(entry: dict, entries: list[dict]) -> set[tuple[str, str]]:
    """Names and fingerprints of the inputs of an entry; of a part, those of the whole."""
    whole = {name(e): e["fingerprint"] for e in entries}
    found = {**entry["inputs"], **entry["sources"]}
    if entry["experiment"]:
        found["recipe"] = entry["experiment"]
    return {
        (n, f) if n in whole else (n.rpartition("/")[0], whole[n.rpartition("/")[0]])
        for n, f in found.items()
    }


def test_events_say_what_the_ledger_says(finished: Project, exported: list[Event]) -> None:
    entries = finished.ledger()
    runs: dict[tuple[str, str], list[dict]] = {}
    for entry in entries:
        runs.setdefault((entry["run"], entry["asset"]), []).append(entry)
    told: dict[tuple[str, str], list[Event]] = {}
    for event in exported:
        parent = event["run"]["facets"]["parent"]["run"]["runId"]
        told.setdefault((parent, event["job"]["name"]), []).append(event)
    assert set(told) == set(runs)
    for pair, (start, complete) in told.items():
        made = runs[pair]
        assert (start["eventType"], complete["eventType"]) == ("START", "COMPLETE")
        assert start["eventTime"] == made[0]["recorded"]
        assert complete["eventTime"] == made[-1]["recorded"]
        inputs = set().union(*(made_from(entry, entries) for entry in made))
        assert inputs or pair[1] == "recipe"
        for event in (start, complete):
            assert event["run"]["runId"] == start["run"]["runId"]
            assert event["job"]["namespace"] == "colorfilter.tests"
            artifacts = [d for d in event["inputs"] if d["namespace"] == "colorfilter.tests"]
            assert {version(d) for d in artifacts} == inputs
            assert len(artifacts) == len(inputs)
            assert [version(d) for d in event["outputs"]] == [
                (name(entry), entry["fingerprint"]) for entry in made
            ]
            facets = event["run"]["facets"]
            environment = made[0]["environment"]
            assert facets["processing_engine"]["version"] == environment["dagster"]
            tags = {t["value"] for t in facets["tags"]["tags"]}
            assert environment["git"] in {*tags, ""}  # none without a checkout
    assert len({e["run"]["runId"] for e in exported}) == len(runs)
    assert all(uuid.UUID(e["run"]["runId"]) for e in exported)


def test_sizes_and_columns_are_those_of_the_files(finished: Project, exported: list[Event]) -> None:
    entries = {(name(e), e["fingerprint"]): e for e in finished.ledger()}
    for event in exported:
        for dataset in event["outputs"]:
            entry, facet = entries[version(dataset)], dataset["outputFacets"]["outputStatistics"]
            assert (facet.get("rowCount"), facet["size"]) == (entry["rows"], entry["bytes"])
        for dataset in event["inputs"]:
            if dataset["namespace"] != "colorfilter.tests":
                continue
            entry, facet = entries[version(dataset)], dataset["inputFacets"]["dataQualityMetrics"]
            assert (facet.get("rowCount"), facet["bytes"]) == (entry["rows"], entry["bytes"])
            has_tables = any((finished.home.root / entry["path"]).rglob("*.parquet"))
            assert ("schema" in dataset["facets"]) == has_tables
    columns = {d["name"]: d["facets"].get("schema") for e in exported for d in e["outputs"]}
    leaks = columns["reference/color_tau4/leakage"]["fields"]
    path = next(finished.home.root.glob("artifacts/reference/color_tau4/leakage/*/*.parquet"))
    assert [field["name"] for field in leaks] == pl.read_parquet_schema(path).names()
    assert [f["name"] for f in columns["reference/color_tau4/filtered_dataset"]["fields"]] == [
        "documents/*.parquet",
        "tokens/sequences.parquet",
    ]


def test_the_files_that_text_was_read_from_are_inputs(
    finished: Project, exported: list[Event]
) -> None:
    told = {
        (d["name"], d["facets"]["version"]["datasetVersion"]): (event["job"]["name"], d)
        for event in exported
        for d in event["inputs"]
        if d["namespace"] == "file"
    }
    corpus = sorted((finished.root / "corpus").glob("*.jsonl"))
    for path in [*corpus, finished.root / "corpus" / "topics.py"]:
        job, dataset = told.pop((str(path), file_sha256(path)))
        assert job == ("raw_corpus" if path in corpus else "reference/domain_text")
        facet = dataset["inputFacets"]["dataQualityMetrics"]
        assert facet["bytes"] == path.stat().st_size
    assert not told


@pytest.mark.parametrize(
    ("uri", "named"),
    [
        ("/data/a b.jsonl", ("file", "/data/a b.jsonl")),
        ("s3://bucket/web/x.jsonl.zst", ("s3://bucket", "web/x.jsonl.zst")),
    ],
)
def test_files_are_named_as_openlineage_names_them(uri: str, named: tuple[str, str]) -> None:
    assert address(uri) == named


def test_a_second_export_is_the_same(
    finished: Project, exported: list[Event], tmp_path: Path
) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text("what was there goes\n")
    assert export(finished.home.root, file) == exported
    assert list(tmp_path.iterdir()) == [file]


def test_what_was_taken_up_again_or_has_no_run_is_left_out(
    finished: Project, exported: list[Event], copied_ledger: Home, tmp_path: Path
) -> None:
    ledger, last = Ledger(copied_ledger.ledger), finished.ledger()[-1]
    ledger.append({**last, "reused": True, "recorded": "2099-01-01T00:00:00+00:00"})
    ledger.append({**last, "run": None})
    file = tmp_path / "events.jsonl"
    done = colorfilter("openlineage", "--home", str(copied_ledger.root), "--file", str(file))
    assert "1 artifacts omitted" in done.stdout
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [e["eventTime"] for e in found] == [e["eventTime"] for e in exported]


def test_without_its_folders_a_ledger_still_tells_names_and_versions(
    exported: list[Event], copied_ledger: Home, tmp_path: Path
) -> None:
    found = export(copied_ledger.root, tmp_path / "events.jsonl")
    assert len(found) == len(exported)
    for event, full in zip(found, exported, strict=True):
        assert [version(d) for d in event["outputs"]] == [version(d) for d in full["outputs"]]
        assert not any("schema" in d["facets"] for d in event["outputs"] + event["inputs"])
        # A part cannot be found in what is gone, and keeps the name that the ledger has.
        names = {d["name"].removesuffix("/tokens") for d in event["inputs"]}
        assert names == {d["name"] for d in full["inputs"] if d["namespace"] != "file"}


class Server(HTTPServer):
    """A catalogue on loopback that keeps what it gets, and refuses from event `refuse_from` on."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Catalogue)
        self.got: list[Event] = []
        self.refuse_from = 1_000

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Catalogue(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        taken = len(self.server.got) < self.server.refuse_from
        if taken:
            self.server.got.append(json.loads(body))
        assert self.path == "/api/v1/lineage"
        self.send_response(201 if taken else 400)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as catalogue:
        thread = threading.Thread(target=catalogue.serve_forever)
        thread.start()
        yield catalogue
        catalogue.shutdown()
        thread.join()


def test_over_http_go_the_same_events(
    finished: Project, exported: list[Event], server: Server
) -> None:
    done = colorfilter("openlineage", "--home", str(finished.home.root), OPENLINEAGE_URL=server.url)
    assert done.returncode == 0, done.stderr
    assert f"{len(exported)} events sent" in done.stdout
    assert server.got == exported


def test_an_openlineage_yml_says_where_to(
    finished: Project, exported: list[Event], server: Server, tmp_path: Path
) -> None:
    config = tmp_path / "openlineage.yml"
    config.write_text(f"transport: {{type: http, url: '{server.url}'}}\n")
    home = str(finished.home.root)
    done = colorfilter("openlineage", "--home", home, OPENLINEAGE_CONFIG=str(config))
    assert done.returncode == 0, done.stderr
    assert server.got == exported


def refusal(home: Path, *arguments: str, **environment: str) -> str:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        done = Caller(monkeypatch)("openlineage", "--home", str(home), *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_an_event_that_is_not_taken_is_told(finished: Project, server: Server) -> None:
    server.refuse_from = 3
    line = refusal(finished.home.root, OPENLINEAGE_URL=server.url)
    assert "event 4 of" in line
    assert "400" in line
    assert len(server.got) == 3


def test_what_is_missing_is_told_in_a_line(finished: Project, tmp_path: Path) -> None:
    home = finished.home.root
    assert "set OPENLINEAGE_URL" in refusal(home, HOME=str(tmp_path))
    switched_off = {"OPENLINEAGE_URL": "http://127.0.0.1:9", "OPENLINEAGE_DISABLED": "true"}
    assert "sending is disabled" in refusal(home, **switched_off)
    assert "is invalid" in refusal(home, OPENLINEAGE__TRANSPORT__TYPE="pigeon")
    assert "is invalid" in refusal(home, OPENLINEAGE_URL="here")
    assert "give another path" in refusal(home, "--file", str(tmp_path / "none" / "events.jsonl"))
    assert "does not exist" in refusal(tmp_path / "nothing", "--file", str(tmp_path / "e.jsonl"))


def test_the_package_is_asked_for_where_it_is_missing(
    finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install '.\[openlineage\]'"):
        command.openlineage(finished.home.root)
