"""Render the sections of a report as one HTML file that opens offline, and as Markdown.

The templates are in `templates/`. Corpus text is not trusted: Jinja escapes all text, the page has
no script, and its Content-Security-Policy lets a browser load only the embedded style and pictures.
"""

import base64
import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup, escape

from colorfilter.evaluation.examples import Example
from colorfilter.evaluation.figures import DARK, LIGHT, Picture

# Colour scale of a token's loss difference: nats per step, and steps in either direction.
STEP = 0.5
STEPS = 8

# Characters that a browser would change or hide: it turns \r into \n and drops \0.
MARKED = {
    "\n": '<b class="newline">\n</b>',
    "\r": '<b class="return">&#13;</b>',
    "\t": '<b class="tab">\t</b>',
}
CONTROLS = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in MARKED} | {127: "\u2421"}


@dataclass(frozen=True)
class Table:
    """Rows of table cells under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Section:
    """A section of the report: title, text, and optionally a table, a picture and examples.

    An empty line within `text` begins a new paragraph.
    """

    title: str
    text: str
    table: Table | None = None
    picture: Picture | None = None
    examples: Sequence[Example] = ()


class Token(NamedTuple):
    """A token as shown on the page: its text, its CSS classes, and its tooltip."""

    text: str
    classes: str | None
    about: str


def html(title: str, sections: Sequence[Section]) -> str:
    """Render the sections as one self-contained HTML file."""
    style = _environment().get_template("report.css").render(light=LIGHT, dark=DARK, steps=STEPS)
    return (
        _environment()
        .get_template("report.html")
        .render(
            title=title,
            sections=sections,
            style=Markup(style),  # noqa: S704  (this project's own)
            digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
            step=STEP,
            steps=STEPS,
        )
    )


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Render the sections as Markdown: pictures as files `<name>.svg`, examples as table rows."""
    text = _environment().get_template("report.md").render(title=title, sections=sections)
    return text.rstrip("\n") + "\n"


def markdown_table(table: Table) -> str:
    """Render a table as Markdown; bars within cells are escaped."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    return "\n".join(
        [line(table.header), line(["---"] * len(table.header)), *map(line, table.rows)]
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("colorfilter.evaluation"),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "anchor": lambda title: re.sub(r"\W+", "-", title.lower()),
        "begins": _beginnings,
        "colour": _colour,
        "columns": _columns,
        "data_uri": _data_uri,
        "file": lambda path: Path(path).name,
        "markdown": markdown_table,
        "mean": lambda losses: float(np.nanmean(losses)),
        "tokens": _tokens,
        "visible": _visible,
    }
    return environment


def _beginnings(examples: Sequence[Example]) -> Table:
    """Return a table with the first characters of each example, for Markdown."""
    rows = []
    for example in examples:
        files = {Path(span["source_file"]).name: None for span in example.spans}
        begins = " ".join("".join(example.texts).split())[:100]
        cells = (", ".join(files), begins)
        code = ("`" + cell.replace("`", "'") + "`" for cell in cells)
        rows.append([example.place, f"{example.color:.3f}", *code])
    return Table(["rank", "color", "file", "text begins with"], rows)


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _columns(table: Table) -> list[str | None]:
    """Return the CSS class of each column: `figures` if it holds numbers, else None."""
    cells = [[str(row[i]) for row in table.rows] for i in range(len(table.header))]
    return ["figures" if _is_figures(column) else None for column in cells]


def _is_figures(cells: Sequence[str]) -> bool:
    """Return whether cells hold only numbers, with signs, bounds and intervals."""
    return any(re.search(r"\d", cell) for cell in cells) and all(
        re.fullmatch(r"[-+<>±%.,\d\s]*", cell) for cell in cells
    )


def _tokens(example: Example) -> Iterator[Token]:
    """Yield the tokens of a sequence, coloured by conditional minus prior loss."""
    ends = np.cumsum([span["n_tokens"] for span in example.spans])
    closing = {
        int(end) - 1 for end, span in zip(ends, example.spans, strict=True) if span["closes"]
    }
    losses: Any = zip(example.texts, example.prior, example.conditional, strict=True)
    for i, (text, prior, conditional) in enumerate(losses):
        difference = float(conditional) - float(prior)
        colour, about = "", "no loss for this token"
        if not np.isnan(difference):
            colour = _colour(round(float(np.clip(difference / STEP, -STEPS, STEPS))))
            about = f"{difference:+.2f} = {conditional:.2f} - {prior:.2f}"
        classes = " ".join(filter(None, [colour, "closes" if i in closing else ""]))
        yield Token(text, classes or None, about)


def _colour(level: int) -> str:
    return f"{'lower' if level < 0 else 'higher'}{abs(level)}" if level else ""


def _visible(text: str) -> Markup:
    """Escape text; line ends and tabs are marked by the style, other controls become symbols."""
    escaped = str(escape(text.translate(CONTROLS)))
    return Markup("".join(MARKED.get(c, c) for c in escaped))  # noqa: S704  (escaped above)
