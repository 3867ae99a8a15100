"""An audit of a home: what is looked at, in order, and what does not hold."""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import duckdb
import polars as pl
from rich.console import Console
from rich.markup import escape

from assets.common import shard_names
from assets.counted import counts
from assets.forgetting import remaining
from assets.published import results, tables, tables_are_current
from assets.repeated import Rescored, rescore, reselect
from colorfilter import page
from colorfilter.errors import InputError, one_line
from colorfilter.files import write_text_atomically
from colorfilter.progress import Progress
from colorfilter.recipe import Recipe
from resources.artifacts import RECIPE, ArtifactStore
from resources.audit import Finding, Record, raw_files, sizes, workplace
from resources.gpu import Gpu
from resources.home import Home
from resources.ledger import Entry
from resources.lineage import name_of
from resources.score_store import ScoreStore

# What damaged files raise, each in its way.
UNREADABLE = (
    OSError,
    KeyError,
    ValueError,
    IndexError,
    InputError,
    duckdb.Error,
    pl.exceptions.PolarsError,
)
EVENTS = 1000  # of Dagster's history, at a time

# Called with what is looked at and how many bytes or tokens that is; gives what to call with those
# done.
Show = Callable[[str, int], Progress]


@dataclass
class Audit:
    """What was looked at and what does not hold."""

    subject: str
    head: str
    artefacts: int
    begun: str
    findings: list[Finding] = field(default_factory=list)
    checked: dict[str, bool] = field(default_factory=dict)
    rescored: Rescored | None = None
    seed: int | None = None

    @property
    def passed(self) -> bool:
        return all(finding.warning for finding in self.findings)

    def look(self, name: str, findings: Iterable[Finding]) -> None:
        """Add what a check finds. What it cannot read is a finding too."""
        there = len(self.findings)
        try:
            for finding in findings:
                self.findings.append(finding)
        except UNREADABLE as error:
            wanted = "what can be read"
            self.findings.append(Finding(name, "on the way", wanted, one_line(error)))
        self.checked[name] = all(finding.warning for finding in self.findings[there:])

    def as_json(self) -> str:
        """Everything as one JSON object."""
        facts = {
            **asdict(self),
            "passed": self.passed,
            "rescored": self.rescored._asdict() if self.rescored else None,
        }
        return json.dumps(facts, indent=1, ensure_ascii=False)


def audit(
    recipe: Recipe,
    home: Home,
    show: Show,
    what: str | None = None,
    head: str | None = None,
    again: bool = False,
    sample: int | None = None,
) -> Audit:
    """Check all that is current in a home, or one artefact, back to the raw files.

    `head` is a hash that the ledger must have; with `again` selections are made again, and `sample`
    sequences of every shard scored again. Raises InputError where there is nothing to audit.
    """
    if head is not None:
        head = head.strip().lower()
        if not re.fullmatch("[0-9a-f]{8,64}", head):
            raise InputError(f"--head: '{head}' is no head of a ledger; give at least 8 hex digits")
    artifacts = ArtifactStore(home=str(home.root))
    record = Record(artifacts)
    current = record.lineage.current(shard_names(artifacts, recipe))
    subject = _subject(artifacts, current, what)
    entries = list(record.lineage.ancestry(subject).values())
    found = Audit(
        what or "all that is current",
        record.head,
        len(entries),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )

    show("ledger", 0)
    found.look("chain of the ledger", record.chain(head))
    found.look("what was taken up again", record.reuse())
    found.look("links from each artefact to its inputs", record.links(entries))
    found.look("folders without an entry", record.orphans())
    files = show("files", sizes(home.root, entries))
    found.look("sha256 of every file", record.files(entries, files))
    raw = show("raw files", 0)
    now = {entry["path"] for entry in current}
    found.look("sha256 of the raw files", raw_files(home.root, entries, now, raw))
    show("counts", 0)
    found.look("counts and contents", counts(home.root, record.lineage, entries))
    found.look("what was forgotten", remaining(artifacts))
    show("Dagster's history", 0)
    found.look("Dagster's history", history(home, artifacts))
    if any(entry["asset"] == "score_tables" for entry in entries):
        _audit_scores(found, recipe, home, show, entries, again, sample)
    return found


def _audit_scores(
    found: Audit,
    recipe: Recipe,
    home: Home,
    show: Show,
    entries: Sequence[Entry],
    again: bool,
    sample: int | None,
) -> None:
    """Check the published tables; select and score again where that is asked for."""
    artifacts, store = ArtifactStore(home=str(home.root)), ScoreStore(home=str(home.root))
    show("score tables", 0)
    before = len(found.findings)
    found.look("score tables of all that is current", tables_are_current(artifacts, recipe))
    if len(found.findings) == before:
        with workplace(home) as folder:
            found.look("score tables against the record", tables(artifacts, store, recipe, folder))
    found.look("evaluations against the reports", results(artifacts, recipe))
    if again:
        show("selections", 0)
        found.look("selections made again", reselect(artifacts, store, recipe, entries))
    if sample:
        tokens = show("losses", 0)
        seed = found.seed = secrets.randbelow(2**32)

        def scored_again(folder: Path) -> Iterator[Finding]:
            gpu = Gpu(home=str(folder))  # whose runs are no runs of the home that is looked at
            found.rescored, off = rescore(
                artifacts, store, gpu, recipe, sample, seed, folder, tokens
            )
            yield from off

        with workplace(home) as folder:
            found.look("losses computed again", scored_again(folder))


