import re
import sysconfig
from pathlib import Path

import pytest
import yaml

from colorfilter.config.load import as_text, load
from colorfilter.errors import InputError
from tests.colorfilter.recipes import (
    MISSING,
    PIQA,
    changed,
    load_content,
    problem,
    with_tasks,
)

RECIPES = Path(__file__).parents[3] / "pipelines" / "recipes"


def test_the_files_of_tasks_are_expanded_as_those_of_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_DATA", "/data/mine")
    content = with_tasks({**PIQA, "train": "${MY_DATA}/train.jsonl"})
    (task,) = load_content(tmp_path, content).domains[0].tasks
    assert (task.train, task.test) == ("/data/mine/train.jsonl", str(tmp_path / PIQA["test"]))
    source = task.source("train")
    assert source is not None
    assert (source.name, source.files) == ("piqa", "/data/mine/train.jsonl")
    monkeypatch.delenv("MY_DATA")
    assert "domains.t.piqa.train" in problem(tmp_path, content)


def test_several_problems_are_counted_but_one_is_told(tmp_path: Path) -> None:
    content = changed("target.training_tokens", MISSING) | {"more": 1, "still_more": 2}
    assert problem(tmp_path, content).endswith("(and 2 more)")


@pytest.mark.parametrize("content", [[1, 2], "words", None])
def test_what_is_not_a_mapping_is_refused(tmp_path: Path, content: object) -> None:
    assert "mapping" in problem(tmp_path, content)


def test_a_user_that_is_not_there_is_named_with_its_field(tmp_path: Path) -> None:
    message = problem(tmp_path, changed("corpus.sources.0.files", "~nobody_of_this_name/*.jsonl"))
    assert "corpus.sources.web.files: ~nobody_of_this_name" in message


@pytest.mark.parametrize("data", [b"name: [1, 2\nother: }", b"a: \t- b\n\tc", b"\xff\xfe\x00bad"])
def test_what_is_not_yaml_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=re.escape(str(path))) as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.yaml: cannot be read"):
        load(tmp_path / "nothing.yaml")


def test_an_unset_environment_variable_is_named_with_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    message = problem(tmp_path, changed("corpus.sources.0.files", "${NOT_SET_ANYWHERE}/*.jsonl"))
    assert "corpus.sources.web.files" in message
    assert "NOT_SET_ANYWHERE" in message
    message = problem(tmp_path, changed("domains.0.sources.0.files", "$NOT_SET_ANYWHERE/*.txt"))
    assert "domains.books.pages.files" in message
    content = changed("tokenizer", {"path": "$NOT_SET_ANYWHERE/tokenizer"})
    assert "tokenizer.path" in problem(tmp_path, content)


def test_without_its_sources_a_recipe_needs_no_variable_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    content = changed("corpus.sources.0.files", "$NOT_SET_ANYWHERE/*.jsonl")
    content["prior"] = {"sample_chars": 10, "path": "./checkpoint"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    recipe = load(path, sources=False)
    assert recipe.corpus.sources[0].files == "$NOT_SET_ANYWHERE/*.jsonl"
    assert recipe.prior.path == str(tmp_path / "checkpoint")


def test_a_set_environment_variable_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_DATA", "/data/mine")
    recipe = load_content(tmp_path, changed("corpus.sources.0.files", "${MY_DATA}/*.jsonl"))
    assert recipe.corpus.sources[0].files == "/data/mine/*.jsonl"


@pytest.mark.parametrize(("name", "key"), [("stdlib", "stdlib"), ("packages", "purelib")])
def test_folders_of_python_are_filled_in(name: str, key: str, tmp_path: Path) -> None:
    source = {"name": "web", "files": f"{{{name}}}/json/*.py", "exclude": [f"{{{name}}}/*/a.py"]}
    recipe = load_content(tmp_path, changed("corpus.sources.0", source))
    assert recipe.corpus.sources[0].files == f"{sysconfig.get_path(key)}/json/*.py"
    assert recipe.corpus.sources[0].exclude == [f"{sysconfig.get_path(key)}/*/a.py"]


def test_patterns_of_what_to_exclude_are_relative_to_nothing(tmp_path: Path) -> None:
    source = {"name": "web", "files": "*.jsonl", "exclude": ["*/skip*"]}
    recipe = load_content(tmp_path, changed("corpus.sources.0", source))
    assert recipe.corpus.sources[0].exclude == ["*/skip*"]


def test_relative_paths_are_relative_to_the_recipes_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipes"
    elsewhere = tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    content = changed("tokenizer", {"path": "./tokenizer"})
    content["prior"] = {"path": "../models/prior"}
    recipe = load_content(folder, content)
    assert recipe.corpus.sources[0].files == str(folder / "data/*.jsonl")
    assert recipe.domains[0].sources[0].files == str(folder / "books/*.txt")
    assert recipe.tokenizer.path == str(folder / "tokenizer")
    assert Path(recipe.prior.path or "") == folder / "../models/prior"


@pytest.mark.parametrize("place", ["/data/*.jsonl", "hf://datasets/a/b/*.parquet", "s3://b/*.gz"])
def test_absolute_paths_and_urls_stay(tmp_path: Path, place: str) -> None:
    recipe = load_content(tmp_path, changed("corpus.sources.0.files", place))
    assert recipe.corpus.sources[0].files == place


def test_a_hub_name_stays(tmp_path: Path) -> None:
    content = changed("prior", {"sample_chars": 10, "path": "EleutherAI/pythia-160m"})
    assert load_content(tmp_path, content).prior.path == "EleutherAI/pythia-160m"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in re.findall(r"\$\{?([A-Za-z_]\w*)", path.read_text()):
        monkeypatch.setenv(variable, "/some/folder")
    recipe = load(path)
    assert recipe.arms
    assert all("$" not in s.files for s in recipe.corpus.sources)


def test_the_sample_is_among_the_shipped_recipes() -> None:
    assert (RECIPES / "sample.yaml").is_file()


@pytest.mark.parametrize("shipped", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_as_text_is_the_same_recipe(shipped: Path, tmp_path: Path) -> None:
    recipe = load(shipped, sources=False)
    (tmp_path / "kept.yaml").write_text(as_text(recipe), encoding="utf-8")
    assert load(tmp_path / "kept.yaml", sources=False) == recipe
