import json
from pathlib import Path

import pytest

from colorfilter.data.shards import InputFile, Shard
from colorfilter.errors import InputError
from resources.home import FORMAT, Home


def test_a_home_belongs_to_one_recipe(tmp_path: Path) -> None:
    Home(tmp_path / "home").claim("one")
    Home(tmp_path / "home").claim("one")
    with pytest.raises(InputError, match="belongs to the recipe 'one', not to 'two'"):
        Home(tmp_path / "home").claim("two")


def test_checking_a_home_makes_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.check("one")
    assert home.owner() is None
    assert not list(tmp_path.iterdir())
    home.claim("one").check("one")
    assert home.owner() == "one"
    with pytest.raises(InputError, match="belongs to the recipe 'one', not to 'two'"):
        home.check("two")


def test_a_home_that_does_not_say_whose_it_is_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home.json").write_text("{")
    for use in (Home(tmp_path).check, Home(tmp_path).claim):
        with pytest.raises(InputError, match="cannot be used"):
            use("one")


def test_a_home_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be used"):
        Home(tmp_path / "file" / "home").claim("one")


def test_shards_are_kept(tmp_path: Path) -> None:
    home = Home(tmp_path).claim("one")
    assert home.shards() == []
    shard = Shard("a-1", (InputFile("a", "x.jsonl", "/data/x.jsonl", 3, "v"),))
    home.write_shards([shard])
    assert Home(tmp_path).shards() == [shard]


def test_settings_of_dagster_are_written_once(tmp_path: Path) -> None:
    home = Home(tmp_path).claim("one")
    settings = home.dagster / "dagster.yaml"
    assert "free_slots_after_run_end_seconds" in settings.read_text()
    settings.write_text("mine: true")
    home.claim("one")
    assert settings.read_text() == "mine: true"


def test_a_home_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path).claim("one")
    (tmp_path / "home.json").write_text(json.dumps({"recipe": "one", "format": FORMAT + 1}))
    for use in (home.check, home.claim):
        with pytest.raises(InputError, match=f"format {FORMAT + 1}, created by a newer"):
            use("one")
