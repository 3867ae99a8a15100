"""Forget documents: remove them from artifacts, score tables and Dagster's history."""

import shutil
from collections.abc import Sequence

from rich.console import Console

from colorfilter.errors import InputError
from commands.forget.artifacts import (
    Shows,
    Survey,
    any_of,
    find,
    find_copies,
    showing,
    survey,
    take_out,
)
from commands.forget.history import remove_from_history
from resources.artifacts import ArtifactStore
from resources.audit import WORKPLACE
from resources.gpu import Gpu
from resources.home import Home

SHOWN = 3  # files that still show a text


def look_up(home: Home, whats: Sequence[str]) -> list[Survey]:
    """Find documents by name: what contains each, and which models were trained on it.

    Raises InputError for a name that matches no document or several, or an item of a task.
    """
    artifacts = ArtifactStore(home=str(home.root))
    documents = {found.sha256: found for found in (find(artifacts, w) for w in whats)}
    surveys = [survey(artifacts, document) for document in documents.values()]
    for found in surveys:
        finished = (home.root / h.path for h in found.holdings if not h.unfinished)
        if any((folder / "tasks").exists() for folder in finished):
            raise InputError(
                f"{min(found.document.places)}: is an item of a task; remove it from the "
                "task's files, then `colorfilter run`, which reads them again"
            )
    return surveys


def forget(home: Home, surveys: Sequence[Survey], gpu: Gpu) -> int:
    """Remove documents from everything that contains them, including `gpu`'s remote copies.

    Returns the number of Dagster runs removed. The score tables are deleted; the job `refresh`
    publishes them again without the documents. Raises InputError while a run is in progress, or if
    a file still shows the text at the end. Raises UnreachableError like Gpu.discard_copies.
    """
    artifacts = ArtifactStore(home=str(home.root))
    texts = [found.document.sha256 for found in surveys]
    names = sorted(min(found.document.doc_ids) for found in surveys)
    gpu.reach()  # check first: once begun, nothing else runs until this has completed
    with home.exclusively(f"colorfilter forget {' '.join(names)}"):
        # Since the documents were looked up, a run may have read another copy.
        surveys = [survey(artifacts, find_copies(artifacts, sha256)) for sha256 in texts]
        shows = any_of([found.document for found in surveys])
        gpu.discard_copies(home.artifacts)
        runs = remove_from_history(home.dagster, shows)
        shutil.rmtree(home.root / WORKPLACE, ignore_errors=True)
        home.scores.unlink(missing_ok=True)
        take_out(artifacts, surveys, lambda: _refuse_showing(home, shows))
    return runs


def _refuse_showing(home: Home, shows: Shows) -> None:
    """Raise InputError if a file of a home still shows a text, outside of tables and tokens."""
    left = [str(file) for file in showing(home.root.rglob("*"), shows)]
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        raise InputError(
            f"{', '.join(left[:SHOWN])}{more}: still shows the text; delete it and run the same "
            "command again"
        )


def print_surveys(console: Console, surveys: Sequence[Survey]) -> None:
    """Print where each document is, what will be replaced or deleted, and what trained on it."""
    for found in surveys:
        first, *others = sorted(found.document.places)
        text = found.document.text
        lines = [f"{first}, {len(text):,} characters" if text else first]
        lines += [f"  and at {place}" for place in others]
        for holding in found.holdings:
            files = "" if holding.unfinished else ", ".join(holding.files)
            what = f"{files} will be rewritten without it" if files else "will be deleted"
            lines.append(f"contained in {holding.name}: {what}")
        lines += [f"trained on it: {name} {made[:16]}" for name, made in found.learned]
        console.print("\n".join(lines), markup=False, emoji=False, highlight=False, soft_wrap=True)
