"""Tiny shared fixtures: texts, a tokenizer, an architecture, packed sequences."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import duckdb
import polars as pl
import pytest
from hypothesis import settings

from colorfilter.config.recipe import Model, Training
from colorfilter.data import documents, tokens
from colorfilter.selection.score_tables import exclude, pair
from colorfilter.selection.sql import fetch
from colorfilter.training.spec import TrainSpec
from colorfilter.training.training import train
from resources.score_store import SCHEMA

settings.register_profile("small", max_examples=40, derandomize=True, deadline=None, database=None)
settings.load_profile("small")

LENGTH = 16
ENDPOINTS = (40, 60)  # of the run `spec`, in sequences


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_texts(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = [
        "time",
        "year",
        "people",
        "way",
        "day",
        "man",
        "thing",
        "woman",
        "life",
        "child",
        "world",
        "school",
        "state",
        "family",
    ]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randint(3, 40))) for i in range(n)]


def as_documents(texts: list[str]) -> list[dict[str, str]]:
    return [
        {"doc_id": f"doc{i}", "sha256": documents.text_sha256(text), "text": text}
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(61, 0)


@pytest.fixture(scope="session")
def tokenizer_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens.train_tokenizer(texts, 280, folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tokenizer_folder: Path) -> tokens.Encoder:
    return tokens.Encoder(tokenizer_folder)


@pytest.fixture(scope="session")
def packed(
    texts: list[str], encoder: tokens.Encoder, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    tokens.pack(as_documents(texts), encoder, LENGTH, folder)
    return folder


@pytest.fixture(scope="session")
def held_out(encoder: tokens.Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_out")
    tokens.pack(as_documents(make_texts(5, 1)), encoder, LENGTH, folder)
    return folder


@pytest.fixture(scope="session")
def tiny() -> Model:
    return Model(
        type="gpt_neox",
        config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
        },
    )


@pytest.fixture(scope="session")
def quick_training() -> Training:
    return Training(learning_rate=1e-2, batch_sequences=4, warmup=0.1, decay=0.25)


class Store:
    """Score tables in memory: losses by a prior and a conditional of the domain `books`.

    What is worked out when scores are published stands after `publish`.
    """

    def __init__(self) -> None:
        self.connection = duckdb.connect()
        self.connection.execute(SCHEMA)
        for model in (
            ("prior", "prior", None, True),
            ("old_prior", "prior", None, False),
            ("conditional", "conditional", "books", True),
            ("old_conditional", "conditional", "books", False),
            ("other", "conditional", "code", True),
        ):
            self.connection.execute("INSERT INTO models VALUES (?, ?, ?, '', ?)", model)

    def insert(self, table: str, frame: pl.DataFrame) -> None:
        rows = frame.to_arrow()  # noqa: F841  (read by name below)
        self.connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM rows")

    def add_sequences(self, shard: str, n_tokens: list[int]) -> None:
        positions = range(len(n_tokens))
        frame = pl.DataFrame({"shard": shard, "position": positions, "n_tokens": n_tokens})
        self.insert("sequences", frame)

    def add_losses(self, model: str, shard: str, losses: dict[int, float]) -> None:
        frame = pl.DataFrame(
            {"position": losses.keys(), "loss": losses.values()},
            schema={"position": pl.Int64, "loss": pl.Float32},
        )
        labels = {"model": model, "shard": shard, "precision": "float32"}
        self.insert("losses", frame.with_columns(**{k: pl.lit(v) for k, v in labels.items()}))

    def add_colors(self, shard: str, colors: dict[int, float], prior: float = 4.0) -> None:
        """Losses whose difference is `colors`, and others by models that do not count."""
        self.add_losses("prior", shard, dict.fromkeys(colors, prior))
        self.add_losses("conditional", shard, {p: prior + c for p, c in colors.items()})
        for model in ("old_prior", "old_conditional", "other"):
            self.add_losses(model, shard, {p: 9.0 - c for p, c in colors.items()})

    def add_document(
        self, shard: str, doc_id: str, sha256: str, spans: list[tuple[int, int]]
    ) -> None:
        """A document with spans (position, n_tokens)."""
        total = sum(n for _, n in spans)
        self.connection.execute(
            "INSERT INTO documents VALUES (?, ?, ?, 1, 'web', 1, ?, ?, '{}')",
            [doc_id, shard, f"/data/{doc_id}", total, sha256],
        )
        for position, n in spans:
            self.connection.execute(
                "INSERT INTO spans VALUES (?, ?, 0, ?, 0, ?, 0, 1)", [shard, position, doc_id, n]
            )

    def publish(self) -> None:
        exclude(self.connection, LENGTH)
        shards = [s for (s,) in fetch(self.connection, "SELECT DISTINCT shard FROM losses")]
        for domain in ("books", "code"):
            pair(self.connection, domain, shards)


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.connection.close()


@pytest.fixture(scope="module")
def spec(
    packed: Path,
    held_out: Path,
    tokenizer_folder: Path,
    tiny: Model,
    quick_training: Training,
    tmp_path_factory: pytest.TempPathFactory,
) -> TrainSpec:
    """A small run to two end points, with dropout: its bits depend on every random draw."""
    dropping = tiny.model_copy(update={"config": {**tiny.config, "hidden_dropout": 0.1}})
    return TrainSpec(
        start=dropping,
        tokens=packed,
        tokenizer=tokenizer_folder,
        training=quick_training,
        seed=5,
        endpoints=ENDPOINTS,
        out=tmp_path_factory.mktemp("spec"),
        held_out=held_out,
    )


@pytest.fixture(scope="module")
def undisturbed(spec: TrainSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run of `spec` leaves when nothing disturbs it."""
    out = tmp_path_factory.mktemp("undisturbed")
    train(replace(spec, out=out))
    return out
