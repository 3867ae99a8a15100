"""Tiny things that several tests share: texts, a tokenizer, an architecture, packed sequences."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from colorfilter import documents, tokens
from colorfilter.recipe import Model, Training

settings.register_profile("small", max_examples=40, derandomize=True, deadline=None, database=None)
settings.load_profile("small")

LENGTH = 16


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
