"""Forget documents: remove them from artifacts, score tables and Dagster's history."""

import shutil
from collections.abc import Sequence

from rich.console import Console

from colorfilter.errors import InputError
from commands.forget.artifacts import Survey, any_of, find, showing, survey, take_out
from commands.forget.history import remove_from_history
from resources.artifacts import ArtifactStore
from resources.audit import WORKPLACE
from resources.gpu import Gpu
from resources.home import Home


def look_up(home: Home, whats: Sequence[str]) -> list[Survey]:
    """Find documents by name: what contains each, and which models were trained on it.

    Raises InputError for a name that matches no document or several, or an item of a task.
    """
    artifacts = ArtifactStore(home=str(home.root))
    documents = {found.sha256: found for found in (find(artifacts, w) for w in whats)}
    surveys = [survey(artifacts, document) for document in documents.values()]
    for found in surveys:
        if any((home.root / holding.path / "tasks").exists() for holding in found.holdings):
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
    documents = [found.document for found in surveys]
    shows = any_of(documents)
    names = sorted(min(document.doc_ids) for document in documents)
    gpu.reach()  # check first: once begun, nothing else runs until this has completed
    with home.exclusively(f"colorfilter forget {' '.join(names)}"):
        gpu.discard_copies(home.artifacts)
        runs = remove_from_history(home.dagster, shows)
        shutil.rmtree(home.root / WORKPLACE, ignore_errors=True)
        take_out(ArtifactStore(home=str(home.root)), surveys)
        home.scores.unlink(missing_ok=True)
        left = [str(file) for file in showing(home.root.rglob("*"), shows)]
        if left:
            raise InputError(
                f"{min(documents[0].places)}: {len(left)} files still show its text (first: "
                f"{left[0]}); delete them and run the same command again"
            )
    return runs


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
