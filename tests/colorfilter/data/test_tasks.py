"""Items of the eight tasks: read in both formats, rendered as text, and split."""

import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from colorfilter.config.recipe import Task
from colorfilter.data import tasks
from colorfilter.data.documents import text_sha256
from colorfilter.data.shards import list_files
from colorfilter.data.tasks import hub_fields, read_items, split_tasks, to_item
from colorfilter.errors import InputError
from tests.task_items import ITEMS, PROMPTS, write_items


@pytest.mark.parametrize("task", tasks.TASKS)
def test_an_item_is_its_question_and_its_choices_of_which_one_is_correct(task: str) -> None:
    row, text, n_choices = ITEMS[task]
    item = to_item(task, hub_fields(task, row))
    assert item.text == text
    assert len(item.contexts) == len(item.continuations) == n_choices
    others = [c + k for c, k in zip(item.contexts, item.continuations, strict=True)]
    assert others.index(text) == item.gold


@pytest.mark.parametrize(
    ("task", "field", "other"),
    [
        ("piqa", "label", str),
        ("boolq", "label", str),
        ("hellaswag", "label", int),
        ("winogrande", "answer", int),
        ("arc_easy", "answerKey", "{} ".format),
    ],
)
def test_an_answer_in_another_form_is_put_into_that_of_the_harness(
    task: str, field: str, other: Callable[[Any], Any]
) -> None:
    row = ITEMS[task][0]
    assert other(row[field]) != row[field]
    assert hub_fields(task, {**row, field: other(row[field])}) == hub_fields(task, row) == row


@pytest.mark.parametrize("task", sorted(PROMPTS))
def test_a_finished_prompt_is_the_same_item_as_the_hubs_fields(task: str) -> None:
    assert to_item(task, hub_fields(task, PROMPTS[task])) == to_item(
        task, hub_fields(task, ITEMS[task][0])
    )


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": -1}),
        ("piqa", {"goal": "g", "sol1": "a", "label": 0}),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": " ", "label": 0}),
        ("piqa", {"goal": "\ud800", "sol1": "a", "sol2": "b", "label": 0}),
        ("hellaswag", {**ITEMS["hellaswag"][0], "label": ""}),
        ("winogrande", {**ITEMS["winogrande"][0], "answer": ""}),
        ("winogrande", {**ITEMS["winogrande"][0], "sentence": "nothing to fill in"}),
        ("arc_easy", {**ITEMS["arc_easy"][0], "answerKey": "E"}),
        ("arc_easy", {**PROMPTS["arc_easy"], "gold": 9}),
        ("arc_easy", {**PROMPTS["arc_easy"], "query": "What is it?"}),
        ("arc_easy", {**PROMPTS["arc_easy"], "choices": list("abcdefghij"), "gold": 9}),
        ("boolq", {**PROMPTS["boolq"], "choices": ["maybe", "never"]}),
        ("boolq", ["a", "list"]),
        ("sciq", {**ITEMS["sciq"][0], "support": None}),
    ],
)
def test_what_is_no_item_is_a_reject_with_the_reason(
    tmp_path: Path, task: str, row: object
) -> None:
    good = ITEMS[task][0]
    files = write_items(tmp_path / "items", task, [good, row])
    split(tmp_path / "out", test={task: files}, train=trainable(tmp_path))
    (reject,) = pl.read_parquet(tmp_path / "out" / "rejects.parquet").to_dicts()
    assert (reject["source_line"], reject["source"]) == (2, task)
    assert reject["reason"].startswith(f"no item of {task}: ")
    assert len(read_items(tmp_path / "out" / "tasks" / f"{task}.jsonl")) == 1


# Split ---------------------------------------------------------------------------------------


def trainable(folder: Path) -> dict[str, Any]:
    rows = [{**ITEMS["openbookqa"][0], "question_stem": f"Number {i} is"} for i in range(9)]
    return {"openbookqa": write_items(folder / "train", "openbookqa", rows)}


def piqa(numbers: range) -> list[dict[str, Any]]:
    return [
        {"goal": f"Goal {i}", "sol1": f"way {i}", "sol2": "no way", "label": i % 2} for i in numbers
    ]


