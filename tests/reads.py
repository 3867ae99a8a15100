"""Record which assets each step of a run reads, to compare with what it declares."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from resources.artifacts import Artifact, ArtifactStore
from resources.exclusions import EXCLUSION
from resources.score_store import ScoreStore

# By step, the assets that were read; a step makes one asset, or several together.
Reads = dict[tuple[str, ...], set[str]]


def at_work() -> tuple[str, ...]:
    """The assets that this process is making; none outside of a step."""
    try:
        context = dg.AssetExecutionContext.get()
    except dg.DagsterInvariantViolationError:
        return ()
    return tuple(sorted(key.to_user_string() for key in context.selected_asset_keys))


@contextlib.contextmanager
def recorded_in(path: Path) -> Iterator[None]:
    """Add a line of JSON for every asset that a step reads in the meantime."""
    found: set[tuple[tuple[str, ...], str]] = set()
    current, read = ArtifactStore.current, ScoreStore.read

    def current_(store: ArtifactStore, asset: str, partition: str | None = None) -> Artifact:
        found.add((at_work(), asset))
        return current(store, asset, partition)

    def read_(store: ScoreStore, *refined: Any) -> Any:
        found.add((at_work(), "score_tables"))
        return read(store, *refined)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ArtifactStore, "current", current_)
        monkeypatch.setattr(ScoreStore, "read", read_)
        yield
    with path.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(pair) + "\n" for pair in sorted(found) if pair[0])


def recorded(path: Path) -> Reads:
    """What was recorded in a file, without what a step reads of its own assets."""
    reads: Reads = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        step, asset = json.loads(line)
        if asset not in {*step, EXCLUSION}:
            reads.setdefault(tuple(step), set()).add(asset)
    return reads


def assert_declared(definitions: dg.Definitions, reads: Reads) -> None:
    """Check that every step read exactly what its assets declare."""
    graph = definitions.resolve_asset_graph()
    for step, found in reads.items():
        parents = [graph.get(dg.AssetKey(name.split("/"))).parent_keys for name in step]
        declared = {key.to_user_string() for keys in parents for key in keys}
        assert not found - declared, f"{step} reads what it does not declare"
        assert not declared - found, f"{step} declares what it does not read"
