"""In which filtered datasets sequences are, and which target models trained on them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from colorfilter.order import training_order
from colorfilter.provenance import content, stands
from resources.artifacts import ArtifactStore
from resources.ledger import Entry
from resources.lineage import Lineage

if TYPE_CHECKING:
    import duckdb

QUOTE = 200  # characters of a text that are shown


@dataclass(frozen=True)
class Records:
    """All that is on record about a home: ledger, artefacts, and the score tables."""

    artifacts: ArtifactStore
    lineage: Lineage
    connection: "duckdb.DuckDBPyConnection"

    def folder(self, entry: Entry) -> Path:
        """Where an artefact lies, whether it still stands or not."""
        return self.artifacts.at.root / str(entry["path"])

    def one(self, name: str, fingerprint: str | None) -> Entry | None:
        """What has this name and content."""
        found = self.lineage.find(name, fingerprint) if fingerprint else []
        return found[-1] if found else None


@dataclass(frozen=True)
class Trained:
    """A target model of a dataset that a sequence is in.

    `place` is the sequence's in the order of training, from 1; `reached` says by the tokens of each
    end point whether training had come to it.
    """

    seed: int
    fingerprint: str
    path: str
    place: int
    of: int
    reached: dict[int, bool]


@dataclass(frozen=True)
class InDataset:
    """A filtered dataset made of a selection. `row` is the sequence's, None where it is left out.

    `stands` is false where the folder is gone, and with it what is known of the row.
    """

    fingerprint: str
    path: str
    recorded: str
    stands: bool
    row: int | None = None
    left_out: str | None = None
    trained: list[Trained] = field(default_factory=list)


def datasets_of(
    records: Records, name: str, selection: str, shard: str, positions: Sequence[int]
) -> dict[int, list[InDataset]]:
    """The datasets made of a selection, by selected position of a shard."""
    found: dict[int, list[InDataset]] = {position: [] for position in positions}
    if not positions:
        return found
    for made in records.lineage.versions(f"{name}/filtered_dataset"):
        if made["inputs"].get(f"{name}/selection") != selection:
            continue
        folder = records.folder(made)
        identity = made["fingerprint"], str(folder), made["recorded"]
        if not stands(folder):
            for position in positions:
                found[position].append(InDataset(*identity, stands=False))
            continue
        rows = dict(
            pl.scan_parquet(folder / "tokens" / "sequences.parquet")
            .filter(pl.col("shard") == shard, pl.col("position").is_in(positions))
            .select("position", "row")
            .collect()
            .iter_rows()
        )
        leaks = _leaks(records, name, made, shard)
        orders = _orders(records, name, made) if rows else []
        for position in positions:
            row = rows.get(position)
            found[position].append(
                InDataset(
                    *identity,
                    stands=True,
                    row=row,
                    left_out=None
                    if row is not None
                    else leaks.get(position, "quotes held-out text"),
                    trained=[] if row is None else [_trained(records, *o, row) for o in orders],
                )
            )
    return found


def leakage_of(records: Records, name: str, dataset: Entry) -> pl.DataFrame | None:
    """What of a dataset's selection quotes held-out text, as found when it was made.

    None where that is gone, empty where the arm keeps it.
    """
    entry = records.one(f"{name}/leakage", dataset["inputs"].get(f"{name}/leakage"))
    if entry is None or not stands(records.folder(entry)):
        return None
    leaks = pl.read_parquet(records.folder(entry) / "leakage.parquet")
    return leaks.clear() if dataset["recipe"].get("leaks") == "keep" else leaks


def _leaks(records: Records, name: str, dataset: Entry, shard: str) -> dict[int, str]:
    """What each leaking position of a shard quotes, in words."""
    leaks = leakage_of(records, name, dataset)
    if leaks is None:
        return {}
    return {
        position: f"quotes held-out text of {row['protected']}, {row['n_words']} words: "
        f"{' '.join(row['quote'].split())[:QUOTE]}"
        for row in leaks.filter(pl.col("shard") == shard).iter_rows(named=True)
        for position in row["positions"]
    }


def _orders(records: Records, name: str, dataset: Entry) -> list[tuple[Entry, np.ndarray]]:
    """Target models that trained on a dataset, and each row's place in their order of training."""
    tokens = content(records.folder(dataset), "tokens").fingerprint
    orders = []
    for model in records.lineage.of(f"{name}/target_model"):
        if model["inputs"].get(f"{name}/filtered_dataset/tokens") == tokens:
            order = training_order(model["seed"], dataset["facts"]["sequences"])
            places = np.empty_like(order)
            places[order] = np.arange(len(order))
            orders.append((model, places))
    return sorted(orders, key=lambda o: (int(o[0]["seed"]), str(o[0]["recorded"])))


def _trained(records: Records, model: Entry, places: np.ndarray, row: int) -> Trained:
    place = int(places[row])
    # A checkpoint is named by the tokens that its end point, in sequences, came to.
    tokens = sorted(map(int, model["facts"]["checkpoints"]))
    ends = sorted(model["recipe"]["endpoints"])
    reached = {t: place < end for t, end in zip(tokens, ends, strict=True)}
    path = str(records.folder(model))
    return Trained(model["seed"], model["fingerprint"], path, place + 1, len(places), reached)
