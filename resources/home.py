"""The home: the one folder under which everything that a recipe produces lies."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from colorfilter.data.shards import Shard
from colorfilter.errors import InputError
from colorfilter.storage.files import is_locked, lock, write_text_atomically

# Of the layout of a home; resources.upgrade brings older ones up to it.
FORMAT = 2

DAGSTER_YAML = """\
telemetry: {enabled: false}
nux: {enabled: false}
concurrency:
  pools: {default_limit: 1, granularity: op}
  runs: {max_concurrent_runs: 2}
run_queue: {dequeue_interval_seconds: 1}
run_monitoring:
  enabled: true
  poll_interval_seconds: 10
  start_timeout_seconds: 120
  free_slots_after_run_end_seconds: 5
run_retries: {enabled: true, max_retries: 1, retry_on_asset_or_op_failure: false}
"""


class Home:
    """Where things lie under a home, and whose home it is."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).resolve()
        self.artifacts = self.root / "artifacts"
        self.leases = self.root / "leases"
        self.dagster = self.root / "dagster"
        self.ledger = self.root / "ledger.jsonl"
        self.kernel_runs = self.root / "kernel_runs.jsonl"
        self.scores = self.root / "scores.duckdb"
        self.selections = self.root / "selections.duckdb"
        self.results = self.root / "results.duckdb"
        self._shards = self.root / "shards.json"
        self._owner = self.root / "home.json"
        self.rows = self.root / "rows"
        self._exclusive = self.root / "exclusive"

    def claim(self, recipe: str, made_as: int = FORMAT) -> "Home":
        """Make the home for a recipe, or check that it belongs to it.

        `made_as` is the format of what is there already where the home does not say. Brings a home
        of an older format up to date. Raises InputError for a home that cannot be written, belongs
        to another recipe or was made by a newer version.
        """
        try:
            for folder in (self.artifacts, self.leases, self.dagster):
                folder.mkdir(parents=True, exist_ok=True)
            if not self._owner.exists():
                write_text_atomically(
                    self._owner, json.dumps({"recipe": recipe, "format": made_as})
                )
            if not os.access(self.root, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise self._unusable(error) from error
        self.check(recipe)
        settings = self.dagster / "dagster.yaml"
        if not settings.exists():
            write_text_atomically(settings, DAGSTER_YAML)
        return self

    def check(self, recipe: str) -> None:
        """Check that a home belongs to a recipe, and bring it up to date. Makes no home.

        Raises InputError for a home of another recipe or of a newer version.
        """
        facts = self._facts()
        if facts is None:
            return
        if facts["recipe"] != recipe:
            raise InputError(
                f"home {self.root}: belongs to the recipe '{facts['recipe']}', not to '{recipe}'; "
                "name another with --home"
            )
        if facts["format"] > FORMAT:
            raise InputError(
                f"home {self.root}: has format {facts['format']}, made by a newer version; this "
                f"one reads up to format {FORMAT}"
            )
        if facts["format"] < FORMAT:
            from resources.upgrade import upgrade

            try:
                upgrade(self)
            except OSError as error:
                raise self._unusable(error) from error

    def owner(self) -> str | None:
        """The recipe that the home belongs to, None where there is no home yet.

        Raises InputError for a home that cannot be read.
        """
        facts = self._facts()
        return None if facts is None else str(facts["recipe"])

    @property
    def format(self) -> int:
        """The format of an existing home."""
        facts = self._facts()
        assert facts is not None
        return int(facts["format"])

    def record_format(self) -> None:
        """Record that the home has the current format."""
        self._record(format=FORMAT)

    def identity(self) -> str:
        """What tells this home from others that share a storage with it, made up once."""
        with lock(self.leases / self._owner.name):
            facts = self._facts()
            assert facts is not None
            if "id" not in facts:
                self._record(id=uuid.uuid4().hex[:12])
        return str((self._facts() or {})["id"])

    def _facts(self) -> dict[str, Any] | None:
        """What the home says of itself; None where there is no home."""
        try:
            if not self._owner.exists():
                return None
            facts = json.loads(self._owner.read_text(encoding="utf-8"))
            return {"format": 1, **facts, "recipe": str(facts["recipe"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unusable(error) from error

    def _record(self, **facts: Any) -> None:
        write_text_atomically(self._owner, json.dumps({**(self._facts() or {}), **facts}))

    def _unusable(self, error: Exception) -> InputError:
        return InputError(f"home {self.root}: cannot be used ({error}); name another with --home")

    @contextlib.contextmanager
    def exclusively(self, command: str) -> Iterator[None]:
        """Keep runs and backups away while a command works, and until it has succeeded.

        After an interruption only the same command lets them in again. Raises InputError while a
        run is at work or another command was interrupted.
        """
        with lock(self.leases / self._exclusive.name):
            if self._exclusive.exists() and self._exclusive.read_text("utf-8") != command:
                self.refuse_exclusive()
            write_text_atomically(self._exclusive, command)
            if self.is_at_work():
                self._exclusive.unlink()
                raise InputError(f"home {self.root}: a run is at work; wait for it or cancel it")
            yield
            self._exclusive.unlink()

    def refuse_exclusive(self) -> None:
        """Raise InputError where a command that keeps runs away has not come to its end."""
        if self._exclusive.exists():
            command = self._exclusive.read_text("utf-8")
            raise InputError(
                f"home {self.root}: `{command}` is at work or was interrupted; wait for it, or run "
                "the same command again"
            )

    def run_lease(self, run_id: str) -> Path:
        """The file that the process of a Dagster run keeps locked as long as it lives."""
        return self.leases / f"run-{run_id}"

    def run_is_alive(self, run_id: str) -> bool:
        """Whether the process of a Dagster run is at work."""
        return is_locked(self.run_lease(run_id))

    def is_at_work(self) -> bool:
        """Whether the process of any run is at work."""
        return any(is_locked(lease) for lease in self.leases.glob("run-*"))

    def shards(self) -> list[Shard]:
        """The planned shards of the corpus, in order of name."""
        if not self._shards.exists():
            return []
        content = json.loads(self._shards.read_text(encoding="utf-8"))
        return [Shard.from_facts(facts) for facts in content]

    def write_shards(self, shards: Sequence[Shard]) -> None:
        text = json.dumps([shard.facts() for shard in shards], indent=1, ensure_ascii=False)
        write_text_atomically(self._shards, text)