def _subject(artifacts: ArtifactStore, current: list[Entry], what: str | None) -> list[Entry]:
    """The entries that an audit begins from. Raises InputError where there are none."""
    if what is None:
        return current
    named = [e for e in current if what in {name_of(e), e["asset"], e["path"]}]
    if not named:
        folder = Path(what).resolve()
        named = [e for e in artifacts.ledger if artifacts.at.root / e["path"] == folder][-1:]
    if not named:
        names = ", ".join(sorted({e["asset"] for e in current}))
        raise InputError(f"{what}: is no artefact of this home; give the folder of one, or {names}")
    return named


def history(home: Home, artifacts: ArtifactStore) -> Iterator[Finding]:
    """Whether Dagster's history says nothing that the ledger does not.

    What it does not say (it may have been wiped) is a warning.
    """
    happened = []
    if (home.dagster / "history").exists():
        with dg.DagsterInstance.from_config(str(home.dagster)) as instance:
            for key in instance.all_asset_keys():
                happened += [(key.to_user_string(), *e) for e in _materializations(instance, key)]
    made: dict[str, set[str]] = {}
    wanted: set[tuple[str, str]] = set()
    for entry in artifacts.ledger:  # read later than the events: a run may be at work
        # Seeds are partitions in the ledger and not in Dagster.
        for name in {name_of(entry), entry["asset"]}:
            made.setdefault(name, set()).add(entry["fingerprint"])
        if entry.get("run") and not entry["reused"] and entry["asset"] != RECIPE:
            wanted.add((entry["asset"], entry["run"]))
    for asset, logged, event in happened:
        yield from _contradictions(asset, logged, event, made)
    missing = len(wanted - {(asset, logged.run_id) for asset, logged, _ in happened})
    if missing:
        yield Finding(
            "dagster",
            "its history",
            f"events of the {len(wanted)} materializations in the ledger",
            f"none of {missing}",
            warning=True,
        )


def _materializations(
    instance: dg.DagsterInstance, key: dg.AssetKey
) -> Iterator[tuple[dg.EventLogEntry, dg.AssetMaterialization]]:
    cursor = None
    while True:
        page_of = instance.fetch_materializations(key, limit=EVENTS, cursor=cursor)
        for event in page_of.records:
            if event.asset_materialization:
                yield event.event_log_entry, event.asset_materialization
        if not page_of.has_more:
            return
        cursor = page_of.cursor


def _contradictions(
    asset: str,
    happened: dg.EventLogEntry,
    event: dg.AssetMaterialization,
    made: dict[str, set[str]],
) -> Iterator[Finding]:
    time = datetime.fromtimestamp(happened.timestamp, UTC).isoformat(timespec="seconds")
    where = f"materialization of {time} in Dagster's history"
    if not happened.run_id:
        yield Finding(asset, where, "a run that made it", "none: it was reported from outside")
        return
    shown = event.metadata.get("fingerprint")
    name = asset if event.partition is None else f"{asset}[{event.partition}]"
    if shown is not None and str(shown.value) not in made.get(name, set()):
        yield Finding(name, where, "a fingerprint that the ledger has", str(shown.value)[:16])


# Shown to people -----------------------------------------------------------------------------


def print_audit(console: Console, found: Audit) -> None:
    """Print a line for each thing that does not hold, and what was looked at."""
    for finding in found.findings:
        mark = "[yellow]noted [/]" if finding.warning else "[red]failed[/]"
        console.print(mark, escape(str(finding)), highlight=False, soft_wrap=True)
    for name, holds in found.checked.items():
        console.print("[green]passed[/]" if holds else "[red]failed[/]", name, highlight=False)
    failed = sum(not finding.warning for finding in found.findings)
    words = f"{failed:,} things do not hold" if failed else "all holds"
    console.print(f"{found.subject}, {found.artefacts:,} artefacts: {words}", highlight=False)
    if found.rescored:
        losses, largest, seconds = found.rescored
        console.print(
            f"{losses:,} losses computed again in {seconds:.1f} s (seed {found.seed}), the largest "
            f"difference {largest:.1e} nats per token",
            highlight=False,
        )
    console.print(f"ledger    {found.head}", highlight=False)


def write_page(found: Audit, recipe: Recipe, home: Home, path: Path) -> None:
    """The audit as one HTML file."""
    verdict = "All of it holds." if found.passed else "Not all of it holds."
    facts: list[tuple[str, object]] = [
        ("audited", found.subject),
        ("home", home.root),
        ("recipe", recipe.name),
        ("on", found.begun),
        ("head of the ledger", found.head),
        ("artefacts", f"{found.artefacts:,}"),
    ]
    if found.rescored:
        facts += [
            ("losses computed again", f"{found.rescored.losses:,}, seed {found.seed}"),
            ("largest difference", f"{found.rescored.largest:.1e} nats per token"),
        ]
    looked_at = [[name, "holds" if h else "does not hold"] for name, h in found.checked.items()]
    sections = [
        page.Section("Verdict", verdict, page.Table(["", ""], facts)),
        page.Section("Looked at", "", page.Table(["", ""], looked_at)),
    ]
    for title, warning in (("What does not hold", False), ("What cannot be shown", True)):
        rows = [
            [f.asset, f.artefact, f.expected, f.found]
            for f in found.findings
            if f.warning == warning
        ]
        table = page.Table(["asset", "artefact", "expected", "found"], rows) if rows else None
        sections.append(page.Section(title, "" if rows else "Nothing.", table))
    write_text_atomically(path, page.html(f"Audit of {recipe.name}", sections))
