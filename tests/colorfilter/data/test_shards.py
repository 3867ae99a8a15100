import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colorfilter.config.recipe import Source
from colorfilter.data.shards import InputFile, Shard, list_files, plan_shards, with_vanished
from colorfilter.errors import InputError


def source_of(files: object, **more: list[str]) -> Source:
    return Source(name="web", files=str(files), **more)


# Listing -------------------------------------------------------------------------------------


def test_files_are_listed_by_source_and_path_with_exclusions(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "a/skip.jsonl", "a/3.txt", "0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}" * len(name))
    sources = [
        Source(name="web", files=f"{tmp_path}/**/*.jsonl", exclude=["*/skip*"]),
        Source(name="books", files=f"{tmp_path}/a/3.txt"),
    ]
    found = [(f.source, f.path, f.size) for f in list_files(sources)]
    assert found == [
        ("web", "0.jsonl", 14),
        ("web", "a/1.jsonl", 18),
        ("web", "b/2.jsonl", 18),
        ("books", "3.txt", 14),
    ]


@pytest.mark.parametrize("pattern", ["*.parquet", "missing.jsonl", "nowhere/*.jsonl"])
def test_a_source_that_matches_nothing_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}")
    with pytest.raises(InputError, match="source web: nothing matches"):
        list_files([source_of(tmp_path / pattern)])


def test_a_source_of_which_all_is_excluded_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}")
    with pytest.raises(InputError, match="nothing matches"):
        list_files([source_of(tmp_path / "*", exclude=["*.jsonl"])])


def test_a_protocol_that_nobody_speaks_is_refused() -> None:
    with pytest.raises(InputError, match="source web: "):
        list_files([source_of("nonsense://bucket/*.jsonl")])


# Shards --------------------------------------------------------------------------------------

BUDGET = 100


def an_input_file(source: str, path: str, size: int, root: str = "/data") -> InputFile:
    return InputFile(source, path, f"{root}/{path}", size, "v1")


file_lists = st.dictionaries(
    st.tuples(
        st.sampled_from(["books", "web"]), st.from_regex(r"[a-e]/[0-9]{1,2}", fullmatch=True)
    ),
    st.integers(0, 150),
    max_size=20,
).map(lambda sizes: [an_input_file(s, p, n) for (s, p), n in sorted(sizes.items())])


@given(file_lists)
def test_every_file_is_in_exactly_one_shard_of_its_source(files: list[InputFile]) -> None:
    shards = plan_shards(files, BUDGET)
    assert Counter(f for s in shards for f in s.files) == Counter(files)
    assert all(len({f.source for f in s.files}) == 1 for s in shards)
    assert len({s.name for s in shards}) == len(shards)


@given(file_lists)
def test_shards_keep_to_the_budget_and_a_big_file_is_alone(files: list[InputFile]) -> None:
    for shard in plan_shards(files, BUDGET):
        if len(shard.files) > 1:
            assert sum(f.size for f in shard.files) <= BUDGET
            assert all(f.size <= BUDGET for f in shard.files)


@given(file_lists)
def test_a_new_shard_begins_only_where_the_next_file_does_not_fit(files: list[InputFile]) -> None:
    for source in ("books", "web"):
        shards = [s for s in plan_shards(files, BUDGET) if s.files[0].source == source]
        shards.sort(key=lambda s: s.files[0].path)
        for shard, following in itertools.pairwise(shards):
            assert sum(f.size for f in shard.files) + following.files[0].size > BUDGET


@given(file_lists)
def test_names_do_not_depend_on_the_root_folder_or_version(files: list[InputFile]) -> None:
    moved = [replace(f, uri=f"/elsewhere/{f.path}", version="v2") for f in files]
    assert [s.name for s in plan_shards(files, BUDGET)] == [
        s.name for s in plan_shards(moved, BUDGET)
    ]


@given(file_lists, st.integers(0, 150))
def test_a_new_file_leaves_every_standing_shard_as_it_was(
    files: list[InputFile], size: int
) -> None:
    before = plan_shards(files, BUDGET)
    grown = sorted([*files, an_input_file("web", "c/new", size)], key=lambda f: (f.source, f.path))
    after = plan_shards(grown, BUDGET, before)
    assert set(before) <= set(after)
    assert len(after) == len(before) + 1


