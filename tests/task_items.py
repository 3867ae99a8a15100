"""A few invented items of every task: in the fields of the hub, as text, and as prompts."""

import json
from pathlib import Path
from typing import Any

from colorfilter.config.recipe import Source
from colorfilter.data.shards import InputFile, list_files

CHOICES = {"text": ["a stone", "a leaf", "rain", "the sun"], "label": ["A", "B", "C", "D"]}

# By task: a row as on the hub, its question and correct answer in words, and its number of choices.
ITEMS: dict[str, tuple[dict[str, Any], str, int]] = {
    "piqa": (
        {"goal": "Dry a wet book", "sol1": "Stand it in the wind.", "sol2": "Boil it.", "label": 0},
        "Question: Dry a wet book\nAnswer: Stand it in the wind.",
        2,
    ),
    "hellaswag": (
        {
            "activity_label": "Baking",
            "ctx_a": "A man [header] mixes  flour.",
            "ctx_b": "then He",
            "endings": ["sleeps.", "bakes [title] it.", "runs away.", "sings."],
            "label": "1",
        },
        "Baking: A man mixes flour. Then he bakes. it.",
        4,
    ),
    "boolq": (
        {"passage": "Ice is frozen water.", "question": "is ice water", "label": 1},
        "Ice is frozen water.\nQuestion: is ice water?\nAnswer: yes",
        2,
    ),
    "sciq": (
        {
            "support": "  Plants make sugar from light.",
            "question": "What do plants make?",
            "distractor1": "salt",
            "distractor2": "iron",
            "distractor3": "fire",
            "correct_answer": "sugar",
        },
        "Plants make sugar from light.\nQuestion: What do plants make?\nAnswer: sugar",
        4,
    ),
    "openbookqa": (
        {"question_stem": "The day is lit by", "choices": CHOICES, "answerKey": "D"},
        "The day is lit by the sun",
        4,
    ),
    "arc_easy": (
        {"question": "What grows?", "choices": CHOICES, "answerKey": "B"},
        "Question: What grows?\nAnswer: a leaf",
        4,
    ),
    "arc_challenge": (
        {
            "question": "What is hard?",
            "choices": {"text": ["a stone", "a leaf", "rain"], "label": ["1", "2", "3"]},
            "answerKey": "1",
        },
        "Question: What is hard?\nAnswer: a stone",
        3,
    ),
    "winogrande": (
        {
            "sentence": "The cat fled from the dog because _ was afraid.",
            "option1": "the cat",
            "option2": "the dog",
            "answer": "1",
        },
        "The cat fled from the dog because the cat was afraid.",
        2,
    ),
}

# The same items as finished prompts, where files of a task have that form.
PROMPTS: dict[str, dict[str, Any]] = {
    "hellaswag": {
        "query": "Baking: A man mixes flour. Then he",
        "choices": ["sleeps.", "bakes. it.", "runs away.", "sings."],
        "gold": 1,
    },
    "boolq": {
        "query": "Ice is frozen water.\nQuestion: is ice water?\nAnswer:",
        "choices": ["yes", "no"],
        "gold": 0,
    },
    "openbookqa": {
        "query": "Question: The day is lit by\nAnswer:",
        "choices": CHOICES["text"],
        "gold": 3,
    },
    "arc_easy": {
        "query": "Question: What grows?\nAnswer:",
        "choices": CHOICES["text"],
        "gold": 1,
    },
    "arc_challenge": {
        "query": "Question: What is hard?\nAnswer:",
        "choices": ["a stone", "a leaf", "rain"],
        "gold": 0,
    },
}


def write_items(folder: Path, task: str, rows: list[Any]) -> list[InputFile]:
    """A JSON Lines file of items, listed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list_files([Source(name=task, files=str(path))])
