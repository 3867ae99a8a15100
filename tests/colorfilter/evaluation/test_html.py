import base64
import hashlib
import math
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colorfilter.evaluation.examples import Example
from colorfilter.evaluation.figures import Picture
from colorfilter.evaluation.html import Section, Table, html, markdown, markdown_table

ATTACK = "</div></style><script>alert(1)</script><img src=x onerror=alert(1)> & \"'`|"
PICTURE = Picture("curves", 'words "<b>"', b"<svg>light</svg>", b"<svg>dark</svg>")


def example(
    texts: list[str],
    prior: list[float] | None = None,
    conditional: list[float] | None = None,
    **changed: Any,
) -> Example:
    n = len(texts)
    span = {
        "doc_id": "d1",
        "source_file": "/data/books.jsonl",
        "source_line": 7,
        "doc_start": 0,
        "n_tokens": n,
        "char_start": 1200,
        "char_end": 1300,
        "closes": False,
    }
    facts: dict[str, Any] = {"place": "best", "shard": "a", "position": 0, "color": -1.25}
    facts |= {"spans": [span]} | changed
    return Example(
        **facts,
        texts=texts,
        prior=np.array(prior or [1.0] * n, dtype=np.float32),
        conditional=np.array(conditional or [1.0] * n, dtype=np.float32),
    )


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    content: str = ""
    inside: list["Node"] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        return (self.attributes.get("class") or "").split()


