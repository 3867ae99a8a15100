"""Stage 1: domains, their text split into D_down, held-out and probe, and its tokens."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import dagster as dg

from assets.common import Context, Progress, result
from assets.corpus.corpus import GROUP
from assets.declaration import Declaration, Read, asset
from colorfilter.config.recipe import Domain, Recipe
from colorfilter.data import documents, sampling, shards, tasks, tokens
from colorfilter.data.corpus import pack_shard
from colorfilter.errors import InputError
from resources.artifacts import Artifact, ArtifactStore
from resources.exclusions import unwanted_texts


def domain_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """Return the assets `domain_text` and `domain_tokens` of every domain."""
    makers = (domain_text_asset, domain_tokens_asset)
    return [make(recipe, domain) for domain in recipe.domains for make in makers]


def domain_text_asset(recipe: Recipe, domain: Domain) -> dg.AssetsDefinition:
    """Return the asset `<domain>/domain_text`."""
    splits = {"held_out": domain.held_out, "probe": domain.probe}
    if domain.test_items is not None:
        splits["test_items"] = domain.test_items
    declared = Declaration(
        f"{domain.name}/domain_text",
        GROUP,
        {"parquet"},
        settings={
            "sources": [source.facts() for source in domain.sources],
            "tasks": [task.facts() for task in domain.tasks],
            **splits,
        },
        seed=recipe.seed,
    )

    @asset(declared)
    def domain_text(context: Context, artifacts: ArtifactStore) -> dg.MaterializeResult:
        """The domain's documents, split once into D_down (for training), held-out text (for
        evaluation) and the probe (scored with the corpus).

        For a domain of tasks, a document is the question and correct answer of an item, and
        `tasks/` holds the test items.
        """
        if domain.tasks:
            reads, build = _split_tasks(context, domain, recipe.seed)
        else:
            unwanted = unwanted_texts(artifacts)
            reads, build = _split_text(context, domain, recipe.seed, unwanted)
        made = artifacts.make(declared.work([], settings={**reads, **splits}), build)
        return result([made], made.facts)

    return domain_text


def domain_tokens_asset(recipe: Recipe, domain: Domain) -> dg.AssetsDefinition:
    """Return the asset `<domain>/domain_tokens`."""
    declared = Declaration(
        f"{domain.name}/domain_tokens",
        GROUP,
        {"numpy"},
        inputs=[Read(f"{domain.name}/domain_text"), Read("tokenizer")],
        settings={"sequence_length": recipe.sequence_length},
    )

    @asset(declared)
    def domain_tokens(artifacts: ArtifactStore) -> dg.MaterializeResult:
        """Packed sequences of D_down and of held-out text. For a domain of tasks, each sequence
        is one item.

        The probe is not here: it is packed as a reserved shard of `corpus_tokens`.
        """
        text = declared.current(artifacts, f"{domain.name}/domain_text")
        encoder = declared.current(artifacts, "tokenizer")
        made = artifacts.make(
            declared.work([text, encoder]),
            lambda folder: pack_splits(folder, domain, text, encoder, recipe.sequence_length),
        )
        return result([made], made.facts)

    return domain_tokens


def pack_splits(
    folder: Path, domain: Domain, text: Artifact, encoder: Artifact, sequence_length: int
) -> dict[str, int]:
    """Pack D_down and held-out text into sequences; return facts for the manifest.

    Raises InputError if a split has less than one sequence.
    """
    facts: dict[str, int] = {}
    for split in ("down", "held_out"):
        if domain.tasks:
            rows = documents.read_documents(text.path / split / "documents.parquet")
            own = tokens.Encoder(encoder.path)
            counts = tokens.pack_examples(rows, own, sequence_length, folder / split)
            facts |= {f"{split}_{fact}": counts[fact] for fact in ("cut", "label_bytes")}
        else:
            counts = pack_shard(
                folder / split, text.path / split, encoder.path, [], sequence_length
            )
        if counts["tokens"] < sequence_length:
            raise InputError(
                f"domain {domain.name}: the {split} split has {counts['tokens']} tokens, "
                f"fewer than one sequence of {sequence_length}; add documents"
            )
        facts |= {f"{split}_{unit}": counts[unit] for unit in ("tokens", "sequences")}
    return facts


Split = tuple[dict[str, Any], Callable[[Path], dict[str, int]]]


def _split_text(context: Context, domain: Domain, seed: int, unwanted: Mapping[str, str]) -> Split:
    """Return what the split of a text domain reads, as facts, and a function that builds it.

    Texts whose sha256 is in `unwanted` are rejected.
    """
    files = shards.list_files(domain.sources)

    def build(folder: Path) -> dict[str, int]:
        progress = Progress(context, sum(f.size for f in files), "bytes")
        counts = documents.write_documents(files, domain.sources, folder, progress, unwanted)
        whole = folder / "documents.parquet"
        try:
            parts = sampling.split_domain(whole, seed, domain.held_out, domain.probe, folder)
        except InputError as error:
            raise InputError(f"domain {domain.name}: {error}") from error
        whole.unlink()
        return {**counts, **parts}

    sources = [s.model_dump(include={"name", "format", "text_field"}) for s in domain.sources]
    return {
        "sources": sources,
        "files": [[f.source, f.path, f.size, f.version] for f in files],
    }, build


def _split_tasks(context: Context, domain: Domain, seed: int) -> Split:
    """Return what the split of a domain of tasks reads, as facts, and a function to build it."""
    tasks.refuse_without_harness()
    train, test = _task_files(domain, "train"), _task_files(domain, "test")

    def build(folder: Path) -> dict[str, int]:
        there = {f for of_task in (*train.values(), *test.values()) for f in of_task}
        progress = Progress(context, sum(f.size for f in there), "bytes")
        shares = domain.held_out, domain.probe, domain.test_items
        try:
            return tasks.split_tasks(train, test, seed, *shares, folder, progress)
        except InputError as error:
            raise InputError(f"domain {domain.name}: {error}") from error

    return {
        part: [[f.source, f.path, f.size, f.version] for of_task in files.values() for f in of_task]
        for part, files in (("train", train), ("test", test))
    }, build


def _task_files(
    domain: Domain, part: Literal["train", "test"]
) -> dict[str, list[shards.InputFile]]:
    """Return the train or test files of every task that has them, by task."""
    sources = [source for task in domain.tasks if (source := task.source(part))]
    return {source.name: shards.list_files([source]) for source in sources}
