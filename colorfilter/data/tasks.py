"""Multiple-choice tasks as a domain: reading, formatting and splitting items.

Items are formatted with the templates of lm-evaluation-harness, like the paper's authors do
(arXiv 2406.10670, section 4): the text of an item is its question and the correct answer. Train
items go to D_down and the probe, test items to held-out. Train items whose text equals that of a
test item, drawn or not, are removed.
"""

import contextlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from colorfilter.config.recipe import Source, TaskName
from colorfilter.data.documents import (
    DOCUMENTS,
    REJECTS,
    Contents,
    Reject,
    Row,
    document_id,
    read_rows,
    text_sha256,
    write_contents,
)
from colorfilter.data.sampling import SPLITS, random_key
from colorfilter.data.shards import InputFile
from colorfilter.errors import InputError
from colorfilter.progress import Progress, silent
from colorfilter.storage.parquet import TableWriter

TASKS: tuple[TaskName, ...] = get_args(TaskName)

# Fields of each task's data set on the hub that lm-evaluation-harness reads.
FIELDS = {
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "boolq": ("passage", "question", "label"),
    "sciq": ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
}
# Field of an item's answer, and its conversion to the form that the harness expects.
_KEY = ("answerKey", lambda key: str(key).strip())
ANSWERS: dict[str, tuple[str, Callable[[Any], int | str]]] = {
    "piqa": ("label", int),
    "hellaswag": ("label", lambda label: str(int(label))),
    "boolq": ("label", int),
    "openbookqa": _KEY,
    "arc_easy": _KEY,
    "arc_challenge": _KEY,
    "winogrande": ("answer", lambda answer: str(int(answer))),
}
# The fields of FIELDS inside a formatted prompt, as in OLMo's files of these tasks.
_ARC = r"Question: (?P<question>.*)\nAnswer:"
PROMPTS = {
    "hellaswag": r"(?P<activity_label>.*?): (?P<ctx_a>.*)",
    "boolq": r"(?P<passage>.*)\nQuestion: (?P<question>.*)\?\nAnswer:",
    "openbookqa": r"Question: (?P<question_stem>.*)\nAnswer:",
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
}
LETTERS = "ABCDEFGH"

Files = Mapping[str, Sequence[InputFile]]  # task name -> files


@dataclass(frozen=True)
class Item:
    """A formatted multiple-choice question: a context and a continuation for every choice.

    The contexts of all choices are the same, except in winogrande, where the choice is part of the
    context and the continuations are the same (partial evaluation). `gold` is the index of the
    correct choice.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int

    @property
    def correct(self) -> tuple[str, str]:
        """Context and continuation of the correct choice."""
        return self.contexts[self.gold], self.continuations[self.gold]

    @property
    def text(self) -> str:
        """Question and correct continuation: the text that a model trains on."""
        return "".join(self.correct)


def hub_fields(task: str, row: Any) -> dict[str, Any]:
    """Return the fields of an item that lm-evaluation-harness reads.

    `row` has either the fields of the task's data set on the hub, or a formatted prompt: `query`,
    `choices` and `gold`, the index from 0. Raises ValueError if it has neither.
    """
    if not isinstance(row, dict):
        raise ValueError("not a record")
    missing = [f for f in FIELDS[task] if row.get(f) is None]
    if not missing:
        fields = {f: row[f] for f in FIELDS[task]}
        if task in ANSWERS:
            field, form = ANSWERS[task]
            fields[field] = form(fields[field])
        return fields
    if task not in PROMPTS or not {"query", "choices", "gold"} <= row.keys():
        raise ValueError(f"no field '{missing[0]}'")
    found = re.fullmatch(PROMPTS[task], str(row["query"]), re.DOTALL)
    if found is None:
        raise ValueError("its query is none of this task's")
    choices, gold = list(row["choices"]), int(row["gold"])
    if not 0 <= gold < len(choices):
        raise ValueError("no correct answer")
    if task == "hellaswag":
        return {**found.groupdict(), "ctx_b": "", "endings": choices, "label": str(gold)}
    if task == "boolq":
        return {**found.groupdict(), "label": ("no", "yes").index(choices[gold])}
    labels = list(LETTERS[: len(choices)])
    return {
        **found.groupdict(),
        "choices": {"text": choices, "label": labels},
        "answerKey": labels[gold],
    }


def to_item(task: str, fields: Mapping[str, Any]) -> Item:
    """Format the result of `hub_fields` with the task's template in lm-evaluation-harness.

    Raises ValueError for an item without a correct answer or with a part that is not text.
    """
    if task == "winogrande":
        before, _, after = fields["sentence"].partition("_")
        options = (fields["option1"], fields["option2"])
        contexts = tuple(before + option for option in options)
        return _checked(contexts, (after.strip(),) * 2, int(fields["answer"]) - 1)
    if task == "piqa":
        context = f"Question: {fields['goal']}\nAnswer:"
        choices, gold = [fields["sol1"], fields["sol2"]], int(fields["label"])
    elif task == "hellaswag":
        story = fields["ctx_a"] + " " + fields["ctx_b"].capitalize()
        context = _without_marks(f"{fields['activity_label']}: {story}")
        choices = [_without_marks(ending) for ending in fields["endings"]]
        gold = int(fields["label"])
    elif task == "boolq":
        context = f"{fields['passage']}\nQuestion: {fields['question']}?\nAnswer:"
        choices, gold = ["no", "yes"], int(fields["label"])
    elif task == "sciq":
        context = f"{fields['support'].lstrip()}\nQuestion: {fields['question']}\nAnswer:"
        choices = [fields[f] for f in ("distractor1", "distractor2", "distractor3")]
        choices, gold = [*choices, fields["correct_answer"]], 3
    else:
        context = fields.get("question_stem") or f"Question: {fields['question']}\nAnswer:"
        choices = fields["choices"]["text"]
        gold = fields["choices"]["label"].index(fields["answerKey"].strip())
    return _checked((context,) * len(choices), tuple(choices), gold)


def _without_marks(text: str) -> str:
    """Remove WikiHow's markup from a text of hellaswag, as lm-evaluation-harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub("\\[.*?\\]", "", text).replace("  ", " ")


