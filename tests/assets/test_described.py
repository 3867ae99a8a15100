"""The Croissant description and the dataset card of a filtered dataset."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlcroissant
import numpy as np
import polars as pl
import pytest
from huggingface_hub import DatasetCard

from colorfilter.selection.croissant import MEANINGS
from colorfilter.selection.dataset import FILTERED
from resources.artifacts import ArtifactStore
from tests.conftest import Project

ARMS = ["color_tau4", "random"]


@pytest.fixture(scope="module", params=ARMS)
def folder(finished: Project, request: pytest.FixtureRequest) -> Path:
    store = ArtifactStore(home=str(finished.home.root))
    return store.current(f"reference/{request.param}/filtered_dataset").path


def texts(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(sorted((folder / "documents").glob("*.parquet")))


def test_the_description_is_valid_croissant(folder: Path) -> None:
    issues = mlcroissant.Dataset(str(folder / "croissant.json")).metadata.ctx.issues
    assert issues.errors == set()
    (warning,) = issues.warnings  # it has been published nowhere
    assert "datePublished" in warning


def test_records_read_by_the_description_are_the_texts(folder: Path) -> None:
    described = mlcroissant.Dataset(str(folder / "croissant.json"))
    records = list(described.records("texts"))
    expected = texts(folder).to_dicts()
    assert len(records) == len(expected) > 0
    for record, row in zip(records, expected, strict=True):
        found = {k.removeprefix("texts/"): v for k, v in record.items()}
        as_text = {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}
        assert as_text == row
    assert list(MEANINGS) == FILTERED.names


def test_every_file_is_described_with_its_hash(folder: Path) -> None:
    described = json.loads((folder / "croissant.json").read_text())
    files = [f for f in described["distribution"] if f["@type"] == "cr:FileObject"]
    there = {str(p.relative_to(folder)) for p in folder.glob("*/*")}
    assert {f["contentUrl"] for f in files} == there
    for file in files:
        content = (folder / file["contentUrl"]).read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
        assert file["contentSize"] == f"{len(content)} B"


def test_the_card_has_the_form_of_the_hub(folder: Path) -> None:
    card = DatasetCard.load(folder / "README.md")
    facts = card.data.to_dict()
    assert facts["pretty_name"] == card.text.split("\n")[0].removeprefix("# ")
    rows = len(texts(folder))
    assert facts["size_categories"] == ["n<1K" if rows < 1_000 else "1K<n<10K"]
    (split,) = facts["configs"][0]["data_files"]
    assert sorted(folder.glob(split["path"]))
    for name in re.findall(r"^- `(.*?)`", card.text, re.MULTILINE):
        assert list(folder.glob(name)), name


def test_the_snippets_of_the_card_load_what_it_says(folder: Path, tmp_path: Path) -> None:
    card = (folder / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 2
    shown = [
        f"texts.to_parquet({str(tmp_path / 'texts.parquet')!r})",
        f"np.save({str(tmp_path / 'tokens.npy')!r}, tokens)",
    ]
    program = "\n".join([*snippets, *shown])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    before = sorted(folder.rglob("*"))
    subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, check=True)
    assert sorted(folder.rglob("*")) == before
    assert pl.read_parquet(tmp_path / "texts.parquet").equals(texts(folder))
    tokens = np.load(tmp_path / "tokens.npy")
    assert np.array_equal(tokens, np.load(folder / "tokens" / "tokens.npy"))
    assert f"{len(tokens)} sequences of {tokens.shape[1]} tokens" in card
