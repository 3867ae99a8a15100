"""An audit of a home: what is looked at, in order, and what does not hold."""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import duckdb
import polars as pl
from rich.console import Console
from rich.markup import escape

from assets.common import shard_names
from assets.filtered.audit_checks import counts
from colorfilter.config.recipe import Recipe
from colorfilter.errors import InputError, one_line
from colorfilter.evaluation import html
from colorfilter.progress import Progress
from colorfilter.storage.files import write_text_atomically
from commands.audit.recompute import (
    Rescored,
    rescore,
    reselect,
    results,
    tables,
    tables_are_current,
)
from commands.forget.artifacts import remaining
from resources.artifacts import RECIPE, ArtifactStore
from resources.audit import Finding, Record
from resources.home import Home
from resources.ledger import Entry
from resources.lineage import name_of

# What damaged files raise, each in its way.
UNREADABLE = (OSError, LookupError, ValueError, InputError, duckdb.Error, pl.exceptions.PolarsError)

# Begins a step, given its name and its size in bytes or tokens; returns what to call with progress.
Show = Callable[[str, int], Progress]


@dataclass
class Audit:
    """What was looked at and what does not hold."""

    subject: str
    head: str
    artifacts: int
    begun: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    findings: list[Finding] = field(default_factory=list)
    checked: dict[str, bool] = field(default_factory=dict)
    rescored: Rescored | None = None
    seed: int | None = None

    @property
    def passed(self) -> bool:
        return all(finding.warning for finding in self.findings)

    def look(self, name: str, findings: Iterable[Finding]) -> list[Finding]:
        """Add and return what a check finds. What it cannot read is a finding too."""
        found: list[Finding] = []
        try:
            found.extend(findings)  # what comes before an error is kept
        except UNREADABLE as error:
            found.append(Finding(name, "on the way", "what can be read", one_line(error)))
        self.findings += found
        self.checked[name] = all(finding.warning for finding in found)
        return found

    def as_json(self) -> str:
        """Everything as one JSON object."""
        return json.dumps({**asdict(self), "passed": self.passed}, indent=1, ensure_ascii=False)


def audit(
    recipe: Recipe,
    home: Home,
    show: Show,
    what: str | None = None,
    head: str | None = None,
    again: bool = False,
    sample: int | None = None,
) -> Audit:
    """Check all that is current in a home, or one artifact, back to the raw files.

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
    entries = list(record.lineage.ancestry(_subject(artifacts, current, what)).values())
    found = Audit(what or "all that is current", record.head, len(entries))
    show("ledger", 0)
    found.look("chain of the ledger", record.chain(head))
    found.look("what was taken up again", record.reuse())
    found.look("links from each artifact to its inputs", record.links(entries))
    found.look("folders without an entry", record.orphans())
    hashed = show("files", sum(entry.get("bytes") or 0 for entry in entries))
    found.look("sha256 of every file", record.files(entries, hashed))
    now, read = {entry["path"] for entry in current}, show("raw files", 0)
    found.look("sha256 of the raw files", record.raw_files(entries, now, read))
    show("counts", 0)
    found.look("counts and contents", counts(record, entries))
    found.look("what was forgotten", remaining(artifacts))
    show("Dagster's history", 0)
    found.look("Dagster's history", history(artifacts))
    if all(entry["asset"] != "score_tables" for entry in entries):
        return found
    show("score tables", 0)
    if not found.look("score tables of all that is current", tables_are_current(artifacts, recipe)):
        found.look("score tables against the record", tables(record, recipe))
    found.look("evaluations against the reports", results(artifacts, recipe))
    if again:
        show("selections", 0)
        found.look("selections made again", reselect(record, recipe, entries))
    if sample:
        seed, tokens = secrets.randbelow(2**32), show("losses", 0)
        found.seed = seed

        def scored_again() -> Iterator[Finding]:
            found.rescored, off = rescore(record, recipe, sample, seed, tokens)
            yield from off

        found.look("losses computed again", scored_again())
    return found


def _subject(artifacts: ArtifactStore, current: list[Entry], what: str | None) -> list[Entry]:
    """Return the entries that an audit begins from. Raises InputError where there are none."""
    if what is None:
        return current
    named = [e for e in current if what in {name_of(e), e["asset"], e["path"]}]
    folder = Path(what).resolve()
    of_folder = [e for e in artifacts.ledger if artifacts.at.root / e["path"] == folder]
    if not named and not of_folder:
        names = ", ".join(sorted({e["asset"] for e in current}))
        raise InputError(f"{what}: is no artifact of this home; give the folder of one, or {names}")
    return named or of_folder[-1:]


def history(artifacts: ArtifactStore) -> Iterator[Finding]:
    """Find what only Dagster's history says; what it lacks (it may be wiped) is a warning."""
    happened = list(_materializations(artifacts.at.dagster))
    made, ran, seen = set(), set(), set()
    for entry in artifacts.ledger:  # read later than the events: a run may be at work
        # Seeds are partitions in the ledger and not in Dagster.
        made |= {(name, entry["fingerprint"]) for name in (name_of(entry), entry["asset"])}
        if entry.get("run") and not entry["reused"] and entry["asset"] != RECIPE:
            ran.add((entry["asset"], entry["run"]))
    for logged, event in happened:
        asset, shown = event.asset_key.to_user_string(), event.metadata.get("fingerprint")
        name = asset if event.partition is None else f"{asset}[{event.partition}]"
        time = datetime.fromtimestamp(logged.timestamp, UTC).isoformat(timespec="seconds")
        where = f"materialization of {time} in Dagster's history"
        seen.add((asset, logged.run_id))
        if not logged.run_id:
            found = "none: it was reported from outside"
            yield Finding(asset, where, "a run that made it", found)
        elif shown is not None and (name, str(shown.value)) not in made:
            yield Finding(name, where, "a fingerprint that the ledger has", str(shown.value)[:16])
    if missing := len(ran - seen):
        wanted = f"events of the {len(ran)} materializations in the ledger"
        yield Finding("dagster", "its history", wanted, f"none of {missing}", warning=True)