def _checked(contexts: tuple[str, ...], choices: tuple[str, ...], gold: int) -> Item:
    if not 0 <= gold < len(choices):
        raise ValueError("no correct answer")
    if not all(isinstance(part, str) and part.strip() for part in (*contexts, *choices)):
        raise ValueError("an empty question or choice")
    item = Item(contexts, tuple(f" {choice}" for choice in choices), gold)
    item.text.encode("utf-8")  # raises ValueError for a lone surrogate
    return item


@dataclass(frozen=True)
class _Example:
    """An item with its record, file and line."""

    task: str
    item: Item
    fields: dict[str, Any]
    file: InputFile
    line: int
    key: bytes
    sha256: str

    def reject(self, reason: str) -> dict[str, Any]:
        excerpt = self.item.text[:200]
        return _reject(self.task, Reject(self.file.uri, self.line, reason, excerpt))

    def document(self) -> dict[str, Any]:
        """Return the example as a row of a documents table."""
        text = self.item.text
        return {
            "doc_id": document_id(self.task, self.file.path, self.line, self.sha256),
            "source_file": self.file.uri,
            "source_line": self.line,
            "source": self.task,
            "n_chars": len(text),
            "sha256": self.sha256,
            "extra": json.dumps({"gold": self.item.gold}),
            "text": text,
        }


def read_items(items: Path) -> list[Item]:
    """Read the items of a file `<task>.jsonl` written by `split_tasks`."""
    lines = items.read_text(encoding="utf-8").splitlines()
    return [to_item(items.stem, json.loads(line)) for line in lines]


def split_tasks(
    train: Files,
    test: Files,
    seed: int,
    held_out: float,
    probe: float,
    test_items: int | None,
    folder: Path,
    progress: Progress = silent,
) -> dict[str, int]:
    """Read tasks' items and split them into held-out, probe and D_down.

    Test items go to held-out. If a task's train and test files are the same, a random share
    `held_out` of their items are its test items. `test_items` limits the number of test items drawn
    from each task. A random share `probe` of the train items, by characters, goes to the probe, and
    the rest to D_down. All draws are determined by `seed`. Each text occurs once.

    Writes `<split>/documents.parquet`, with the items' texts as documents, `rejects.parquet`,
    `files.parquet` and `tasks/<task>.jsonl`, the drawn test items in the fields of the hub. The
    latter also contains the few items that have the same question and answer as another but differ
    in a wrong choice. Returns counts; keeps all items in memory. Raises InputError if files have no
    usable item, or if a split would be empty.
    """
    rejects: list[dict[str, Any]] = []
    contents: Contents = []

    def read(task: str, files: Sequence[InputFile]) -> list[_Example]:
        return _read(task, files, seed, rejects, contents, progress)

    tests = {task: read(task, files) for task, files in test.items()}
    trains = {}
    for task, files in train.items():
        if files == test.get(task):
            n = max(1, round(held_out * len(tests[task])))
            tests[task], trains[task] = tests[task][:n], tests[task][n:]
        else:
            trains[task] = read(task, files)
    refused = len(rejects)

    tested = {e.sha256 for examples in tests.values() for e in examples}
    drawn = {task: examples[:test_items] for task, examples in tests.items()}
    splits = {"held_out": _each_once(_in_order(drawn), set(), "duplicate", rejects)}
    learnt = _each_once(_in_order(trains), tested, "a test item has the same text", rejects)
    size, before = sum(len(e.item.text) for e in learnt), 0
    splits |= {"probe": [], "down": []}
    for example in learnt:
        splits["probe" if before < probe * size else "down"].append(example)
        before += len(example.item.text)
    for split in SPLITS:
        if not splits[split]:
            raise InputError(
                f"{len(learnt)} train items are too few to split: {split} is empty; add items"
            )

    _write(splits, drawn, rejects, folder)
    write_contents(contents, folder)
    documents = [e.document() for examples in splits.values() for e in examples]
    counts = {
        "documents": len(documents),
        "chars": sum(d["n_chars"] for d in documents),
        "bytes": sum(len(d["text"].encode("utf-8")) for d in documents),
        "duplicates": len(rejects) - refused,
        "rejects": refused,
        "test_items": sum(map(len, drawn.values())),
        "test_choices": sum(len(e.item.contexts) for e in _in_order(drawn)),
    }
    for split, examples in splits.items():
        counts[f"{split}_documents"] = len(examples)
        counts[f"{split}_chars"] = sum(len(e.item.text) for e in examples)
    return counts


