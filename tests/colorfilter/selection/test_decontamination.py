import gzip
import itertools
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colorfilter.selection import decontamination
from colorfilter.selection.dataset import unbroken_runs, whole_documents, with_text
from colorfilter.selection.decontamination import (
    Match,
    Protected,
    find_leaks,
    search,
    without_leaks,
    words,
)

PASSAGE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness"
)


def expected(protected: list[str], texts: list[str], size: int, least: int) -> list[Match]:
    """Word by word: words that lie in a run of words that some protected text has."""
    first: dict[tuple[str, ...], int] = {}
    for i, text in enumerate(protected):
        spelled = [w.lower() for w in re.findall(r"[^\W_]+", text)]
        n = min(size, len(spelled))
        for at in range(len(spelled) - n + 1) if n >= least else ():
            first.setdefault(tuple(spelled[at : at + n]), i)
    found = []
    for number, text in enumerate(texts):
        places = list(re.finditer(r"[^\W_]+", text))
        spelled = [p.group().lower() for p in places]
        covered = [False] * len(places)
        begins: dict[int, list[int]] = {}
        for n in range(least, size + 1):
            for at in range(len(places) - n + 1):
                document = first.get(tuple(spelled[at : at + n]))
                if document is not None:
                    covered[at : at + n] = [True] * n
                    begins.setdefault(at, []).append(document)
        at = 0
        while at < len(places):
            end = at
            while end < len(places) and covered[end]:
                end += 1
            if end > at:
                met = Counter(d for i in range(at, end) for d in begins.get(i, []))
                start, stop = places[at].start(), places[end - 1].end()
                most = met.most_common(1)[0][0]
                found.append(Match(number, start, stop, end - at, text[start:stop], str(most)))
            at = max(end, at + 1)
    return found


def protect(texts: list[str]) -> Protected:
    return Protected((str(i), text) for i, text in enumerate(texts))


# Words and matches ---------------------------------------------------------------------------

FEW_WORDS = st.lists(
    st.tuples(
        st.sampled_from(["a", "A", "ab", "É", "é", "7", "b"]),
        st.sampled_from([" ", "  ", ", ", "_", "\n", "'", " — ", "…"]),
    ),
    max_size=30,
).map(lambda pairs: "".join(word + mark for word, mark in pairs))
SEVERAL = st.lists(FEW_WORDS, max_size=5)


@given(SEVERAL, SEVERAL, st.integers(1, 12), st.sampled_from([None, 1, 5]))
def test_matches_are_those_found_word_by_word(
    protected: list[str], texts: list[str], block: int, hashes: int | None
) -> None:
    """In blocks of any size, and whether or not different runs of words have the same hash."""
    ngrams = decontamination.hashed_ngrams
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decontamination, "NGRAM_WORDS", 4)
        patch.setattr(decontamination, "LEAST_WORDS", 2)
        patch.setattr(decontamination, "BLOCK_CHARS", block)
        if hashes:
            patch.setattr(
                decontamination, "hashed_ngrams", lambda *a: ngrams(*a) % np.uint64(hashes)
            )
        assert protect(protected).matches(texts) == expected(protected, texts, 4, 2)


def test_a_quote_is_found_whatever_its_case_and_punctuation() -> None:
    quoted = "it was the BEST of times -- it was the worst_of times (it was the Age of Wisdom!)"
    text = f"As Dickens has it: “{quoted}”, and so on."
    (match,) = protect(["something else " * 20, PASSAGE]).matches(["", text])
    assert match == Match(1, 20, 20 + len(quoted) - 2, 18, quoted[:-2], "1")


def test_twelve_words_of_a_longer_text_are_no_match() -> None:
    spelled = words(PASSAGE)
    protected = protect([PASSAGE])
    assert not protected.matches([" ".join(spelled[3:15]) + " end"])
    assert len(protected.matches([" ".join(spelled[3:16]) + " end"])) == 1


def test_a_quote_that_is_broken_by_a_word_is_two() -> None:
    spelled = words(PASSAGE)
    text = " ".join([*spelled[:13], "never", *spelled[5:24], *spelled[:13]])
    found = protect([PASSAGE]).matches([text])
    assert [m.n_words for m in found] == [13, 19 + 13]
    assert found[1].quote == " ".join([*spelled[5:24], *spelled[:13]])


