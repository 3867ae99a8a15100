"""A valid recipe, and recipes that differ from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from colorfilter.config.load import load
from colorfilter.config.recipe import Recipe
from colorfilter.errors import InputError

TRAINING = {"learning_rate": 1e-3, "batch_sequences": 8}
MODEL = {"type": "gpt_neox", "config": {"hidden_size": 16, "max_position_embeddings": 128}}
VALID: dict[str, Any] = {
    "scoring": {},
    "name": "mine",
    "sequence_length": 128,
    "corpus": {"sources": [{"name": "web", "files": "data/*.jsonl"}]},
    "tokenizer": {"vocab_size": 1000},
    "prior": {"sample_chars": 1000, "model": MODEL, "training": TRAINING},
    "domains": [
        {
            "name": "books",
            "sources": [{"name": "pages", "files": "books/*.txt"}],
            "training": TRAINING,
        }
    ],
    "arms": [{"method": "color", "tau": 8}, {"method": "random"}],
    "target": {"model": MODEL, "training": TRAINING, "training_tokens": 1000},
    "evaluation": {"seeds": [1, 2]},
}
MISSING = object()


def changed(path: str, value: object) -> dict[str, Any]:
    content = json.loads(json.dumps(VALID))
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    place: Any = content
    for part in parents:
        place = place[part]
    if value is MISSING:
        del place[last]
    elif isinstance(place, list) and last == len(place):
        place.append(value)
    else:
        place[last] = value
    return content


def load_content(folder: Path, content: object) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return load(path)


def problem(folder: Path, content: object) -> str:
    with pytest.raises(InputError) as raised:
        load_content(folder, content)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("recipe")
    return message


PIQA = {"name": "piqa", "train": "piqa/train.jsonl.gz", "test": "piqa/test.jsonl"}


def with_tasks(*tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return changed("domains.0", {"name": "t", "training": TRAINING, "tasks": list(tasks), **more})
