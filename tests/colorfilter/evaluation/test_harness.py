"""Compared with lm-evaluation-harness's own templates, and with transformers in float64."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from colorfilter.config.recipe import Model
from colorfilter.data import tasks, tokens
from colorfilter.data.tasks import Item, hub_fields, read_items, split_tasks, to_item
from colorfilter.errors import InputError
from colorfilter.models import checkpoints
from tests.task_items import ITEMS, PROMPTS, write_items

harness = pytest.importorskip("colorfilter.evaluation.harness")

CONTEXT = 48


@pytest.fixture(scope="module")
def model(tiny: Model, encoder: tokens.Encoder) -> PreTrainedModel:
    short = {**tiny.config, "max_position_embeddings": CONTEXT, "initializer_range": 0.5}
    fresh = tiny.model_copy(update={"config": short})
    return checkpoints.build(fresh, encoder.vocab_size, CONTEXT, 3).eval()


def write_fields(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    folder.mkdir()
    for task, of_task in rows.items():
        lines = [json.dumps(hub_fields(task, row)) for row in of_task]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def everything_fits(_: Item) -> bool:
    return True


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The harness's task objects over two items each, in both forms where there are two."""
    from lm_eval.tasks import TaskManager

    root = tmp_path_factory.mktemp("loaded")
    rows = {task: [row, PROMPTS.get(task, row)] for task, (row, _, _) in ITEMS.items()}
    names = harness.write_tasks(write_fields(root / "items", rows), root, everything_fits)
    assert names == dict.fromkeys(tasks.TASKS, 2)
    manager = TaskManager(include_path=str(root), include_defaults=False)
    built: dict[str, Any] = manager.load(list(names))["tasks"]
    return built


@pytest.mark.parametrize("task", tasks.TASKS)
def test_items_are_in_the_harnesss_own_words(loaded: dict[str, Any], task: str) -> None:
    theirs = loaded[task]
    theirs.build_all_requests(limit=None, rank=0, world_size=1)
    item = to_item(task, hub_fields(task, ITEMS[task][0]))
    ours = list(zip(item.contexts, item.continuations, strict=True))
    for doc_id, doc in enumerate(theirs.test_docs()):
        requests = sorted(
            (r for r in theirs.instances if r.doc_id == doc_id), key=lambda request: request.idx
        )
        assert [request.args for request in requests] == ours
        for choice in range(len(ours)):
            said = [(0.0 if i == choice else -100.0, False) for i in range(len(ours))]
            assert theirs.process_results(doc, said)["acc"] == (choice == item.gold)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_metrics_are_accuracy_and_where_the_harness_has_it_the_normalised(
    loaded: dict[str, Any], task: str
) -> None:
    normalised = set() if task in {"boolq", "winogrande"} else {"acc_norm"}
    assert set(loaded[task].aggregation()) == {"acc", *normalised}


# Losses --------------------------------------------------------------------------------------


def plain_losses(
    model: PreTrainedModel, encoder: tokens.Encoder, context: str, continuation: str
) -> list[float]:
    """Nats of every token of a continuation, as transformers gives them in float64."""
    whole = encoder.encode([context + continuation])[0].ids
    n = len(whole) - len(encoder.encode([context])[0].ids)
    ids = torch.tensor([whole[-(CONTEXT + 1) :]])
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits[0].log_softmax(-1)
    nats = -logits.gather(1, ids[0, 1:, None])[:, 0]
    return nats[-n:].tolist()


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items of three tasks, some with questions longer than the model's context."""
    words = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child"]
    rng = np.random.default_rng(0)

    def some(low: int, high: int) -> str:
        return " ".join(rng.choice(words, rng.integers(low, high)))

    rows = {
        "piqa": [
            {"goal": some(1, 30), "sol1": some(1, 6), "sol2": some(1, 6), "label": i % 2}
            for i in range(24)
        ],
        "winogrande": [
            {
                "sentence": f"{some(1, 9)} _ {some(1, 5)}",
                "option1": some(1, 3),
                "option2": some(1, 3),
                "answer": str(1 + i % 2),
            }
            for i in range(20)
        ],
        "arc_easy": [
            {
                "question": some(2, 40),
                "choices": {"text": [some(1, 5) for _ in range(n)], "label": list("ABCDE"[:n])},
                "answerKey": "ABCDE"[int(rng.integers(n))],
            }
            for n in (3, 4, 5, 4, 4, 4, 3, 5)
        ],
    }
    return write_fields(tmp_path_factory.mktemp("items") / "tasks", rows)