def test_a_quote_does_not_go_on_in_the_next_text() -> None:
    spelled = words(PASSAGE)
    assert not protect([PASSAGE]).matches([" ".join(spelled[:8]), " ".join(spelled[8:20])])
    found = protect([PASSAGE]).matches([" ".join(spelled[:13]), " ".join(spelled[3:20])])
    assert [(m.text, m.n_words) for m in found] == [(0, 13), (1, 17)]


def test_a_run_of_words_over_two_protected_texts_is_not_protected() -> None:
    spelled = words(PASSAGE)
    halves = [" ".join(spelled[:12]), " ".join(spelled[12:])]
    assert not protect([*halves, "x " * 20]).matches([" ".join(spelled[1:20])])


def test_a_match_names_the_document_that_has_most_of_it() -> None:
    spelled = words(PASSAGE)
    parts = [" ".join(spelled[:13]), " ".join(spelled[1:]), PASSAGE, " ".join(spelled[:14])]
    found = protect(parts).matches([f"{PASSAGE} never {PASSAGE}", parts[3]])
    assert [m.protected for m in found] == ["1", "1", "0"]
    found = protect(parts[::-1]).matches([f"{PASSAGE} never {PASSAGE}"])
    assert [m.protected for m in found] == ["1", "1"]


def test_short_items_are_protected_as_a_whole_and_the_shortest_not_at_all() -> None:
    spelled = words(PASSAGE)
    items = [" ".join(spelled[:n]) for n in (7, 8, 12)]
    protected = protect(items)
    assert (len(protected), protected.too_short) == (2, 1)
    assert not protected.matches([items[0] + " end"])
    assert not protected.matches(["the " + " ".join(spelled[1:12]) + " end"])
    (match,) = protected.matches(["here: " + items[1].upper() + " end"])
    assert (match.n_words, match.protected) == (8, "1")
    (match,) = protected.matches(["here: " + items[2] + " end"])
    assert (match.n_words, match.quote) == (12, items[2])


def test_nothing_is_found_where_there_is_nothing() -> None:
    assert protect([]).matches([PASSAGE]) == []
    assert protect(["", "…"]).too_short == 2
    assert protect([PASSAGE]).matches([]) == []
    assert protect([PASSAGE]).matches(["", "\n", "—"]) == []


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Grüße, STRASSE", "grüße strasse"),
        ("L\u2019ÎLE d'Or", "l île D OR"),
        ("İstanbul ΩΣ", "istanbul ωσ"),
        ("snake_case v2.0", "Snake Case V2 0"),
        ("价格\uff0c上涨。\U0001d400 ٣", "价格 上涨 \U0001d400 ٣"),
        ("zero\u200bwidth soft\u00adhyphen\u00a0nbsp", "zero width soft hyphen nbsp"),
    ],
)
def test_words_are_letters_and_digits_of_any_script_in_lower_case(text: str, same: str) -> None:
    assert words(text) == words(same)
    assert len(words(text)) == len(same.split())
    for spelled in (text, same):
        (match,) = protect([f"{text} " * 13]).matches([f"({spelled}) " * 13])
        assert match.n_words == 13 * len(words(text))


def test_hashes_are_polynomials_modulo_two_to_the_64() -> None:
    """By Python's own integers: the same on every machine and in every process."""

    def mixed(x: int) -> int:
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) % 2**64
        return x ^ x >> 31

    def polynomial(values: list[int]) -> int:
        return sum(v * 0x9E3779B97F4A7C15**i for i, v in enumerate(values)) % 2**64

    hashes, bounds = decontamination.hashed_words("One, größer \U0001d400b  3")
    spelled = ["one", "größer", "\U0001d400b", "3"]
    assert hashes.tolist() == [mixed(polynomial([mixed(ord(c)) for c in w])) for w in spelled]
    assert bounds.tolist() == [[0, 3], [5, 11], [12, 14], [16, 17]]
    ngrams = [polynomial(hashes[i : i + 3].tolist()) for i in range(2)]
    assert decontamination.hashed_ngrams(hashes, 3).tolist() == ngrams


def test_quotes_in_a_text_of_millions_of_characters_are_found_at_their_places() -> None:
    rng = random.Random(0)
    filler = " ".join(rng.choices(["alpha", "beta", "gamma", "delta"], k=500_000))
    block = decontamination.BLOCK_CHARS
    places = [0, block - 50, 4 * block - 3, len(filler) - 5]
    text = ""
    for place in places:
        text += filler[len(text) : place] + f"\n{PASSAGE.upper()}.\n"
    text += filler[len(text) :]
    found = protect([PASSAGE]).matches([text])
    assert [m.char_start for m in found] == [p + 1 for p in places]
    assert {m.quote for m in found} == {PASSAGE.upper()}


