"""Forgetting documents from end to end: artifacts, score tables, and what Dagster has on record."""

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
    """Where the documents of these names are, and what learned from them.

    Raises InputError for what names none or several, and what is an item of a task.
    """
    artifacts = ArtifactStore(home=str(home.root))
    documents = {found.sha256: found for found in (find(artifacts, w) for w in whats)}
    surveys = [survey(artifacts, document) for document in documents.values()]
    for found in surveys:
        if any((home.root / holding.path / "tasks").exists() for holding in found.holdings):
            raise InputError(
                f"{min(found.document.places)}: is an item of a task; take it out of the "
                "task's files and run, which reads them anew"
            )
    return surveys


def forget(home: Home, surveys: Sequence[Survey], gpu: Gpu) -> int:
    """Take the documents out of all that holds them, and of the copies that `gpu` works from.

    Returns how many runs of Dagster went too. The score tables are removed: they are published
    again without the documents. Raises InputError while a run is at work, and where a text is still
    shown in the end; UnreachableError as Gpu.discard_copies does.
    """
    documents = [found.document for found in surveys]
    shows = any_of(documents)
    names = sorted(min(document.doc_ids) for document in documents)
    gpu.reach()  # before it is begun, for nothing runs until it has come to its end
    with home.exclusively(f"colorfilter forget {' '.join(names)}"):
        gpu.discard_copies(home.artifacts)
        runs = remove_from_history(home.dagster, shows)
        shutil.rmtree(home.root / WORKPLACE, ignore_errors=True)
        take_out(ArtifactStore(home=str(home.root)), surveys)
        home.scores.unlink(missing_ok=True)
        left = [str(file) for file in showing(home.root.rglob("*"), shows)]
        if left:
            raise InputError(
                f"{min(documents[0].places)}: {len(left)} files still show text of it, the first "
                f"{left[0]}; remove it and run the same command again"
            )
    return runs


def print_surveys(console: Console, surveys: Sequence[Survey]) -> None:
    """Print what will be taken out where, and what learned from it."""
    for found in surveys:
        first, *others = sorted(found.document.places)
        text = found.document.text
        lines = [f"{first}, {len(text):,} characters" if text else first]
        lines += [f"  and at {place}" for place in others]
        for holding in found.holdings:
            files = "" if holding.unfinished else ", ".join(holding.files)
            what = f"replaced by a version without it in {files}" if files else "removed"
            lines.append(f"held by {holding.name}: {what}")
        lines += [f"learned from it: {name} {made[:16]}" for name, made in found.learned]
        console.print("\n".join(lines), markup=False, emoji=False, highlight=False, soft_wrap=True)
