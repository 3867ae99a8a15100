"""What is recomputed in a score store when a part of it changes: exclusions and pairs."""

from pathlib import Path

import duckdb

from colorfilter.selection.score_tables import pair
from colorfilter.selection.sql import fetch
from resources.home import Home
from resources.score_parts import Part, PublishedModel
from resources.score_store import ScoreStore
from tests.resources.published import LENGTH, MODELS, colors, excluded, parts


def test_a_copy_comes_back_when_the_first_shard_retires(store: ScoreStore, tmp_path: Path) -> None:
    losses = {"p": [3.0, 3.0], "c": [1.0, 2.0]}
    a, b, c = (parts(tmp_path, s, losses, text="same") for s in ("a", "b", "c"))
    store.publish([*b, *c], MODELS, LENGTH)
    assert excluded(store) == [("c", 0, "copy"), ("c", 1, "copy")]
    store.publish([*a, *b, *c], MODELS, LENGTH)
    assert {s for s, _, _ in excluded(store)} == {"b", "c"}
    store.publish([*b, *c], MODELS, LENGTH)
    assert {s for s, _, _ in excluded(store)} == {"c"}
    store.publish(c, MODELS, LENGTH)
    assert excluded(store) == []


def test_a_changed_text_is_compared_anew(store: ScoreStore, tmp_path: Path) -> None:
    losses = {"p": [3.0], "c": [1.0]}
    a = parts(tmp_path, "a", losses)
    store.publish([*a, *parts(tmp_path, "b", losses, text="a")], MODELS, LENGTH)
    assert excluded(store) == [("b", 0, "copy")]
    store.publish([*a, *parts(tmp_path, "b", losses, "2")], MODELS, LENGTH)
    assert excluded(store) == []


def test_sequences_shorter_than_the_length_are_padded(store: ScoreStore, tmp_path: Path) -> None:
    a = parts(tmp_path, "a", {"p": [3.0, 1.0], "c": [1.0, 1.0]})
    store.publish(a, MODELS, LENGTH)
    assert excluded(store) == []
    store.publish(a, MODELS, LENGTH + 1)
    assert excluded(store) == [("a", 0, "padded"), ("a", 1, "padded")]


def mark_pairs(store: ScoreStore) -> None:
    """Make the colors that stand tell themselves from those made anew."""
    with duckdb.connect(str(Home(store.home).scores)) as connection:
        connection.execute("UPDATE paired_losses SET loss_conditional = 100, loss_prior = 0")


def test_pairs_are_made_anew_only_where_losses_changed(store: ScoreStore, tmp_path: Path) -> None:
    models = [*MODELS, PublishedModel("k", "conditional", "code", "/k")]

    def published(a: list[Part], b: list[Part]) -> list[tuple]:
        store.publish([*a, *b], models, LENGTH)
        with store.read() as connection:
            found = fetch(connection, "SELECT domain, shard, color FROM color ORDER BY ALL")
        mark_pairs(store)
        return found

    a, b = (parts(tmp_path, s, {"p": [3.0], "c": [1.0], "k": [4.0]}) for s in ("a", "b"))
    assert published(a, b) == [
        ("books", "a", -2.0),
        ("books", "b", -2.0),
        ("code", "a", 1.0),
        ("code", "b", 1.0),
    ]
    changed = parts(tmp_path, "b", {"p": [3.5], "c": [2.0], "k": [4.5]}, "2")
    kept = {("books", "a", 100.0), ("code", "a", 100.0)}
    by_code = [changed[3] if p.model == "k" else p for p in b]
    assert set(published(a, by_code)) == kept | {("books", "b", 100.0), ("code", "b", 1.5)}
    by_prior = [changed[1] if p.model == "p" else p for p in by_code]
    assert set(published(a, by_prior)) == kept | {("books", "b", -2.5), ("code", "b", 1.0)}
    by_text = [changed[0], *by_prior[1:]]
    assert {c for _, _, c in published(a, by_text)} == {100.0}
    assert set(published(a, [])) == kept


def test_another_model_makes_the_pairs_of_its_domain_anew(
    store: ScoreStore, tmp_path: Path
) -> None:
    old = [*MODELS, PublishedModel("k", "conditional", "code", "/k")]
    made = parts(tmp_path, "a", {"p": [3.0], "c": [1.0], "k": [4.0], "c2": [3.5], "p2": [0.0]})
    by_model = {p.model: p for p in made}

    def colors_by(*models: PublishedModel) -> list[tuple]:
        store.publish([by_model[None], *(by_model[m.model] for m in models)], models, LENGTH)
        with store.read() as connection:
            return fetch(connection, "SELECT domain, color FROM color ORDER BY ALL")

    assert colors_by(*old) == [("books", -2.0), ("code", 1.0)]
    mark_pairs(store)
    books = PublishedModel("c2", "conditional", "books", "/c2")
    assert colors_by(old[0], books, old[2]) == [("books", 0.5), ("code", 100.0)]
    prior = PublishedModel("p2", "prior", None, "/p2")
    assert colors_by(prior, books, old[2]) == [("books", 3.5), ("code", 4.0)]
    assert colors_by(prior, old[2]) == [("code", 4.0)]


def test_losses_changed_in_place_are_paired_anew_by_shard(
    store: ScoreStore, tmp_path: Path
) -> None:
    losses = {"p": [3.0, 2.0], "c": [1.0, 4.0]}
    store.publish([*parts(tmp_path, "a", losses), *parts(tmp_path, "b", losses)], MODELS, LENGTH)
    mark_pairs(store)
    with duckdb.connect(str(Home(store.home).scores)) as connection:
        connection.execute("UPDATE losses SET loss = 2.5 WHERE model = 'p' AND position = 0")
        pair(connection, "books", ["b"])
    assert colors(store) == [("a", 0, 100.0), ("a", 1, 100.0), ("b", 0, -1.5), ("b", 1, 2.0)]
