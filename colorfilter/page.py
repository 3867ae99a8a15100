"""Sections of a report as one HTML file that opens offline, and as Markdown.

What a corpus says is not to be trusted: all text is escaped, the page has no script, and by its
Content-Security-Policy a browser loads nothing but the style and the pictures within it.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from colorfilter.examples import Example
from colorfilter.figures import DARK, LIGHT, Picture

# The colour scale of a token's difference: nats in a step, and steps to either side.
STEP = 0.5
STEPS = 8

# What a browser would change or not show: it takes \r for \n, and knows no \0.
MARKED = {
    "\n": '<b class="newline">\n</b>',
    "\r": '<b class="return">&#13;</b>',
    "\t": '<b class="tab">\t</b>',
}
CONTROLS = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in MARKED} | {127: "\u2421"}


@dataclass(frozen=True)
class Table:
    """Cells in words under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Section:
    """A part of the report: a title, what it says, and what else there is.

    An empty line within `text` begins another paragraph.
    """

    title: str
    text: str
    table: Table | None = None
    picture: Picture | None = None
    examples: Sequence[Example] = ()


# Markdown ----------------------------------------------------------------------------------------


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The sections as Markdown: a picture is the file `<name>.svg`, an example a row of a table."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", section.text]
        if section.picture:
            parts.append(f"![{section.picture.words}]({section.picture.name}.svg)")
        if section.table:
            parts.append(markdown_table(section.table.header, section.table.rows))
        if section.examples:
            rows = [_example_cells(example) for example in section.examples]
            parts.append(markdown_table(["place", "color", "file", "begins"], rows))
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; bars within cells are escaped."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *(line(r) for r in rows)])


def _example_cells(example: Example) -> list[str]:
    files = {Path(span["source_file"]).name: None for span in example.spans}
    begins = " ".join("".join(example.texts).split())[:100]
    return [example.place, f"{example.color:.3f}", _code(", ".join(files)), _code(begins)]


def _code(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"


# HTML --------------------------------------------------------------------------------------------


def html(title: str, sections: Sequence[Section]) -> str:
    """The sections as one HTML file with everything in it."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    links = " ".join(f'<a href="#{_anchor(s)}">{escape(s.title)}</a>' for s in sections)
    body = "\n".join(line for section in sections for line in _section(section))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<nav>{links}</nav>
{body}
</body>
</html>
"""


def _section(section: Section) -> Iterator[str]:
    yield f'<section id="{_anchor(section)}">'
    yield f"<h2>{escape(section.title)}</h2>"
    for paragraph in section.text.split("\n\n"):
        yield f"<p>{escape(paragraph)}</p>"
    if section.picture:
        yield _drawn(section.picture)
    if section.table:
        yield _table(section.table)
    if section.examples:
        yield _scale()
    place = None
    for example in section.examples:
        if example.place != place:
            place = example.place
            yield f"<h3>{escape(place)}</h3>"
        yield _example(example)
    yield "</section>"


def _anchor(section: Section) -> str:
    return re.sub(r"\W+", "-", section.title.lower())


def _drawn(picture: Picture) -> str:
    light, dark = (
        f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
        for svg in (picture.light, picture.dark)
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(picture.words)}"></picture>'
    )


