"""The home: the folder that contains everything a recipe produces."""

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

# The version of the layout of a home; resources.upgrade upgrades homes of older formats.
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
    """The paths in a home, and the recipe that it belongs to."""

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
        """Create the home for a recipe, or check that an existing home belongs to the recipe.

        `made_as` is the format of existing content in a folder that does not record its format. A
        home with an older format is upgraded. Raises InputError for a home that is not writable,
        belongs to another recipe or was created by a newer version.
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
        """Check that an existing home belongs to a recipe, and upgrade an older format.

        Does not create a home. Raises InputError for a home that belongs to another recipe or was
        created by a newer version.
        """
        facts = self._facts()
        if facts is None:
            return
        if facts["recipe"] != recipe:
            raise InputError(
                f"home {self.root}: belongs to the recipe '{facts['recipe']}', not to '{recipe}'; "
                "give another home with --home"
            )
        if facts["format"] > FORMAT:
            raise InputError(
                f"home {self.root}: has format {facts['format']}, created by a newer version; this "
                f"version supports formats up to {FORMAT}; upgrade colorfilter"
            )
        if facts["format"] < FORMAT:
            from resources.upgrade import upgrade

            try:
                upgrade(self)
            except OSError as error:
                raise self._unusable(error) from error

    def owner(self) -> str | None:
        """Return the name of the recipe that the home belongs to; None if there is no home yet.

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
        """Return a random id, created once, that distinguishes homes that share a storage."""
        with lock(self.leases / self._owner.name):
            facts = self._facts()
            assert facts is not None
            if "id" not in facts:
                self._record(id=uuid.uuid4().hex[:12])
        return str((self._facts() or {})["id"])

    def _facts(self) -> dict[str, Any] | None:
        """Return the content of `home.json`; None if there is no home."""
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
        return InputError(
            f"home {self.root}: cannot be used ({error}); give another home with --home"
        )

    @contextlib.contextmanager
    def exclusively(self, command: str) -> Iterator[None]:
        """Block runs and backups until a command has succeeded.

        After an interruption they stay blocked until the same command is run again and succeeds.
        Raises InputError if a run is at work or another command was interrupted.
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
        """Raise InputError if a command that blocks runs has not finished."""
        if self._exclusive.exists():
            command = self._exclusive.read_text("utf-8")
            raise InputError(
                f"home {self.root}: `{command}` is at work or was interrupted; wait for it, or run "
                "the same command again"
            )

    def run_lease(self, run_id: str) -> Path:
        """Return the file that the process of a Dagster run keeps locked while it is alive."""
        return self.leases / f"run-{run_id}"

    def run_is_alive(self, run_id: str) -> bool:
        """Whether the process of a Dagster run is alive."""
        return is_locked(self.run_lease(run_id))

    def is_at_work(self) -> bool:
        """Whether the process of any Dagster run is alive."""
        return any(is_locked(lease) for lease in self.leases.glob("run-*"))

    def shards(self) -> list[Shard]:
        """Return the planned shards of the corpus, sorted by name."""
        if not self._shards.exists():
            return []
        content = json.loads(self._shards.read_text(encoding="utf-8"))
        return [Shard.from_facts(facts) for facts in content]

    def write_shards(self, shards: Sequence[Shard]) -> None:
        text = json.dumps([shard.facts() for shard in shards], indent=1, ensure_ascii=False)
        write_text_atomically(self._shards, text)
