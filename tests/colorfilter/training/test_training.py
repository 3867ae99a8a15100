import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from colorfilter.config.recipe import Model
from colorfilter.data.tokens import Encoder, pack_examples, real_tokens
from colorfilter.models import checkpoints
from colorfilter.progress import silent
from colorfilter.training import training
from colorfilter.training.process_group import Single
from colorfilter.training.schedule import learning_rate, training_order
from colorfilter.training.spec import TrainSpec, planned_tokens
from colorfilter.training.training import held_out_loss, train
from tests.colorfilter.conftest import ENDPOINTS
from tests.colorfilter.trained import assert_same_result, weights


def sizes(spec: TrainSpec) -> np.ndarray:
    n = pl.read_parquet(spec.tokens / "sequences.parquet")["n_tokens"].to_numpy()
    return n[np.random.default_rng(spec.seed).permutation(len(n))]


def test_the_loss_goes_down(spec: TrainSpec, tmp_path: Path) -> None:
    n = len(sizes(spec))
    (checkpoint,) = train(replace(spec, endpoints=(n,), out=tmp_path))
    curve = pl.read_parquet(tmp_path / "curve.parquet")
    assert curve["loss"][0] == pytest.approx(math.log(280), abs=0.2)
    assert curve["loss"].tail(5).mean() < curve["loss"][0] - 1
    held_out = curve["held_out_loss"].drop_nulls()
    assert held_out[-1] < held_out[0]
    assert spec.held_out is not None
    assert held_out_loss(
        checkpoints.load(checkpoint.path), spec.held_out, Single()
    ) == pytest.approx(held_out[-1], abs=1e-6)


def test_padding_of_examples_is_neither_learnt_nor_evaluated(
    spec: TrainSpec, encoder: Encoder, texts: list[str], tmp_path: Path
) -> None:
    """Two runs whose rows differ in the padding alone end with the same bits."""
    documents = [{"doc_id": str(i), "text": text} for i, text in enumerate(texts)]
    for name in ("one", "other"):
        pack_examples(documents, encoder, 64, tmp_path / name)
    rows = np.load(tmp_path / "other" / "tokens.npy")
    n_tokens = real_tokens(tmp_path / "other")
    padding = np.arange(64) >= n_tokens[:, None]
    assert padding.mean() > 0.2
    rows[padding] = np.random.default_rng(0).integers(0, 280, padding.sum())
    np.save(tmp_path / "other" / "tokens.npy", rows)
    for name in ("one", "other"):
        packed = tmp_path / name
        train(
            replace(
                spec, tokens=packed, held_out=packed, endpoints=(len(rows),), out=packed / "out"
            )
        )
    assert_same_result(tmp_path / "one" / "out", tmp_path / "other" / "out")