def _table(table: Table) -> str:
    classes = [
        ' class="figures"' if _is_figures([str(row[i]) for row in table.rows]) else ""
        for i in range(len(table.header))
    ]

    def line(tag: str, cells: Sequence[object]) -> str:
        pairs = zip(classes, cells, strict=True)
        return f"<tr>{''.join(f'<{tag}{c}>{escape(str(cell))}</{tag}>' for c, cell in pairs)}</tr>"

    rows = "\n".join(line("td", row) for row in table.rows)
    return (
        f'<div class="wide"><table>\n<thead>{line("th", table.header)}</thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _is_figures(cells: Sequence[str]) -> bool:
    """Whether cells hold numbers with their signs, bounds and intervals, and nothing else."""
    return any(re.search(r"\d", cell) for cell in cells) and all(
        re.fullmatch(r"[-+<>±%.,\d\s]*", cell) for cell in cells
    )


def _example(example: Example) -> str:
    closing = {
        int(end) - 1
        for end, span in zip(
            np.cumsum([span["n_tokens"] for span in example.spans]), example.spans, strict=True
        )
        if span["closes"]
    }
    tokens = "".join(
        _token(text, float(prior), float(conditional), closes=i in closing)
        for i, (text, prior, conditional) in enumerate(
            zip(example.texts, example.prior, example.conditional, strict=True)
        )
    )
    places = "; ".join(_place(span) for span in example.spans)
    return (
        f"<article>\n<p><b>{example.color:+.3f}</b> = conditional "
        f"{np.nanmean(example.conditional):.3f} - prior {np.nanmean(example.prior):.3f} "
        f'<small>{places}</small></p>\n<div class="tokens">{tokens}</div>\n</article>'
    )


def _place(span: Mapping[str, Any]) -> str:
    line = "" if span["source_line"] is None else f" line {span['source_line']}"
    file = escape(f"{Path(span['source_file']).name}{line}, document {span['doc_id']}")
    where = f"characters {span['char_start']:,} to {span['char_end']:,}"
    return f'<span title="{escape(span["source_file"])}">{file}, {where}</span>'


def _token(text: str, prior: float, conditional: float, closes: bool) -> str:
    """A token in its colour, with its numbers on hover; within the tags stands its text alone."""
    difference = conditional - prior
    if np.isnan(difference):
        kind, told = "", "not a label"
    else:
        kind = _colour(round(float(np.clip(difference / STEP, -STEPS, STEPS))))
        told = f"{difference:+.2f} = {conditional:.2f} - {prior:.2f}"
    classes = " ".join(filter(None, [kind, "closes" if closes else ""]))
    attribute = f' class="{classes}"' if classes else ""
    return f'<i{attribute} title="{told}">{_visible(text)}</i>'


def _colour(level: int) -> str:
    return f"{'lower' if level < 0 else 'higher'}{abs(level)}" if level else ""


def _visible(text: str) -> str:
    """Text escaped; line ends and tabs are marked by the style, other controls are pictures."""
    return "".join(MARKED.get(c, c) for c in escape(text.translate(CONTROLS)))


def _scale() -> str:
    shown = "".join(
        f'<i class="{_colour(level)}"> {f"{level * STEP:+g}" if level else "0"} </i>'
        for level in range(-STEPS, STEPS + 1, 2)
    )
    return f'<p class="scale"><span class="tokens">{shown}</span> nats, conditional - prior</p>'


def _style() -> str:
    levels = "\n".join(
        f".{_colour(sign * level)} {{ background: rgb({rgb} / {0.8 * level / STEPS:.2f}); }}"
        for sign, rgb in ((-1, "37 99 235"), (1, "234 88 12"))
        for level in range(1, STEPS + 1)
    )
    return f"""
:root {{ --paper: {LIGHT.paper}; --ink: {LIGHT.ink}; --quiet: #57606a; --rule: #d0d7de; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: {DARK.paper}; --ink: {DARK.ink}; --quiet: #9aa4b2; --rule: #3a404a; }}
}}
body {{ background: var(--paper); color: var(--ink); max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }}
h1, h2, h3 {{ line-height: 1.25; }}
h2 {{ margin-top: 3rem; border-bottom: 1px solid var(--rule); padding-bottom: 0.3rem; }}
h3 {{ margin-top: 2rem; }}
a {{ color: inherit; }}
nav {{ display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; }}
small {{ color: var(--quiet); }}
img {{ max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 0.3rem 0.5rem; border-bottom: 1px solid var(--rule); }}
th {{ border-bottom-width: 2px; }}
.figures {{ text-align: right; white-space: nowrap; }}
article {{ margin: 1rem 0 1.5rem; }}
article p {{ margin: 0 0 0.3rem; font-variant-numeric: tabular-nums; }}
.tokens {{ font: 0.875rem/1.7 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }}
div.tokens {{ border-left: 3px solid var(--rule); padding-left: 0.8rem; }}
.tokens i {{ font-style: normal; border-radius: 2px; box-shadow: inset 0 -1px var(--rule);
  margin-right: 1px; }}
.tokens i:empty {{ padding: 0 0.25em; }}
.tokens b {{ font-weight: normal; }}
.newline::before {{ content: "\\21b5"; color: var(--quiet); }}
.return::before {{ content: "\\240d"; color: var(--quiet); }}
.tab::before {{ content: "\\2192"; color: var(--quiet); }}
.closes::after {{ content: "end of document\\a"; color: var(--quiet); font: 0.75rem system-ui;
  white-space: pre; }}
{levels}
@media print {{
  body {{ max-width: none; margin: 0; }}
  nav {{ display: none; }}
  article, tr, picture {{ break-inside: avoid; }}
  h2, h3 {{ break-after: avoid; }}
}}
"""


STYLE = _style()