def test_rows_are_searched_in_order_over_many_batches() -> None:
    rows = [{"text": f"{i} " + ("word " * 5_000 if i % 2 else PASSAGE), "n": i} for i in range(200)]
    found = list(search(protect([PASSAGE]), rows))
    assert [row["n"] for row, _ in found] == list(range(0, 200, 2))
    assert {m.quote for _, m in found} == {PASSAGE}


@pytest.mark.skipif("COLORFILTER_TEST_DATA" not in os.environ, reason="no real text here")
def test_textbook_pages_quote_science_questions() -> None:
    data = Path(os.environ["COLORFILTER_TEST_DATA"])

    def read(name: str, fields: list[str]) -> list[str]:
        with gzip.open(data / name, "rt", encoding="utf-8") as lines:
            return [" ".join(str(json.loads(line)[f]) for f in fields) for line in lines]

    items = read("mc/sciq/validation_part.jsonl.gz", ["question", "support"])
    pages = read("web/openstax_textbook_pages.jsonl.gz", ["text"])
    found = protect(items).matches(pages)
    assert len(found) > 5
    assert found == expected(items, pages, 13, 8)


# What was selected ---------------------------------------------------------------------------

SPAN = ["position", "doc_id", "doc_start", "n_tokens", "char_start", "char_end"]


class Shard:
    """Documents cut into sequences at given characters, a token a character."""

    def __init__(self, folder: Path, texts: dict[str, str], cuts: dict[str, list[int]]) -> None:
        self.texts = texts
        rows = []
        position = 0
        for doc_id, text in texts.items():
            edges = [0, *cuts[doc_id], len(text)]
            for start, end in itertools.pairwise(edges):
                rows.append((position, doc_id, start, end - start, start, end))
                position += 1
            position -= 1  # the next document begins in the same sequence
        self.spans = pl.DataFrame(rows, SPAN, orient="row")
        self.tokens, self.documents = folder, folder / "documents.parquet"
        self.spans.write_parquet(folder / "spans.parquet")
        pl.DataFrame(
            {
                "doc_id": list(texts),
                "source_file": [f"/data/{d}" for d in texts],
                "source": "web",
                "extra": "{}",
                "text": list(texts.values()),
            }
        ).write_parquet(self.documents)

    def chosen(self, positions: list[int]) -> pl.DataFrame:
        return pl.DataFrame(
            {"position": positions, "color": [0.0] * len(positions), "shard": "web"},
            {"position": pl.Int64, "color": pl.Float64, "shard": pl.String},
        )

    def leaks(
        self, protected: list[str], chosen: pl.DataFrame, whole: bool = False
    ) -> tuple[pl.DataFrame, int]:
        return find_leaks(protect(protected), "web", chosen, self.tokens, self.documents, whole)

    def selected_texts(self, chosen: pl.DataFrame, whole: bool = False) -> list[dict[str, Any]]:
        runs = unbroken_runs(self.spans, chosen)
        runs = whole_documents(runs, self.spans) if whole else runs
        return list(with_text(runs, self.documents, "web"))


def test_the_sequences_of_a_match_are_those_that_carry_a_character_of_it(tmp_path: Path) -> None:
    text = f"Before. {PASSAGE.upper()}, after."
    start, end = 8, 8 + len(PASSAGE)
    shard = Shard(
        tmp_path,
        {"a": "x" * 30, "b": text, "c": "y" * 30},
        {"a": [10], "b": [start, 40, 70, end], "c": [15]},
    )
    chosen = shard.chosen([0, 1, 2, 3, 4, 5, 6])
    leaks, n_texts = shard.leaks([PASSAGE], chosen)
    assert n_texts == 3
    assert leaks.to_dicts() == [
        {
            "shard": "web",
            "positions": [2, 3, 4],
            "doc_id": "b",
            "source_file": "/data/b",
            "char_start": start,
            "char_end": end,
            "n_words": 24,
            "quote": PASSAGE.upper(),
            "protected": "0",
        }
    ]
    assert without_leaks(chosen, leaks)["position"].to_list() == [0, 1, 5, 6]
    # Of a passage that was selected in part, what was selected counts.
    leaks, _ = shard.leaks([PASSAGE], shard.chosen([0, 3, 4]))
    assert leaks["positions"].to_list() == [[3, 4]]
    assert leaks["char_start"][0] > start
    assert len(shard.leaks([PASSAGE], shard.chosen([0, 2]))[0]) == 0