class Reader(HTMLParser):
    """The elements of a page with all the text that stands within each."""

    VOID = frozenset({"meta", "img", "source"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[Node] = []
        self._open: list[Node] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        if self._open:
            self._open[-1].inside.append(node)
        self.all.append(node)
        if tag not in self.VOID:
            self._open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for node in self._open:
            node.content += data

    def find(self, tag: str, kind: str | None = None) -> list[Node]:
        return [n for n in self.all if n.tag == tag and (kind is None or kind in n.kinds)]


def everything(text: str) -> list[Section]:
    span = {"doc_id": text, "source_file": f"/x/{text}", "source_line": None, "n_tokens": 2}
    span |= {"doc_start": 0, "char_start": 0, "char_end": 1, "closes": True}
    shown = example([text, ""], [1.0, 2.0], [2.0, 1.0], place=text, spans=[span])
    table = Table([text, "b"], [[text, 1.0]])
    return [Section(text, text, table, PICTURE, [shown]), Section("Last", text)]


# Nothing of the corpus is believed -----------------------------------------------------------


def test_text_is_escaped_wherever_it_stands() -> None:
    page = Reader(html(ATTACK, everything(ATTACK)))
    assert {n.tag for n in page.all} == {
        *("html", "head", "meta", "title", "style", "body", "h1", "nav", "a", "section", "h2"),
        *("p", "picture", "source", "img", "div", "table", "thead", "tbody", "tr", "th", "td"),
        *("span", "h3", "article", "b", "small", "i"),
    }
    assert len(page.find("img")) == 1
    names = {name for node in page.all for name in node.attributes}
    assert not [name for name in names if name.startswith("on") or name == "style"]
    (title,), (heading,) = page.find("h1"), page.find("h3")
    assert title.content == heading.content == ATTACK
    assert page.find("td")[0].content == ATTACK
    assert page.find("i")[-2].content == ATTACK
    (place,) = [n for n in page.find("span") if n.attributes.get("title")]
    assert place.attributes["title"] == f"/x/{ATTACK}"
    assert f"document {ATTACK}" in place.content


def test_the_page_loads_nothing_and_links_only_within_itself() -> None:
    page = Reader(html("title", everything(ATTACK)))
    ids = {n.attributes["id"] for n in page.find("section")}
    assert len(ids) == 2
    for node in page.all:
        for name in ("src", "srcset", "href", "data", "action"):
            target = node.attributes.get(name)
            if target is not None and node.tag == "a":
                assert target.removeprefix("#") in ids
            elif target is not None:
                assert target.startswith("data:image/svg+xml;base64,")
    (style,) = page.find("style")
    assert not re.search(r"url|@import|</", style.content)


def test_the_policy_allows_this_style_and_inlined_pictures_alone() -> None:
    page = Reader(html("title", everything("text")))
    (policy,) = [
        n.attributes["content"] or ""
        for n in page.find("meta")
        if n.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    (style,) = page.find("style")
    digest = base64.b64encode(hashlib.sha256(style.content.encode()).digest()).decode()
    assert set(policy.split("; ")) == {
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    }


# Tokens --------------------------------------------------------------------------------------


def tokens(shown: Example) -> list[Node]:
    page = Reader(html("title", [Section("What was selected", "", examples=[shown])]))
    (sequence,) = page.find("div", "tokens")
    return sequence.inside


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1))
def test_tokens_reproduce_the_text(texts: list[str]) -> None:
    shown = example(texts)
    page = Reader(html("title", [Section("What was selected", "", examples=[shown])]))
    (sequence,) = page.find("div", "tokens")
    pictures = str.maketrans({c: chr(0x2400 + c) for c in {*range(32)} - {9, 10, 13}} | {127: "␡"})
    assert sequence.content == "".join(texts).translate(pictures)
    assert [node.content for node in sequence.inside] == [t.translate(pictures) for t in texts]


def test_line_ends_and_tabs_are_marked() -> None:
    (token,) = tokens(example(["a\r\n\tb\n"]))
    assert [(n.tag, n.kinds, n.content) for n in token.inside] == [
        ("b", ["return"], "\r"),
        ("b", ["newline"], "\n"),
        ("b", ["tab"], "\t"),
        ("b", ["newline"], "\n"),
    ]


def test_a_token_is_coloured_by_conditional_minus_prior_and_tells_it() -> None:
    prior = [math.nan, 3.0, 5.0, 3.0, 20.0, 3.0, 3.0]
    conditional = [math.nan, 3.1, 3.5, 3.8, 1.0, 99.0, 2.7]
    shown = tokens(example(list("abcdefg"), prior, conditional))
    assert [(n.kinds, n.attributes["title"]) for n in shown] == [
        ([], "no loss for this token"),
        ([], "+0.10 = 3.10 - 3.00"),
        (["lower3"], "-1.50 = 3.50 - 5.00"),
        (["higher2"], "+0.80 = 3.80 - 3.00"),
        (["lower8"], "-19.00 = 1.00 - 20.00"),
        (["higher8"], "+96.00 = 99.00 - 3.00"),
        (["lower1"], "-0.30 = 2.70 - 3.00"),
    ]


def test_every_colour_is_in_the_style_and_lower_and_higher_differ() -> None:
    page = html("title", [])
    found = dict(re.findall(r"\.((?:lower|higher)\d) \{ background: (rgb\([^)]*\)); \}", page))
    assert len(found) == len(set(found.values())) == 16


def test_the_end_of_a_document_is_marked_at_the_token_that_closes_it() -> None:
    span = example(["a"]).spans[0]
    spans = [{**span, "n_tokens": 2, "closes": True}, {**span, "n_tokens": 3, "closes": False}]
    shown = tokens(example(["a", "", "b", "c", ""], spans=spans))
    assert [i for i, node in enumerate(shown) if "closes" in node.kinds] == [1]


def test_a_sequence_says_its_color_losses_and_where_it_stands() -> None:
    shown = example(["a", "b", "c"], [math.nan, 2.0, 4.0], [math.nan, 1.0, 2.5])
    page = Reader(html("title", [Section("Selected", "", examples=[shown, shown])]))
    first, _ = page.find("article")
    assert "-1.250 = conditional 1.750 - prior 3.000" in first.content
    assert "books.jsonl line 7, document d1, characters 1,200 to 1,300" in first.content
    assert [n.content for n in page.find("h3")] == ["best"]


# Tables, pictures, Markdown ------------------------------------------------------------------


def test_columns_of_figures_are_marked_and_columns_of_words_are_not() -> None:
    header = ["arm", "tokens", "loss", "matches", "verdict", "nothing"]
    rows = [
        ["color", "1,000", "5.123 ± 0.100", ">2.00 1.50", "better", "-"],
        ["2", "200", "-4.0", "-", "7", "-"],
    ]
    page = Reader(html("title", [Section("Comparison", "", Table(header, rows))]))
    cells = [n for n in page.all if n.tag in {"th", "td"}]
    assert [n.content for n in cells] == [*header, *rows[0], *rows[1]]
    assert [bool(n.kinds) for n in cells] == 3 * [False, True, True, True, False, False]


def test_a_table_without_rows_has_its_header() -> None:
    page = Reader(html("title", [Section("Comparison", "", Table(["arm", "loss"], []))]))
    assert [n.content for n in page.find("th")] == ["arm", "loss"]


def test_a_picture_is_there_for_light_and_dark_paper() -> None:
    page = Reader(html("title", [Section("Curves", "", picture=PICTURE)]))
    (light,), (dark,) = page.find("img"), page.find("source")
    for node, name, svg in ((light, "src", PICTURE.light), (dark, "srcset", PICTURE.dark)):
        encoded = (node.attributes[name] or "").removeprefix("data:image/svg+xml;base64,")
        assert base64.b64decode(encoded) == svg
    assert light.attributes["alt"] == PICTURE.words
    assert dark.attributes["media"] == "(prefers-color-scheme: dark)"


def test_an_empty_line_begins_another_paragraph() -> None:
    section = Section("Comparison", "One.\n\nTwo.")
    assert [p.content for p in Reader(html("title", [section])).find("p")] == ["One.", "Two."]
    assert markdown("title", [section]).endswith("## Comparison\n\nOne.\n\nTwo.\n")


def test_markdown_has_rule_and_escaped_bars() -> None:
    text = markdown_table(Table(["a", "b|c"], [["x|y", 1], ["|", None]]))
    assert text.splitlines() == [
        "| a | b\\|c |",
        "| --- | --- |",
        "| x\\|y | 1 |",
        "| \\| | None |",
    ]


def test_markdown_has_the_same_sections_and_the_beginnings_of_the_sequences() -> None:
    shown = example(["a `b` |\n\n", " <script>", "x" * 300])
    sections = [
        Section("Comparison", "Lower is better.", Table(["arm"], [["color"]])),
        Section("Curves", "Lines.", picture=PICTURE),
        Section("What was selected", "Text.", examples=[shown]),
    ]
    lines = markdown("books", sections).splitlines()
    assert lines[0] == "# books"
    assert [line for line in lines if line.startswith("##")] == [
        "## Comparison",
        "## Curves",
        "## What was selected",
    ]
    assert "| color |" in lines
    assert '![words "<b>"](curves.svg)' in lines
    row = "| best | -1.250 | `books.jsonl` | `a 'b' \\| <script>" + "x" * 84 + "` |"
    assert row in lines


@pytest.mark.parametrize("name", ["report", "Cost & hours"])
def test_a_section_can_be_reached_from_the_top(name: str) -> None:
    page = Reader(html("title", [Section(name, "")]))
    (link,), (section,) = page.find("a"), page.find("section")
    assert link.content == name
    assert link.attributes["href"] == f"#{section.attributes['id']}"
