"""README and docs: links lead somewhere, and every printed command and query runs."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Project, copy_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages whose commands are a user's. Those of the others change the machine.
RUN = [ROOT / "README.md", *(ROOT / "docs" / f"{n}.md" for n in ("guide", "scores", "auditing"))]
ELSEWHERE = {"ui": "tests/pipelines/test_ui.py"}  # commands that another test runs


def anchors(page: Path) -> set[str]:
    """The names by which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def printed() -> Iterator[str]:
    """Yield every command that the pages print in a block."""
    for page in RUN:
        text = page.read_text(encoding="utf-8")
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            lines = block.splitlines() if not language else []
            yield from (line for line in lines if line.startswith(".venv/bin/"))


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return copy_of(finished, tmp_path_factory.mktemp("docs"))


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in printed() if words_of(c)[1] not in ELSEWHERE])
def test_a_printed_command_runs(command: str, project: Project) -> None:
    """On the tests' own project, whose names take the place of those that are printed."""
    project.write()
    home, path = project.home, project.path
    (shard, *_) = home.shards()
    names = {
        "library-3698f537dc:408": f"{shard.name}:0",
        "pdb.py:1": f"{Path(shard.files[0].path).name}:1",
        "reference/color_tau16/target_model[seed_1]": "reference/color_tau4/target_model[seed_1]",
        "mine.yaml": str(path),
        "mine": str(home.root),
        "/mnt/books": str(path.parent / "backup"),
        "books": str(path.parent / "books"),
        "events.jsonl": str(path.parent / "events.jsonl"),
    }
    program, *words = words_of(command)
    given = [names.get(word, word.replace(".colorfilter/", f"{home.root}/")) for word in words]
    where = {"COLORFILTER_HOME": str(home.root), "COLORFILTER_RECIPE": str(path)}
    done = subprocess.run(
        [Path(sys.executable).parent / Path(program).name, *given],
        input="y\n",
        env={**os.environ, **where, "PYTHONPATH": str(ROOT)},
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