def _materializations(home: Path) -> Iterator[tuple[dg.EventLogEntry, dg.AssetMaterialization]]:
    """Yield all materializations in Dagster's history, in its folder."""
    if not (home / "history").exists():
        return
    with dg.DagsterInstance.from_config(str(home)) as instance:
        for key in instance.all_asset_keys():
            cursor, more = None, True
            while more:
                events = instance.fetch_materializations(key, limit=1000, cursor=cursor)
                cursor, more = events.cursor, events.has_more
                for event in events.records:
                    if event.asset_materialization:
                        yield event.event_log_entry, event.asset_materialization


def print_audit(console: Console, found: Audit) -> None:
    """Print a line for each thing that does not hold, and what was looked at."""
    for finding in found.findings:
        mark = "[yellow]noted [/]" if finding.warning else "[red]failed[/]"
        console.print(mark, escape(str(finding)), highlight=False, soft_wrap=True)
    for name, holds in found.checked.items():
        console.print("[green]passed[/]" if holds else "[red]failed[/]", name, highlight=False)
    failed = sum(not finding.warning for finding in found.findings)
    words = f"{failed:,} things do not hold" if failed else "all holds"
    console.print(f"{found.subject}, {found.artifacts:,} artifacts: {words}", highlight=False)
    if found.rescored:
        console.print(f"{found.rescored} (seed {found.seed})", highlight=False)
    console.print(f"ledger    {found.head}", highlight=False)


def write_page(found: Audit, recipe: Recipe, home: Home, path: Path) -> None:
    """Write the audit as one HTML file."""
    again = f"{found.rescored} (seed {found.seed})" if found.rescored else "nothing"
    facts = {
        "audited": found.subject,
        "home": home.root,
        "recipe": recipe.name,
        "on": found.begun,
        "head of the ledger": found.head,
        "artifacts": f"{found.artifacts:,}",
        "scored again": again,
    }
    verdict = "All of it holds." if found.passed else "Not all of it holds."
    looked_at = [(name, "holds" if h else "does not hold") for name, h in found.checked.items()]
    sections = [
        html.Section("Verdict", verdict, html.Table(["", ""], list(facts.items()))),
        html.Section("Looked at", "", html.Table(["", ""], looked_at)),
    ]
    for title, warning in (("What does not hold", False), ("What cannot be shown", True)):
        rows = [astuple(f)[:4] for f in found.findings if f.warning == warning]
        table = html.Table(["asset", "artifact", "expected", "found"], rows) if rows else None
        sections.append(html.Section(title, "" if rows else "Nothing.", table))
    write_text_atomically(path, html.html(f"Audit of {recipe.name}", sections))
