"""The home: the one folder under which everything that a recipe produces lies."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from colorfilter.errors import InputError
from colorfilter.files import is_locked, lock, write_text_atomically
from colorfilter.shards import Shard

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
        self.results = self.root / "results.duckdb"
        self._shards = self.root / "shards.json"
        self._owner = self.root / "home.json"
        self._forgetting = self.root / "forgetting"

    def claim(self, recipe: str) -> "Home":
        """Make the home for a recipe, or check that it belongs to it.

        Raises InputError for a home that cannot be written or belongs to another recipe.
        """
        try:
            for folder in (self.artifacts, self.leases, self.dagster):
                folder.mkdir(parents=True, exist_ok=True)
            if not self._owner.exists():
                write_text_atomically(self._owner, json.dumps({"recipe": recipe}))
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
        """Raise InputError for a home that belongs to another recipe. Makes nothing."""
        owner = self.owner()
        if owner not in {None, recipe}:
            raise InputError(
                f"home {self.root}: belongs to the recipe '{owner}', not to '{recipe}'; name "
                "another with --home"
            )

    def owner(self) -> str | None:
        """The recipe that the home belongs to, None where there is no home yet.

        Raises InputError for a home that cannot be read.
        """
        try:
            if not self._owner.exists():
                return None
            return str(json.loads(self._owner.read_text(encoding="utf-8"))["recipe"])
        except (OSError, ValueError, KeyError) as error:
            raise self._unusable(error) from error

    def identity(self) -> str:
        """What tells this home from others that share a storage with it, made up once."""
        with lock(self.leases / self._owner.name):
            known: dict[str, str] = json.loads(self._owner.read_text(encoding="utf-8"))
            if "id" not in known:
                known["id"] = uuid.uuid4().hex[:12]
                write_text_atomically(self._owner, json.dumps(known))
        return known["id"]

    def _unusable(self, error: Exception) -> InputError:
        return InputError(f"home {self.root}: cannot be used ({error}); name another with --home")

    @contextlib.contextmanager
    def forgetting(self) -> Iterator[None]:
        """While a document is taken out nothing runs, and not after either where that was stopped.

        Raises InputError while a run is at work.
        """
        with lock(self.leases / self._forgetting.name):
            write_text_atomically(self._forgetting, "")
            if self.is_at_work():
                self._forgetting.unlink()
                raise InputError(f"home {self.root}: a run is at work; wait for it or cancel it")
            yield
            self._forgetting.unlink()

    def refuse_forgetting(self) -> None:
        """Raise InputError where `forgetting` was begun and has not come to its end."""
        if self._forgetting.exists():
            raise InputError(
                f"home {self.root}: a document is being forgotten; wait for that or, where it was "
                "stopped, run the same `colorfilter forget` again"
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
