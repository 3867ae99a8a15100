"""Audit a home: run every check in order and collect what they find."""

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

# Exceptions that reading a damaged file can raise.
UNREADABLE = (OSError, LookupError, ValueError, InputError, duckdb.Error, pl.exceptions.PolarsError)

# Begins a step, given its name and its size in bytes or tokens (0 if unknown). Returns the function
# to call with each amount of work done.
Show = Callable[[str, int], Progress]


@dataclass
class Audit:
    """The result of an audit: what was checked and what was found."""

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
        """Run a check; add and return its findings. A file it cannot read is a finding too."""
        found: list[Finding] = []
        try:
            found.extend(findings)  # findings before an error are kept
        except UNREADABLE as error:
            found.append(Finding(name, "during the check", "readable files", one_line(error)))
        self.findings += found
        self.checked[name] = all(finding.warning for finding in found)
        return found

    def as_json(self) -> str:
        """Return the result as one JSON object."""
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
    """Audit everything current in a home, or the artifact `what`, back to the raw files.

    `head` is a hash that the ledger must contain. With `again`, selections are repeated. With
    `sample`, that many random sequences of every shard are scored again. Raises InputError for an
    invalid `head`, or if `what` names no artifact.
    """
    if head is not None:
        head = head.strip().lower()
        if not re.fullmatch("[0-9a-f]{8,64}", head):
            raise InputError(f"--head: '{head}' is not a sha256; give at least 8 hex digits of it")
    artifacts = ArtifactStore(home=str(home.root))
    record = Record(artifacts)
    current = record.lineage.current(shard_names(artifacts, recipe))
    entries = list(record.lineage.ancestry(_subject(artifacts, current, what)).values())
    found = Audit(what or "everything current", record.head, len(entries))
    show("ledger", 0)
    found.look("chain of the ledger", record.chain(head))
    found.look("reused artifacts", record.reuse())
    found.look("links from each artifact to its inputs", record.links(entries))
    found.look("folders without an entry", record.orphans())
    hashed = show("files", sum(entry.get("bytes") or 0 for entry in entries))
    found.look("sha256 of every file", record.files(entries, hashed))
    now, read = {entry["path"] for entry in current}, show("raw files", 0)
    found.look("sha256 of the raw files", record.raw_files(entries, now, read))
    show("counts", 0)
    found.look("counts and contents", counts(record, entries))
    found.look("forgotten documents", remaining(artifacts))
    show("Dagster's history", 0)
    found.look("Dagster's history", history(artifacts))
    if all(entry["asset"] != "score_tables" for entry in entries):
        return found
    show("score tables", 0)
    if not found.look("score tables are current", tables_are_current(artifacts, recipe)):
        found.look("score tables against the record", tables(record, recipe))
    found.look("evaluations against the reports", results(artifacts, recipe))
    if again:
        show("selections", 0)
        found.look("repeated selections", reselect(record, recipe, entries))
    if sample:
        seed, tokens = secrets.randbelow(2**32), show("losses", 0)
        found.seed = seed

        def scored_again() -> Iterator[Finding]:
            found.rescored, off = rescore(record, recipe, sample, seed, tokens)
            yield from off

        found.look("recomputed losses", scored_again())
    return found


def _subject(artifacts: ArtifactStore, current: list[Entry], what: str | None) -> list[Entry]:
    """Return the entries that an audit starts from. Raises InputError if `what` names none."""
    if what is None:
        return current
    named = [e for e in current if what in {name_of(e), e["asset"], e["path"]}]
    folder = Path(what).resolve()
    of_folder = [e for e in artifacts.ledger if artifacts.at.root / e["path"] == folder]
    if not named and not of_folder:
        names = ", ".join(sorted({e["asset"] for e in current}))
        raise InputError(f"{what}: not an artifact of this home; give a folder, or one of {names}")
    return named or of_folder[-1:]


def history(artifacts: ArtifactStore) -> Iterator[Finding]:
    """Find events in Dagster's history that the ledger does not have.

    Materializations missing from the history are a warning, since the history may be wiped.
    """
    happened = list(_materializations(artifacts.at.dagster))
    made, ran, seen = set(), set(), set()
    for entry in artifacts.ledger:  # read after the events, because a run may be adding both
        # Seeds are partitions in the ledger but not in Dagster.
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
            yield Finding(asset, where, "the run that produced it", found)
        elif shown is not None and (name, str(shown.value)) not in made:
            wanted = "a fingerprint that is in the ledger"
            yield Finding(name, where, wanted, str(shown.value)[:16])
    if missing := len(ran - seen):
        wanted = f"events of the {len(ran)} materializations in the ledger"
        yield Finding("dagster", "its history", wanted, f"none of {missing}", warning=True)


def _materializations(home: Path) -> Iterator[tuple[dg.EventLogEntry, dg.AssetMaterialization]]:
    """Yield all materializations in Dagster's history. `home` is the DAGSTER_HOME folder."""
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
    """Print a line per finding, a line per check, and a summary."""
    for finding in found.findings:
        mark = "[yellow]noted [/]" if finding.warning else "[red]failed[/]"
        console.print(mark, escape(str(finding)), highlight=False, soft_wrap=True)
    for name, holds in found.checked.items():
        console.print("[green]passed[/]" if holds else "[red]failed[/]", name, highlight=False)
    failed = sum(not finding.warning for finding in found.findings)
    words = f"{failed:,} problems found" if failed else "no problems found"
    console.print(f"{found.subject}, {found.artifacts:,} artifacts: {words}", highlight=False)
    if found.rescored:
        console.print(f"{found.rescored} (seed {found.seed})", highlight=False)
    console.print(f"ledger    {found.head}", highlight=False)


def write_page(found: Audit, recipe: Recipe, home: Home, path: Path) -> None:
    """Write the result of an audit as one HTML file."""
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
    verdict = "No problems found." if found.passed else "Problems found."
    looked_at = [(name, "passed" if h else "failed") for name, h in found.checked.items()]
    sections = [
        html.Section("Result", verdict, html.Table(["", ""], list(facts.items()))),
        html.Section("Checks", "", html.Table(["", ""], looked_at)),
    ]
    for title, warning in (("Problems", False), ("Warnings", True)):
        rows = [astuple(f)[:4] for f in found.findings if f.warning == warning]
        table = html.Table(["asset", "artifact", "expected", "found"], rows) if rows else None
        sections.append(html.Section(title, "" if rows else "None.", table))
    write_text_atomically(path, html.html(f"Audit of {recipe.name}", sections))
