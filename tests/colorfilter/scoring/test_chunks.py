"""Chunks of losses on disk: each sequence exactly once, despite kills and damaged files."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from transformers import PreTrainedModel

from colorfilter.scoring import chunks
from colorfilter.scoring.chunks import Receipt, chunk_sequences, plan_chunks
from colorfilter.scoring.scoring import Scorer, score_shard
from colorfilter.storage.files import file_sha256
from tests.colorfilter.packed import (
    CHUNK,
    MODELS,
    Counting,
    lively,
    read_chunks,
    reference,
    score,
    write_packed,
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return lively(MODELS["gpt_neox"], 0)


@pytest.fixture(scope="module")
def other_model() -> PreTrainedModel:
    return lively(MODELS["gpt_neox"], 1)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 6, 17])
def test_chunks_cover_the_sequences_once_and_in_order(n: int, tmp_path: Path) -> None:
    folder, _ = write_packed(tmp_path / "tokens", [16] * n)
    standing, ranges = plan_chunks(folder, {"m": tmp_path / "out"}, CHUNK)
    assert standing == {"m": []}
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(n))
    assert all(0 < stop - start <= CHUNK for start, stop in ranges)


def test_a_chunk_takes_about_a_minute() -> None:
    """At 100 GFLOP/s a core and 300 TFLOP/s a device, what kernels of 150 M parameters reach."""
    for device, rate in (("cpu", 1e11), ("cuda", 3e14)):
        sequences = chunk_sequences(150_000_000, 512, device)
        assert 30 < sequences * 512 * 2 * 150e6 / rate < 90
    assert chunk_sequences(10**13, 10**6, "cpu") == 1


def test_chunks_hold_each_sequence_once_per_model_and_receipts_say_what(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    folder, _ = write_packed(tmp_path / "tokens", [16] * 11 + [7])
    receipts = score(Scorer(model), folder, tmp_path / "out")
    assert [(r.start, r.stop, r.sequences, r.tokens) for r in receipts] == [
        (0, 5, 5, 80),
        (5, 10, 5, 80),
        (10, 12, 2, 23),
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [r.file for r in receipts]
    for r in receipts:
        assert r.seconds > 0
        assert file_sha256(tmp_path / "out" / r.file) == r.sha256
        assert r.sha256[:16] in r.file
    table = read_chunks(tmp_path / "out")
    assert dict(table.schema) == {
        "model": pl.String,
        "shard": pl.String,
        "position": pl.Int64,
        "loss": pl.Float32,
        "n_tokens": pl.Int32,
        "precision": pl.String,
    }
    assert table["position"].to_list() == list(range(12))
    assert table.select("model", "shard", "precision").unique().rows() == [("m", "s", "float32")]


def test_several_models_are_scored_in_one_pass(
    model: PreTrainedModel, other_model: PreTrainedModel, tmp_path: Path
) -> None:
    folder, rows = write_packed(tmp_path / "tokens", [16] * 7)
    scorers = {"one": Counting(model), "two": Counting(other_model)}
    outs = {name: tmp_path / name for name in scorers}
    score_shard({"two": scorers["two"]}, folder, "s", {"two": outs["two"]}, CHUNK)
    next(outs["two"].iterdir()).unlink()
    receipts = score_shard(scorers, folder, "s", outs, CHUNK)
    assert [len(r) for r in receipts.values()] == [2, 2]
    assert scorers["one"].scored == 7
    assert scorers["two"].scored in {7 + 5, 7 + 2}
    for name, m in (("one", model), ("two", other_model)):
        mine = read_chunks(outs[name])
        assert set(mine["model"]) == {name}
        assert mine["position"].to_list() == list(range(7))
        expected = reference(m, rows, np.full(7, 16))
        np.testing.assert_allclose(mine["loss"].to_numpy(), expected, rtol=0, atol=1e-5)


def test_a_sequence_of_one_token_gets_no_row(model: PreTrainedModel, tmp_path: Path) -> None:
    folder, _ = write_packed(tmp_path / "tokens", [16, 16, 1])
    (receipt,) = score(Scorer(model), folder, tmp_path / "out")
    table = read_chunks(tmp_path / "out")
    assert table["position"].to_list() == [0, 1]
    assert table["loss"].is_finite().all()
    assert receipt.sequences == 3


def test_a_shard_without_sequences_has_no_chunks(model: PreTrainedModel, tmp_path: Path) -> None:
    folder, _ = write_packed(tmp_path / "tokens", [])
    assert score(Scorer(model), folder, tmp_path / "out") == []


@pytest.fixture
def scored(model: PreTrainedModel, tmp_path: Path) -> tuple[Path, Path, list[Receipt]]:
    folder, _ = write_packed(tmp_path / "tokens", [16] * 17)
    out = tmp_path / "out"
    return folder, out, score(Scorer(model), folder, out)


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


def test_what_stands_is_not_scored_again(
    model: PreTrainedModel, scored: tuple[Path, Path, list[Receipt]]
) -> None:
    folder, out, receipts = scored
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    scorer = Counting(model)
    again = score(scorer, folder, out)
    assert scorer.scored == 0
    assert [(r.file, r.sha256, r.tokens) for r in again] == [
        (r.file, r.sha256, r.tokens) for r in receipts
    ]
    assert [r.seconds for r in again] == [0.0] * 4
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before


@pytest.mark.parametrize("lost", [[1], [0, 3], [2, 3]])
def test_only_what_is_missing_is_scored_again_and_comes_out_the_same(
    model: PreTrainedModel, scored: tuple[Path, Path, list[Receipt]], lost: list[int]
) -> None:
    folder, out, receipts = scored
    before = contents(out)
    for i in lost:
        (out / receipts[i].file).unlink()
    scorer = Counting(model)
    again = score(scorer, folder, out)
    assert scorer.scored == sum(receipts[i].sequences for i in lost)
    assert [r.seconds > 0 for r in again] == [i in lost for i in range(4)]
    assert contents(out) == before


def test_a_run_killed_within_a_chunk_loses_that_chunk_alone(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "BATCH_TOKENS", {"cpu": 16})
    folder, _ = write_packed(tmp_path / "tokens", [16] * 17)
    calls = 0

    def killing(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(Scorer(model), folder, tmp_path / "out", progress=killing)
    assert len(contents(tmp_path / "out")) == 2
    scorer = Counting(model)
    score(scorer, folder, tmp_path / "out")
    assert scorer.scored == 7
    score(Scorer(model), folder, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_damaged_chunk_is_scored_again(
    model: PreTrainedModel, scored: tuple[Path, Path, list[Receipt]]
) -> None:
    folder, out, receipts = scored
    before = contents(out)
    path = out / receipts[2].file
    path.write_bytes(before[path.name][:-20] + b"x" * 20)
    scorer = Counting(model)
    score(scorer, folder, out)
    assert scorer.scored == receipts[2].sequences
    assert contents(out) == before


def test_a_damaged_chunk_of_another_name_does_not_stay_beside_the_new_one(
    model: PreTrainedModel, scored: tuple[Path, Path, list[Receipt]]
) -> None:
    folder, out, receipts = scored
    before = contents(out)
    path = out / receipts[2].file
    path.rename(out / f"{path.stem[:-16]}{'0' * 16}.parquet")
    score(Scorer(model), folder, out)
    assert contents(out) == before


def test_a_run_goes_on_where_chunks_of_another_size_stand(
    model: PreTrainedModel, scored: tuple[Path, Path, list[Receipt]]
) -> None:
    folder, out, receipts = scored
    before = read_chunks(out).sort("position")
    for i in (0, 3):
        (out / receipts[i].file).unlink()
    scorer = Counting(model)
    (again,) = score_shard({"m": scorer}, folder, "s", {"m": out}, 2 * CHUNK).values()
    assert [(r.start, r.stop) for r in again] == [(0, 5), (5, 10), (10, 15), (15, 17)]
    assert scorer.scored == 5 + 2
    (out / receipts[1].file).unlink()
    (out / receipts[0].file).unlink()
    (again,) = score_shard({"m": scorer}, folder, "s", {"m": out}, 2 * CHUNK).values()
    assert [(r.start, r.stop) for r in again] == [(0, 10), (10, 15), (15, 17)]
    assert read_chunks(out).sort("position").equals(before)


def test_leftovers_of_a_killed_run_are_removed_and_not_read(
    model: PreTrainedModel, scored: tuple[Path, Path, list[Receipt]]
) -> None:
    folder, out, receipts = scored
    before = contents(out)
    (out / receipts[1].file).unlink()
    (out / "losses-0000000005-0000000010.tmp").write_bytes(b"half a file")
    (out / "losses-0000000099-0000000100.tmp").write_bytes(b"")
    score(Scorer(model), folder, out)
    assert contents(out) == before


@pytest.mark.parametrize("damaged", [False, True])
def test_progress_adds_up_to_the_tokens_per_model(
    model: PreTrainedModel, scored: tuple[Path, Path, list[Receipt]], damaged: bool
) -> None:
    folder, out, receipts = scored
    (out / receipts[0].file).unlink()
    if damaged:
        (out / receipts[1].file).write_bytes(b"damaged")
    done: list[int] = []
    score(Scorer(model), folder, out, progress=done.append)
    assert sum(done) == 17 * 16
