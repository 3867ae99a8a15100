"""What `colorfilter explain` says: the facts of assets.explained, shown or as one JSON object."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from assets.datasets import InDataset, Records
from assets.explained import DocumentFacts, Explanation, SequenceFacts, explain
from assets.scores import all_refined, overlays
from assets.standing import Checkpoint, Score, Stand
from assets.versions import Change, DatasetExplanation, DatasetVersion, Difference, Example
from colorfilter.score_tables import EXCLUDED
from resources.artifacts import ArtifactStore
from resources.home import Home
from resources.lineage import Lineage
from resources.score_store import ScoreStore

ROWS = 20  # sequences of a document, or differing inputs, that are shown
SHORT = 8  # digits of a fingerprint that are shown


def look_up(place: Home, what: str) -> Explanation | DatasetExplanation:
    """What a home has on record of a document, a sequence or a dataset. Raises InputError."""
    artifacts = ArtifactStore(home=str(place.root))
    with ScoreStore(home=str(place.root)).read(overlays(all_refined(artifacts))) as connection:
        return explain(Records(artifacts, Lineage(artifacts), connection), what)


def as_json(found: Explanation | DatasetExplanation) -> str:
    """All the facts as one JSON object."""
    return json.dumps(asdict(found), indent=1, ensure_ascii=False)


def show(console: Console, found: Explanation | DatasetExplanation) -> None:
    """Print the facts for a person to read."""
    if isinstance(found, DatasetExplanation):
        _show_dataset(console, found)
    elif found.sequence:
        _show_sequence(console, found.sequence, found.models)
    elif found.document:
        _show_document(console, found.document, found.models)


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _show_document(console: Console, document: DocumentFacts, models: Sequence[Checkpoint]) -> None:
    at = f", shard {document.shard}" if document.shard else ""
    tokens = f", {document.n_tokens:,} tokens" if document.n_tokens else ""
    chars = f"{document.n_chars:,} characters" if document.n_chars is not None else ""
    _say(
        console,
        f"document {document.doc_id or '(none)'}{at}: {document.became}",
        f"  read from   {document.source_file}:{document.source_line} (source {document.source})",
        f"  file        sha256 {document.file_sha256 or 'not on record'}",
    )
    if document.sha256:
        _say(console, f"  text        sha256 {document.sha256}, {chars}{tokens}")
    if document.text is not None:
        _say(console, f"              {_quoted(document.text)}")
    for copy in document.copies:
        _say(
            console,
            f"  same text   {copy['doc_id']} in {copy['shard']}, {copy['source_file']}:"
            f"{copy['source_line']}",
        )
    if len(document.sequences) == 1:
        _say(console, "")
        _show_sequence(console, document.sequences[0], models)
    elif document.sequences:
        _show_sequences(console, document, models)


def _show_sequences(
    console: Console, document: DocumentFacts, models: Sequence[Checkpoint]
) -> None:
    """A line per sequence of a document, and in brief what became of them all."""
    first = document.sequences[0].standing
    domains = list(dict.fromkeys(s.domain for of in document.sequences for s in of.standing.scores))
    current = [s for s in first.selections if s.current]
    several = len({s.domain for s in current}) > 1
    arms = [f"{s.domain}/{s.arm}" if several else s.arm for s in current]
    losses = [
        f"{d} {c}" if several else c for d in domains for c in ("prior", "cond.", "color", "rank")
    ]
    table = _table("position", "tokens", *losses, *arms)
    for sequence in document.sequences[:ROWS]:
        mine = sum(s.n_tokens for s in sequence.spans if s.doc_id == document.doc_id)
        by_domain = {s.domain: s for s in sequence.standing.scores}
        cells = [cell for d in domains for cell in _score_cells(by_domain.get(d))]
        stands = [_stand_cell(s) for s in sequence.standing.selections if s.current]
        table.add_row(str(sequence.position), f"{mine} of {sequence.n_tokens}", *cells, *stands)
    console.print(table)
    if len(document.sequences) > ROWS:
        _say(console, f"and {len(document.sequences) - ROWS} more (--json has all)")
    _show_models(console, models)
    for i, stand in enumerate(first.selections):
        stands_ = [s.standing.selections[i] for s in document.sequences]
        kept = sum(s.decision == "selected" for s in stands_)
        made = [d for s in stands_ for d in s.datasets[-1:]]
        rows = sum(d.row is not None for d in made)
        left = sum(d.left_out is not None for d in made)
        words = f"{_of(stand)}: {kept} of {len(stands_)} sequences selected"
        if kept:
            words += f", {rows} in the dataset" + (f", {left} left out" if left else "")
        trained = [
            (t.seed, n, reached)
            for d in made
            for t in d.trained
            for n, reached in t.reached.items()
        ]
        for seed, tokens in dict.fromkeys((seed, n) for seed, n, _ in trained):
            n = sum(reached for *end, reached in trained if end == [seed, tokens])
            words += f"; seed {seed} trained on {n} by {tokens:,} tokens"
        _say(console, words)
    _say(console, f"`colorfilter explain {document.shard}:POSITION` says more of a sequence.")


def _score_cells(score: Score | None) -> list[str]:
    if score is None:
        return ["-"] * 4
    color = f"{score.color:+.4f}"
    return [f"{score.loss_prior:.4f}", f"{score.loss_conditional:.4f}", color, f"{score.rank:,}"]


def _stand_cell(stand: Stand) -> str:
    by = f" {stand.margin:+.4f}" if stand.margin is not None else ""
    leaks = any(d.left_out for d in stand.datasets)
    return f"{stand.decision}{by}" + (", left out" if leaks else "")


def _show_sequence(console: Console, sequence: SequenceFacts, models: Sequence[Checkpoint]) -> None:
    stand = sequence.standing
    _say(
        console,
        f"sequence {sequence.shard}:{sequence.position}, {sequence.n_tokens} tokens, "
        f"sha256 {sequence.sha256}",
    )
    for span in sequence.spans:
        _say(
            console,
            f"  document {span.doc_id}, {span.n_tokens} tokens, sha256 {span.sha256}",
            f"    {span.source_file}:{span.source_line} (source {span.source}), file sha256 "
            f"{span.file_sha256 or 'not on record'}",
            f"    characters {span.char_start:,} to {span.char_end:,}: {_quoted(span.text)}",
        )
    if stand.excluded:
        _say(console, f"never selected: {EXCLUDED[stand.excluded]}")
    candidate = not stand.excluded and not sequence.shard.startswith("_")
    for score in stand.scores:
        _say(
            console,
            f"{score.domain}: prior loss {score.loss_prior:.4f} ({score.precision_prior}), "
            f"conditional loss {score.loss_conditional:.4f} ({score.precision_conditional}) nats "
            f"per token, color {score.color:+.4f}",
            f"  rank by color {score.rank:,} of {score.candidates:,} candidates, "
            f"{score.percentile:.2f} %{'' if candidate else ', if it were one'}",
        )
    if not stand.scores:
        _say(console, "not scored: it has no label")
    _show_models(console, models)
    table = _table("arm", "decision", "score", "cutoff", "difference", "rank", "selected on")
    several = len({s.domain for s in stand.selections}) > 1
    for s in stand.selections:
        table.add_row(
            f"{s.domain}/{s.arm}" if several else s.arm,
            s.decision,
            _number(s.score),
            _number(s.cutoff),
            _number(s.margin, "+"),
            f"{s.rank:,} of {s.selected:,}" if s.rank else "-",
            s.created + ("" if s.current else ", an older version"),
        )
    console.print(table)
    reasons = {s.why: s for s in stand.selections if s.why}
    for why in reasons:
        arms = [_of(s) for s in stand.selections if s.why == why]
        _say(console, f"{', '.join(arms)}: {why}")
    for s in stand.selections:
        for dataset in s.datasets:
            _show_membership(console, s, dataset)


def _show_membership(console: Console, stand: Stand, dataset: InDataset) -> None:
    named = f"dataset {stand.domain}/{stand.arm} of {dataset.recorded}"
    if not dataset.stands:
        _say(console, f"{named}: its folder is gone; {dataset.path}")
    elif dataset.row is None:
        _say(console, f"{named}: left out, {dataset.left_out}")
    else:
        _say(console, f"{named}: row {dataset.row:,}; {dataset.path}")
        if not dataset.trained:
            _say(console, "  no target model has trained on it")
    for model in dataset.trained:
        ends = [
            f"{'trained on' if reached else 'not reached'} by {tokens:,} tokens"
            for tokens, reached in model.reached.items()
        ]
        _say(
            console,
            f"  target model seed {model.seed} ({model.fingerprint[:SHORT]}): number "
            f"{model.place:,} of {model.of:,} in its order; {', '.join(ends)}",
        )


def _show_models(console: Console, models: Sequence[Checkpoint]) -> None:
    for model in models:
        facts = model.trained_on
        counts = [
            f"{facts[unit]:,} {unit}"
            for unit in ("documents", "sequences", "tokens")
            if facts.get(unit) is not None
        ]
        sources = [
            f"{name.replace('_', ' ')} {facts[name][:SHORT]}"
            for name in ("sample_plan", "domain_tokens", "started_from")
            if facts.get(name)
        ]
        given = [str(facts["path"])] if facts.get("path") else []
        role = model.role if model.domain is None else f"{model.domain}/{model.role}"
        _say(
            console,
            f"  {role} {model.fingerprint[:SHORT]}, trained on "
            + ", ".join([facts["what"], *given, *counts, *sources]),
            f"    {model.path}",
        )


def _show_dataset(console: Console, found: DatasetExplanation) -> None:
    now, last = found.now, found.last
    versions = len(found.versions)
    known = f"{versions} versions" if versions > 1 else "one version"
    _say(console, f"dataset {now.name}, {known} in the ledger")
    _show_version(console, "now ", now)
    if last is None:
        _say(console, "It is the first, of this arm and of its method.")
        return
    if last.name != now.name:
        _say(console, f"It is the first of its arm; the last by its method is {last.name}:")
    _show_version(console, "last", last)
    _show_differences(console, "recipe", found.recipe)
    _show_differences(console, "made from", found.inputs)
    _say(console, f"{found.both:,} sequences are in both.")
    for way, changes, examples in (
        ("enter", found.entering, found.examples_entering),
        ("leave", found.leaving, found.examples_leaving),
    ):
        _say(console, f"{sum(c.sequences for c in changes):,} sequences {way}")
        _show_changes(console, changes)
        _show_examples(console, examples)


def _show_version(console: Console, title: str, version: DatasetVersion) -> None:
    selected = version.selected if version.selected is not None else version.sequences
    of = f" of {version.candidates:,} candidates" if version.candidates else ""
    cutoff = f", cutoff {version.cutoff:.4f}" if version.cutoff is not None else ""
    models = [f"{name} {made[:SHORT]}" for name, made in version.models.items()]
    recipe = [f"{name} {value}" for name, value in version.recipe.items() if _is_plain(value)]
    _say(
        console,
        f"{title} {version.recorded}: {version.sequences:,} sequences, {version.tokens:,} tokens; "
        f"{selected:,} selected{of} in {version.shards} shards{cutoff}; {version.left_out:,} left "
        "out for quoting held-out text",
        f"     scored by {', '.join(models) or 'no model on record'}",
        f"     recipe: {', '.join(recipe)}",
        f"     {version.path}{'' if version.stands else ' (gone)'}",
    )


def _is_plain(value: Any) -> bool:
    return value is not None and not isinstance(value, dict | list)


def _show_differences(console: Console, what: str, found: Sequence[Difference]) -> None:
    """The first differences, a line each; fingerprints are cut short."""
    if not found:
        _say(console, f"{what}: the same")
    for difference in found[:ROWS]:
        was, now = (
            value[:SHORT] if what != "recipe" and value else value
            for value in (difference.was, difference.now)
        )
        words = f"{was} -> {now}"
        if difference.was is None:
            words = f"new, {now}"
        elif difference.now is None:
            words = f"gone, was {was}"
        _say(console, f"{what}: {difference.name} {words}")
    if len(found) > ROWS:
        _say(console, f"{what}: and {len(found) - ROWS} more (--json has all)")


def _show_changes(console: Console, changes: Sequence[Change]) -> None:
    for change in changes:
        _say(console, f"  {change.sequences:>9,}  {change.why}")


def _show_examples(console: Console, examples: Sequence[Example]) -> None:
    for example in examples:
        _say(
            console,
            f"    {example.shard}:{example.position}  score {example.score:+.4f}  "
            f"{example.source_file or 'no longer in the tables'}  ({example.why})",
        )


def _of(stand: Stand) -> str:
    older = "" if stand.current else f" of {stand.created}"
    return f"{stand.domain}/{stand.arm}{older}"


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def _quoted(text: str | None) -> str:
    return "its text is gone" if text is None else json.dumps(text, ensure_ascii=False)