def test_metrics_are_those_of_a_plain_computation_in_float64(
    model: PreTrainedModel, encoder: tokens.Encoder, items: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    done: list[int] = []
    found = harness.evaluate(harness.ScoredModel(model, encoder, done.append), items)
    expected: dict[str, float] = {}
    choices = 0
    for task in ("piqa", "winogrande", "arc_easy"):
        right, right_norm, losses = [], [], []
        for item in read_items(items / f"{task}.jsonl"):
            pairs = list(zip(item.contexts, item.continuations, strict=True))
            nats = [plain_losses(exact, encoder, *pair) for pair in pairs]
            logs = np.array([-sum(n) for n in nats])
            # The harness divides by characters, without the space that joins question and choice.
            sizes = np.array([len(choice) - 1 for _, choice in pairs])
            right.append(np.argmax(logs) == item.gold)
            right_norm.append(np.argmax(logs / sizes) == item.gold)
            losses.append(sum(nats[item.gold]) / len(nats[item.gold]))
            choices += len(pairs)
        columns = {"acc": right, "loss": losses}
        if task != "winogrande":
            columns["acc_norm"] = right_norm
        for metric, values in columns.items():
            expected[f"{task}_{metric}"] = float(np.mean(values))
            error = np.std(values, ddof=1) / math.sqrt(len(values))
            expected[f"{task}_{metric}_stderr"] = float(error)
        expected[f"{task}_items"] = len(right)
    assert found == pytest.approx(expected, abs=1e-5)
    assert 0 < found["piqa_acc"] < 1
    assert sum(done) == choices


def test_no_loss_depends_on_what_is_computed_beside_it(
    model: PreTrainedModel, encoder: tokens.Encoder, items: Path, tmp_path: Path
) -> None:
    together = harness.evaluate(harness.ScoredModel(model, encoder), items)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "piqa.jsonl").write_text((items / "piqa.jsonl").read_text())
    for metric, value in harness.evaluate(harness.ScoredModel(model, encoder), alone).items():
        assert together[metric] == pytest.approx(value, abs=1e-6)


def test_an_item_with_a_choice_longer_than_the_context_is_left_out(
    model: PreTrainedModel, encoder: tokens.Encoder, tmp_path: Path
) -> None:
    short = {"goal": "time", "sol1": "way", "sol2": "day", "label": 0}
    long = {**short, "sol2": "0123456789" * 10}
    found = harness.evaluate(
        harness.ScoredModel(model, encoder),
        write_fields(tmp_path / "both", {"piqa": [short, long]}),
    )
    assert found["piqa_items"] == 1
    with pytest.raises(InputError, match="task piqa: no item's choices fit"):
        harness.evaluate(
            harness.ScoredModel(model, encoder), write_fields(tmp_path / "long", {"piqa": [long]})
        )


def test_nothing_is_said_and_nothing_is_left_behind(
    model: PreTrainedModel,
    encoder: tokens.Encoder,
    items: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(items.iterdir())
    harness.evaluate(harness.ScoredModel(model, encoder), items)
    assert sorted(items.iterdir()) == before
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["scratch.lock"]
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_what_the_tasks_do_not_need_is_refused(
    model: PreTrainedModel, encoder: tokens.Encoder
) -> None:
    scored = harness.ScoredModel(model, encoder)
    with pytest.raises(NotImplementedError):
        scored.loglikelihood_rolling([])
    with pytest.raises(NotImplementedError):
        scored.generate_until([])


def test_split_items_are_what_is_evaluated(
    model: PreTrainedModel, encoder: tokens.Encoder, tmp_path: Path
) -> None:
    rows = [
        {"goal": f"time {i}", "sol1": "way", "sol2": f"day {i}", "label": i % 2} for i in range(12)
    ]
    files = {"piqa": write_items(tmp_path / "files", "piqa", rows)}
    counts = split_tasks(files, files, 0, 0.5, 0.2, 4, tmp_path)
    found = harness.evaluate(harness.ScoredModel(model, encoder), tmp_path / "tasks")
    assert found["piqa_items"] == counts["test_items"] == 4