def split(folder: Path, **changes: Any) -> dict[str, int]:
    folder.mkdir(exist_ok=True)
    settings = {"seed": 0, "held_out": 0.25, "probe": 0.2, "test_items": None, "folder": folder}
    return split_tasks(**{**settings, **changes})


def texts(folder: Path, part: str) -> list[str]:
    return pl.read_parquet(folder / part / "documents.parquet")["text"].to_list()


def test_test_items_are_held_out_and_train_items_are_probe_and_d_down(tmp_path: Path) -> None:
    train = {"piqa": write_items(tmp_path / "train", "piqa", piqa(range(40)))}
    test = {"piqa": write_items(tmp_path / "test", "piqa", piqa(range(100, 110)))}
    counts = split(tmp_path, train=train, test=test)
    learnt = {to_item("piqa", row).text for row in piqa(range(40))}
    tested = {to_item("piqa", row).text for row in piqa(range(100, 110))}
    probe, down = texts(tmp_path, "probe"), texts(tmp_path, "down")
    assert set(texts(tmp_path, "held_out")) == tested
    assert set(probe) | set(down) == learnt
    assert len(probe) + len(down) == 40
    assert 0.15 < sum(map(len, probe)) / sum(map(len, probe + down)) < 0.25
    assert counts["held_out_documents"] == counts["test_items"] == 10
    assert counts["test_choices"] == 20
    assert counts["down_chars"] == sum(map(len, down))
    assert {i.text for i in read_items(tmp_path / "tasks" / "piqa.jsonl")} == tested


def test_documents_say_where_their_item_stands(tmp_path: Path) -> None:
    train = {"piqa": write_items(tmp_path / "train", "piqa", piqa(range(20)))}
    test = {"piqa": write_items(tmp_path / "test", "piqa", piqa(range(100, 103)))}
    split(tmp_path, train=train, test=test)
    for part in ("held_out", "probe", "down"):
        for row in pl.read_parquet(tmp_path / part / "documents.parquet").to_dicts():
            line = Path(row["source_file"]).read_text().splitlines()[row["source_line"] - 1]
            assert to_item("piqa", json.loads(line)).text == row["text"]
            assert row["sha256"] == text_sha256(row["text"])
            assert row["n_chars"] == len(row["text"])
            assert row["source"] == "piqa"


def test_a_file_that_is_train_and_test_is_split_by_the_seed(tmp_path: Path) -> None:
    files = {"piqa": write_items(tmp_path / "both", "piqa", piqa(range(40)))}
    halves = {}
    for seed in (0, 0, 1):
        out = tmp_path / f"out{seed}"
        split(out, train=files, test=files, seed=seed)
        tested, learnt = texts(out, "held_out"), texts(out, "down") + texts(out, "probe")
        assert len(tested) == 10
        assert len({*tested, *learnt}) == len(tested) + len(learnt) == 40
        assert halves.setdefault(seed, tested) == tested
    assert set(halves[0]) != set(halves[1])


def test_no_test_item_is_trained_on_be_it_drawn_or_not(tmp_path: Path) -> None:
    train = {"piqa": write_items(tmp_path / "train", "piqa", piqa(range(30)))}
    test = {"piqa": write_items(tmp_path / "test", "piqa", piqa(range(20, 40)))}
    counts = split(tmp_path, train=train, test=test, test_items=5)
    learnt = {*texts(tmp_path, "probe"), *texts(tmp_path, "down")}
    assert learnt == {to_item("piqa", row).text for row in piqa(range(20))}
    assert len(texts(tmp_path, "held_out")) == counts["test_items"] == 5
    assert counts["duplicates"] == 10
    reasons = pl.read_parquet(tmp_path / "rejects.parquet")["reason"]
    assert set(reasons) == {"a test item has the same text"}


def test_test_items_are_drawn_by_the_seed_and_more_are_a_superset(tmp_path: Path) -> None:
    test = {"piqa": write_items(tmp_path / "test", "piqa", piqa(range(50)))}
    drawn = {}
    for n in (5, 20):
        out = tmp_path / f"out{n}"
        split(out, train=trainable(tmp_path), test=test, test_items=n)
        drawn[n] = {i.text for i in read_items(out / "tasks" / "piqa.jsonl")}
    assert len(drawn[5]) == 5
    assert drawn[5] < drawn[20]
    assert drawn[5] != {to_item("piqa", row).text for row in piqa(range(5))}