def test_an_example_counts_with_every_token_behind_its_first(
    spec: TrainSpec, tiny: Model, encoder: Encoder, texts: list[str], tmp_path: Path
) -> None:
    """The end-of-text token that closes it is a label, though padding is the same token."""
    documents = [{"doc_id": str(i), "text": text} for i, text in enumerate(texts[:4])]
    pack_examples(documents, encoder, 64, tmp_path / "packed")
    packed = replace(spec, tokens=tmp_path / "packed", held_out=None)
    train(replace(packed, start=tiny, endpoints=(4,), out=tmp_path / "out"))
    model = checkpoints.build(tiny, 280, 64, spec.seed).eval().double()
    nats = []
    for text in texts[:4]:
        ids = torch.tensor([[*encoder.encode([text])[0].ids, encoder.end_of_text][-64:]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    curve = pl.read_parquet(tmp_path / "out" / "curve.parquet")
    assert curve["loss"][0] == pytest.approx(np.mean(nats), abs=1e-5)


CAPPED = Model(
    type="gemma2",
    config={
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "final_logit_softcapping": 0.05,
    },
)


@pytest.mark.parametrize("capped", [False, True])
def test_the_first_loss_of_the_curve_is_that_of_the_fresh_model_on_the_first_batch(
    spec: TrainSpec, tiny: Model, tmp_path: Path, capped: bool
) -> None:
    fresh = CAPPED if capped else tiny
    train(replace(spec, start=fresh, endpoints=(8,), out=tmp_path))
    rows = np.load(spec.tokens / "tokens.npy")
    n_tokens = pl.read_parquet(spec.tokens / "sequences.parquet")["n_tokens"].to_numpy()
    first = np.random.default_rng(spec.seed).permutation(len(rows))[:4]
    model = checkpoints.build(fresh, 280, 16, spec.seed).eval().double()
    total, labels = 0.0, 0
    with torch.no_grad():
        for row, n in zip(rows[first], n_tokens[first], strict=True):
            ids = torch.tensor([row[:n].tolist()])
            logits = model(input_ids=ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            labels += n - 1
    curve = pl.read_parquet(tmp_path / "curve.parquet")
    assert curve["loss"][0] == pytest.approx(total / labels, abs=1e-5)


def test_a_plain_head_is_not_run_for_its_logits(spec: TrainSpec, tmp_path: Path) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("the head was run")

    own = replace(spec, out=tmp_path)
    run = training.Run(own, torch.device("cpu"), silent, training.keep_nothing, Single())
    run.model.get_output_embeddings().register_forward_hook(forbidden)
    assert run.step(np.arange(4), 1e-3, 0) == pytest.approx(math.log(280), abs=0.2)


def test_every_sequence_is_seen_once_in_an_order_that_the_seed_fixes(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    step = training.Run.step

    def recording(self: object, rows: np.ndarray, *more: object) -> float:
        seen.extend(rows.tolist())
        return step(self, rows, *more)

    monkeypatch.setattr(training.Run, "step", recording)
    n = len(sizes(spec))
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        seen.clear()
        train(replace(spec, seed=seed, endpoints=(n,), held_out=None, out=tmp_path / name))
        assert sorted(seen) == list(range(n))
        orders.append(list(seen))
    assert orders[0] == orders[1] == training_order(1, n).tolist()
    assert orders[0] != orders[2]


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_a_checkpoint_has_seen_the_first_of_the_order_up_to_its_end_point(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    steps: dict[int, list[int]] = {}
    seen: list[list[int]] = []
    step, save = training.Run.step, checkpoints.save

    def recording(self: object, rows: np.ndarray, rate: float, number: int) -> float:
        # A branch goes on from the trunk: what a later phase did is not in its weights.
        for later in [n for n in steps if n >= number]:
            del steps[later]
        steps[number] = rows.tolist()
        return step(self, rows, rate, number)

    def saving(*arguments: object) -> None:
        seen.append([row for number in sorted(steps) for row in steps[number]])
        save(*arguments)

    monkeypatch.setattr(training.Run, "step", recording)
    monkeypatch.setattr(checkpoints, "save", saving)
    changed = spec.training.model_copy(update={"schedule": schedule})
    train(replace(spec, training=changed, endpoints=(10, 17), held_out=None, out=tmp_path))
    order = training_order(spec.seed, len(sizes(spec))).tolist()
    assert seen == [order[:10], order[:17]]


def test_initial_weights_depend_on_the_seed(spec: TrainSpec, tmp_path: Path) -> None:
    frozen = spec.training.model_copy(update={"learning_rate": 1e-30, "weight_decay": 0.0})
    ends = [
        train(replace(spec, seed=seed, training=frozen, endpoints=(8,), out=tmp_path / str(seed)))
        for seed in (1, 2)
    ]
    one, two = (weights(e[0].path) for e in ends)
    assert not all(torch.equal(one[n], two[n]) for n in one)


def test_training_goes_on_from_a_given_checkpoint(
    spec: TrainSpec, undisturbed: Path, tmp_path: Path
) -> None:
    start = next(p for p in undisturbed.iterdir() if p.is_dir())
    frozen = spec.training.model_copy(update={"learning_rate": 1e-30, "weight_decay": 0.0})
    (end,) = train(replace(spec, start=str(start), training=frozen, endpoints=(8,), out=tmp_path))
    before, after = weights(start), weights(end.path)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_batch_in_parts_trains_as_the_whole_batch(
    spec: TrainSpec, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(spec, start=tiny, endpoints=(24,), out=tmp_path / "whole")
    train(whole)
    monkeypatch.setattr(training, "MICRO_BATCH_TOKENS", {"cpu": 1})
    train(replace(whole, out=tmp_path / "parts"))
    one, other = (
        pl.read_parquet(tmp_path / name / "curve.parquet")["loss"].to_numpy()
        for name in ("whole", "parts")
    )
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_z_loss_keeps_the_log_sum_exp_down(spec: TrainSpec, tmp_path: Path) -> None:
    tokens = torch.from_numpy(np.load(spec.tokens / "tokens.npy").astype(np.int64))
    sizes = {}
    for weight in (0.0, 10.0):
        out = tmp_path / str(weight)
        kept = spec.training.model_copy(update={"z_loss": weight})
        (_, last) = train(replace(spec, out=out, training=kept))
        with torch.no_grad():
            logits = checkpoints.load(last.path)(input_ids=tokens).logits
        sizes[weight] = logits.logsumexp(dim=-1).square().mean().item()
        curve = pl.read_parquet(out / "curve.parquet")
        assert curve["loss"][0] == pytest.approx(math.log(280), abs=0.2)  # the loss alone
    assert sizes[10.0] < 0.8 * sizes[0.0]


def test_weight_decay_spares_vectors(
    spec: TrainSpec, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        training.torch.nn.utils,
        "clip_grad_norm_",
        lambda parameters, _: [p.grad.zero_() for p in parameters if p.grad is not None],
    )
    heavy = spec.training.model_copy(update={"weight_decay": 1.0, "warmup": 0.0})
    (end,) = train(replace(spec, start=tiny, training=heavy, endpoints=(8,), out=tmp_path))
    after = dict(checkpoints.load(end.path).named_parameters())
    for name, value in checkpoints.build(tiny, 280, 16, spec.seed).named_parameters():
        if value.ndim < 2:
            assert torch.equal(after[name], value), name
        else:
            assert after[name].norm() < value.norm(), name


# End points ----------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoints", [(8,), (10, 17), ENDPOINTS])
def test_the_tokens_of_an_end_point_are_those_of_its_sequences(
    spec: TrainSpec, tmp_path: Path, endpoints: tuple[int, ...]
) -> None:
    made = train(replace(spec, endpoints=endpoints, held_out=None, out=tmp_path))
    expected = [int(sizes(spec)[:n].sum()) for n in endpoints]
    assert [c.tokens for c in made] == expected
    assert [c.path.name for c in made] == [f"tokens-{n}" for n in expected]
    curve = pl.read_parquet(tmp_path / "curve.parquet")
    ends = curve.filter(pl.col("tokens") == pl.col("endpoint"))
    assert ends["tokens"].to_list() == expected


class OneOfThree(Single):
    """A process of a group; `parts` are what each has added to a total so far."""

    size = 3

    def __init__(self, rank: int, parts: list[np.ndarray]) -> None:
        self.rank = rank
        self.parts = parts

    def total(self, numbers: np.ndarray, _: torch.device) -> np.ndarray:
        self.parts.append(numbers)
        return np.sum(self.parts, axis=0)


def test_processes_share_the_held_out_sequences_and_get_the_bits_of_one(
    spec: TrainSpec, undisturbed: Path
) -> None:
    assert spec.held_out is not None
    model = checkpoints.load(next(undisturbed.glob("tokens-*")))
    parts: list[np.ndarray] = []
    for rank in range(3):
        loss = held_out_loss(model, spec.held_out, OneOfThree(rank, parts))
    assert loss == held_out_loss(model, spec.held_out, Single())
    for rank, (_, labels) in enumerate(parts):
        mine = np.arange(len(labels)) % 3 == rank
        assert (labels[mine] > 0).all()
        assert (labels[~mine] == 0).all()


def test_every_end_point_has_its_held_out_loss(spec: TrainSpec, undisturbed: Path) -> None:
    curve = pl.read_parquet(undisturbed / "curve.parquet")
    ends = curve.filter(pl.col("tokens") == pl.col("endpoint"))
    assert spec.held_out is not None
    assert len(ends) == len(ENDPOINTS)
    for tokens, value in ends.select("tokens", "held_out_loss").rows():
        model = checkpoints.load(undisturbed / f"tokens-{tokens}")
        assert held_out_loss(model, spec.held_out, Single()) == pytest.approx(value, abs=1e-6)


def test_the_first_end_point_is_that_of_a_run_to_it_alone(
    spec: TrainSpec, undisturbed: Path, tmp_path: Path
) -> None:
    (alone,) = train(replace(spec, endpoints=ENDPOINTS[:1], out=tmp_path))
    one, other = weights(alone.path), weights(undisturbed / alone.path.name)
    assert all(torch.equal(one[n], other[n]) for n in one)
    curve = pl.read_parquet(undisturbed / "curve.parquet")
    assert curve.head(10).equals(pl.read_parquet(tmp_path / "curve.parquet"))


def test_the_trunk_goes_on_as_if_the_branch_had_not_been(
    spec: TrainSpec, undisturbed: Path, tmp_path: Path
) -> None:
    earlier = (39, 60)
    train(replace(spec, endpoints=earlier, out=tmp_path))
    last = max(int(p.name.removeprefix("tokens-")) for p in tmp_path.iterdir() if p.is_dir())
    one, other = weights(tmp_path / f"tokens-{last}"), weights(undisturbed / f"tokens-{last}")
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_with_a_cosine_each_end_point_is_a_run_of_its_own(spec: TrainSpec, tmp_path: Path) -> None:
    cosine = spec.training.model_copy(update={"schedule": "cosine", "warmup": 0.0})
    both = train(replace(spec, training=cosine, endpoints=(20, 32), out=tmp_path / "both"))
    for n, checkpoint in zip((20, 32), both, strict=True):
        (alone,) = train(replace(spec, training=cosine, endpoints=(n,), out=tmp_path / f"alone{n}"))
        one, other = weights(alone.path), weights(checkpoint.path)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("decay", [0.01, 1.0])
def test_the_shortest_and_the_longest_decay_train(
    spec: TrainSpec, tmp_path: Path, decay: float
) -> None:
    changed = spec.training.model_copy(update={"decay": decay})
    made = train(replace(spec, training=changed, endpoints=(20, 32), out=tmp_path))
    assert len(made) == 2
    rates = pl.read_parquet(tmp_path / "curve.parquet")["learning_rate"]
    assert rates[-1] < spec.training.learning_rate


@pytest.mark.parametrize("endpoints", [(10,), (16,), (10, 17), ENDPOINTS])
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_planned_tokens_are_those_that_are_trained_on(
    spec: TrainSpec, tmp_path: Path, endpoints: tuple[int, ...], schedule: str
) -> None:
    changed = spec.training.model_copy(update={"schedule": schedule})
    run = replace(spec, training=changed, endpoints=endpoints, held_out=None, out=tmp_path)
    done: list[int] = []
    train(run, progress=done.append)
    assert sum(done) == planned_tokens(run)


def test_more_than_the_data_holds_is_refused(spec: TrainSpec, tmp_path: Path) -> None:
    n = len(sizes(spec))
    with pytest.raises(ValueError, match=f"{n + 1} sequences requested, {n} exist"):
        train(replace(spec, endpoints=(8, n + 1), out=tmp_path))


def test_the_curve_holds_the_rates_of_the_schedule(spec: TrainSpec, undisturbed: Path) -> None:
    curve = pl.read_parquet(undisturbed / "curve.parquet")
    steps = [*range(1, 11), *range(8, 16)]
    ends = [10] * 10 + [15] * 8
    assert curve["step"].to_list() == steps
    branches = curve["endpoint"].is_not_null().to_list()
    assert branches == [False] * 7 + [True] * 3 + [False] * 4 + [True] * 4
    assert curve["learning_rate"].to_list() == pytest.approx(
        [
            learning_rate(spec.training, s - 1, 10, end, b)
            for s, end, b in zip(steps, ends, branches, strict=True)
        ]
    )