@given(file_lists.filter(bool), st.data())
def test_a_changed_size_retires_only_the_shard_of_the_file(
    files: list[InputFile], data: st.DataObject
) -> None:
    before = plan_shards(files, BUDGET)
    i = data.draw(st.integers(0, len(files) - 1))
    changed = [*files[:i], replace(files[i], size=files[i].size + 1), *files[i + 1 :]]
    after = plan_shards(changed, BUDGET, before)
    (retired,) = [s for s in before if files[i] in s.files]
    assert {s.name for s in before} - {s.name for s in after} == {retired.name}
    assert Counter(f for s in after for f in s.files) == Counter(changed)


@given(file_lists.filter(bool), st.data())
def test_a_removed_file_retires_only_its_shard(files: list[InputFile], data: st.DataObject) -> None:
    before = plan_shards(files, BUDGET)
    gone = data.draw(st.sampled_from(files))
    after = plan_shards([f for f in files if f != gone], BUDGET, before)
    assert {s for s in before if gone not in s.files} <= set(after)
    assert all(gone not in s.files for s in after)


@given(file_lists)
def test_planning_again_changes_nothing(files: list[InputFile]) -> None:
    shards = plan_shards(files, BUDGET)
    assert plan_shards(files, BUDGET, shards) == shards
    assert plan_shards(files, BUDGET) == shards


@given(file_lists)
def test_shards_survive_json(files: list[InputFile]) -> None:
    for shard in plan_shards(files, BUDGET):
        assert Shard.from_facts(json.loads(json.dumps(shard.facts()))) == shard


def test_a_standing_shard_takes_the_new_place_and_version_of_its_files() -> None:
    files = [an_input_file("web", "a", 10)]
    (standing,) = plan_shards(files, BUDGET)
    moved = [replace(files[0], uri="/new/a", version="v2")]
    assert plan_shards(moved, BUDGET, [standing]) == [Shard(standing.name, tuple(moved))]


# Vanished files ------------------------------------------------------------------------------


WEB = Source(name="web", files="/data/*.jsonl")


@given(st.sets(st.integers(0, 12), min_size=1), st.data())
def test_a_file_that_vanishes_moves_no_shard(numbers: set[int], data: st.DataObject) -> None:
    files = [an_input_file("web", f"{n:02d}.jsonl", 40) for n in sorted(numbers)]
    read = plan_shards(files, BUDGET)
    gone = data.draw(st.sets(st.sampled_from(files)))
    left = [f for f in files if f not in gone]
    kept = with_vanished(left, [WEB], read)
    assert {replace(f, vanished=False) for f in kept if f.vanished} == gone
    after = plan_shards(kept, BUDGET, read)
    assert [s.name for s in after] == [s.name for s in read]
    back = with_vanished(files, [WEB], after)
    assert plan_shards(back, BUDGET, after) == read


@pytest.mark.parametrize(
    "source",
    [
        Source(name="web", files="/other/*.jsonl"),
        Source(name="web", files="/data/*.parquet"),
        Source(name="web", files="/data/*.jsonl", exclude=["*/a.jsonl"]),
        Source(name="more", files="/data/*.jsonl"),
    ],
)
def test_what_the_recipe_no_longer_asks_for_has_not_vanished(source: Source) -> None:
    files = [an_input_file("web", "a.jsonl", 40), an_input_file("web", "b.jsonl", 40)]
    assert with_vanished(files[1:], [source], plan_shards(files, BUDGET)) == files[1:]


@pytest.mark.parametrize("change", [{"size": 41}, {"version": "v2"}])
def test_with_a_changed_file_a_shard_cannot_keep_a_vanished_one(change: dict[str, Any]) -> None:
    files = [an_input_file("web", name, 40) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    read = plan_shards(files, BUDGET)
    assert [len(s.files) for s in read] in ([2, 1], [1, 2])
    now = [replace(files[0], **change), files[2]]
    assert with_vanished(now, [WEB], read) == now