def test_equal_texts_stand_once_but_every_test_item_is_evaluated(tmp_path: Path) -> None:
    twins = [{**piqa(range(1))[0], "sol2": other} for other in ("no", "never")]
    test = {"piqa": write_items(tmp_path / "test", "piqa", twins)}
    split(tmp_path, train=trainable(tmp_path), test=test)
    assert len(texts(tmp_path, "held_out")) == 1
    assert len(read_items(tmp_path / "tasks" / "piqa.jsonl")) == 2


@pytest.mark.parametrize("task", ["arc_easy", "hellaswag", "winogrande"])
def test_items_of_the_hubs_parquet_are_those_of_json_lines(tmp_path: Path, task: str) -> None:
    row = ITEMS[task][0]
    pl.DataFrame([row]).write_parquet(tmp_path / f"{task}.parquet")
    source = Task(name=task, test=str(tmp_path / "*.parquet")).source("test")
    assert source is not None
    split(tmp_path, train=trainable(tmp_path), test={task: list_files([source])})
    assert read_items(tmp_path / "tasks" / f"{task}.jsonl") == [to_item(task, row)]


def test_files_of_another_task_are_refused_with_the_reason(tmp_path: Path) -> None:
    test = {"winogrande": write_items(tmp_path / "test", "piqa", piqa(range(3)))}
    with pytest.raises(InputError, match=r"task winogrande: .*no field 'sentence'"):
        split(tmp_path, train=trainable(tmp_path), test=test)


def test_too_few_train_items_are_refused(tmp_path: Path) -> None:
    train = {"piqa": write_items(tmp_path / "train", "piqa", piqa(range(1)))}
    test = {"piqa": write_items(tmp_path / "test", "piqa", piqa(range(5, 9)))}
    with pytest.raises(InputError, match="1 train items are too few"):
        split(tmp_path, train=train, test=test)


def test_a_missing_harness_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install '.\[eval\]'"):
        tasks.refuse_without_harness()


# Real files ----------------------------------------------------------------------------------

DATA = Path(os.environ.get("COLORFILTER_TEST_DATA", "/nowhere")) / "mc"
real = pytest.mark.skipif(not DATA.is_dir(), reason="COLORFILTER_TEST_DATA has no mc/")


@real
@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_real_item_is_read_with_the_gold_that_its_file_says(task: str) -> None:
    for path in sorted((DATA / task).glob("*.jsonl.gz")):
        with gzip.open(path, "rt") as lines:
            rows = [json.loads(line) for line in lines]
        for row in rows:
            item = to_item(task, hub_fields(task, row))
            if task == "winogrande":
                assert item.gold == int(row["answer"]) - 1
                assert item.correct[0].endswith(row[f"option{row['answer']}"])
            elif "gold" in row and task not in ("boolq", "hellaswag"):
                assert item.correct[1] == f" {row['choices'][row['gold']]}"
            elif task == "boolq":
                assert item.correct == (row["query"], f" {row['choices'][row['gold']]}")
            elif task == "piqa":
                assert item.correct[1] == f" {row[('sol1', 'sol2')[row['label']]]}"
            else:
                assert item.gold == row["gold"]


@real
def test_hellaswags_finished_prompts_stay_but_for_a_few_marks() -> None:
    with gzip.open(DATA / "hellaswag" / "validation_part.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    items = [to_item("hellaswag", hub_fields("hellaswag", row)) for row in rows]
    changed = sum(i.contexts[0] != r["query"] for i, r in zip(items, rows, strict=True))
    assert changed <= 1


@real
def test_real_splits_share_no_text(tmp_path: Path) -> None:
    train, test = {}, {}
    for task in ("arc_easy", "sciq"):
        pattern = str(DATA / task / "*.jsonl.gz")
        named = Task(name=task, train=pattern, test=pattern)
        for part, files in (("train", train), ("test", test)):
            source = named.source(part)
            assert source is not None
            files[task] = list_files([source])
    counts = split(tmp_path, train=train, test=test, held_out=0.3)
    seen = [t for part in ("held_out", "probe", "down") for t in texts(tmp_path, part)]
    assert len(set(seen)) == len(seen) == counts["documents"] == 2251 + 570 + 500 - 1
    assert counts["rejects"] == 0