def test_leaks_of_another_shard_leave_a_selection_as_it_is() -> None:
    chosen = pl.DataFrame({"rank": [1, 2, 3], "shard": ["b", "a", "b"], "position": [4, 4, 1]})
    leaks = pl.DataFrame(
        {"shard": ["a", "b", "b"], "positions": [[4, 9], [], [7, 1]]},
    )
    assert without_leaks(chosen, leaks)["rank"].to_list() == [1]
    assert without_leaks(chosen, leaks.clear()).equals(chosen)


def test_a_match_that_a_new_edge_makes_is_found_too(tmp_path: Path) -> None:
    """'foretaste' is another word until the sequence before is taken out and leaves 'taste'."""
    taste = "taste of honey and of the milk that runs through all the land"
    text = f"{PASSAGE} fore{taste} here"
    edge = len(PASSAGE) + 5
    shard = Shard(tmp_path, {"a": text}, {"a": [edge]})
    protected = [PASSAGE, taste]
    leaks, n_texts = shard.leaks(protected, shard.chosen([0, 1]))
    assert leaks["quote"].to_list() == [PASSAGE, taste]
    assert leaks["positions"].to_list() == [[0], [1]]
    assert n_texts == 1
    assert len(shard.leaks(protected[1:], shard.chosen([0, 1]))[0]) == 0


def test_whole_documents_leak_in_what_was_not_selected_too(tmp_path: Path) -> None:
    shard = Shard(
        tmp_path,
        {"a": f"Selected words. {PASSAGE}", "b": PASSAGE, "c": "z" * 40},
        {"a": [15], "b": [20], "c": [20]},
    )
    chosen = shard.chosen([0, 3])
    leaks, n_texts = shard.leaks([PASSAGE], chosen, whole=True)
    assert n_texts == 2
    assert leaks.select("doc_id", "positions").rows() == [("a", [])]
    assert without_leaks(chosen, leaks).equals(chosen)


WORDS = st.sampled_from(["a", "b", "ab", "ba", "aab"])
TEXT = st.lists(WORDS, min_size=1, max_size=25).map(" ".join)


@given(st.data(), st.booleans())
def test_nothing_is_left_once_the_sequences_are_taken_out(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, whole: bool
) -> None:
    texts = {f"d{i}": t for i, t in enumerate(data.draw(st.lists(TEXT, min_size=1, max_size=4)))}
    cuts = {
        doc_id: sorted(data.draw(st.sets(st.integers(1, len(text)), max_size=6)) - {len(text)})
        for doc_id, text in texts.items()
    }
    shard = Shard(tmp_path_factory.mktemp("shard"), texts, cuts)
    every = sorted(set(shard.spans["position"]))
    chosen = shard.chosen(sorted(data.draw(st.sets(st.sampled_from(every), min_size=1))))
    protected = data.draw(st.lists(TEXT, max_size=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decontamination, "NGRAM_WORDS", 4)
        patch.setattr(decontamination, "LEAST_WORDS", 3)
        leaks, n_texts = shard.leaks(protected, chosen, whole)
    looked_through = shard.selected_texts(chosen, whole)
    assert n_texts == len(looked_through)
    first = [
        (r["doc_id"], r["char_start"] + m.char_start, r["char_start"] + m.char_end, m.n_words)
        for r in looked_through
        for m in expected(protected, [r["text"]], 4, 3)
    ]
    found = leaks.select("doc_id", "char_start", "char_end", "n_words").rows()
    assert found[: len(first)] == first
    for i, leak in enumerate(leaks.to_dicts()):
        assert texts[leak["doc_id"]][leak["char_start"] : leak["char_end"]] == leak["quote"]
        carrying = [
            s["position"]
            for s in shard.spans.to_dicts()
            if s["doc_id"] == leak["doc_id"]
            and max(s["char_start"], leak["char_start"]) < min(s["char_end"], leak["char_end"])
            and s["position"] in set(chosen["position"])
        ]
        if i < len(first):
            assert leak["positions"] == carrying
        else:  # found after some of them were taken out
            assert set() < set(leak["positions"]) <= set(carrying)
    left = shard.selected_texts(without_leaks(chosen, leaks))
    assert expected(protected, [r["text"] for r in left], 4, 3) == []