def _read(
    task: str,
    files: Sequence[InputFile],
    seed: int,
    rejects: list[dict[str, Any]],
    contents: Contents,
    progress: Progress,
) -> list[_Example]:
    """Return the usable items of files, in the order of their random keys."""
    examples, refused = [], len(rejects)
    for file in files:
        source = Source.model_validate({"name": task, "files": file.uri})
        for row in read_rows(file, source, contents):
            found = _example(task, file, row, seed) if isinstance(row, Row) else row
            if isinstance(found, Reject):
                rejects.append(_reject(task, found))
            else:
                examples.append(found)
        progress(file.size)
    if not examples:
        why = f" (the first: {rejects[refused]['reason']})" if len(rejects) > refused else ""
        raise InputError(
            f"task {task}: {files[0].uri} has no usable item{why}; name files of this task"
        )
    return sorted(examples, key=lambda e: e.key)


def _example(task: str, file: InputFile, row: Row, seed: int) -> _Example | Reject:
    try:
        fields = hub_fields(task, row.value)
        item = to_item(task, fields)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        excerpt = ascii(row.value)[:200]
        return Reject(file.uri, row.line, f"no item of {task}: {error}", excerpt)
    sha256 = text_sha256(item.text)
    return _Example(task, item, fields, file, row.line, random_key(seed, sha256), sha256)


def _reject(task: str, reject: Reject) -> dict[str, Any]:
    """Return a reject as a row of a rejects table."""
    return {
        "source_file": reject.file,
        "source_line": reject.line,
        "source": task,
        "reason": reject.reason,
        "excerpt": reject.excerpt,
    }


def _in_order(examples: Mapping[str, Sequence[_Example]]) -> Iterator[_Example]:
    """Yield the examples of all tasks in the order of their random keys."""
    yield from sorted((e for of_task in examples.values() for e in of_task), key=lambda e: e.key)


def _each_once(
    examples: Iterator[_Example], others: set[str], reason: str, rejects: list[dict[str, Any]]
) -> list[_Example]:
    """Return the examples whose text is neither that of an earlier example nor in `others`.

    The rest is appended to `rejects`: texts in `others` with `reason`, copies as duplicates.
    """
    seen: set[str] = set()
    kept = []
    for example in examples:
        if example.sha256 in others:
            rejects.append(example.reject(reason))
        elif example.sha256 in seen:
            rejects.append(example.reject("duplicate"))
        else:
            seen.add(example.sha256)
            kept.append(example)
    return kept


def _write(
    splits: Mapping[str, Sequence[_Example]],
    tests: Mapping[str, Sequence[_Example]],
    rejects: Sequence[dict[str, Any]],
    folder: Path,
) -> None:
    with contextlib.ExitStack() as stack:
        for split, examples in splits.items():
            (folder / split).mkdir(exist_ok=True)
            path = folder / split / "documents.parquet"
            writer = stack.enter_context(TableWriter(path, DOCUMENTS))
            for example in examples:
                writer.add(example.document(), len(example.item.text))
        refused = stack.enter_context(TableWriter(folder / "rejects.parquet", REJECTS))
        for reject in rejects:
            refused.add(reject)
    (folder / "tasks").mkdir(exist_ok=True)
    for task, examples in tests.items():
        lines = [json.dumps(e.fields) for e in examples]
        (folder / "tasks" / f"{task}.jsonl").write_text("\n".join(lines) + "\n")


def refuse_without_harness() -> None:
    """Raise InputError if lm-evaluation-harness, which evaluates tasks, is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "tasks are evaluated with lm-evaluation-harness, which is not installed; run "
            "pip install '.[eval]'"
        )
