"""Stage 1: the corpus, from raw text to packed tokens."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import dagster as dg
import polars as pl
from pydantic import Field

from assets.common import (
    Context,
    Progress,
    make_in_processes,
    result,
    sharded_result,
    total,
)
from assets.corpus.sources import raw_corpus_declaration, reading
from assets.declaration import Declaration, Read, Shards, asset
from colorfilter.config.recipe import Recipe
from colorfilter.data import documents, sampling, tokens
from colorfilter.data.corpus import pack_shard, read_shard
from colorfilter.errors import InputError
from colorfilter.stages import ShardKind
from colorfilter.storage.files import checkpoint_content
from colorfilter.storage.parquet import TableWriter
from resources.artifacts import Artifact, ArtifactStore
from resources.exclusions import unwanted_texts

GROUP = "corpus"


class Sampling(dg.Config):
    """Configuration of `sample_plan`."""

    draw_anew: bool = Field(
        False, description="draw a new sample from the current corpus instead of keeping the last"
    )


def corpus_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """Return the assets `raw_corpus`, `sample_plan`, `tokenizer` and `corpus_tokens`."""
    return [
        raw_corpus_asset(recipe),
        sample_plan_asset(recipe),
        tokenizer_asset(recipe),
        corpus_tokens_asset(recipe),
    ]


def raw_corpus_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset `raw_corpus`."""
    declared = raw_corpus_declaration(recipe)

    @asset(declared)
    def raw_corpus(context: Context, artifacts: ArtifactStore) -> dg.MaterializeResult:
        """Documents of every shard, each with its source file and line, sha256 and other fields.

        Exact duplicates within a shard and records that could not be read are in
        `rejects.parquet` with the reason. Each domain has a reserved shard with its probe
        documents.
        """
        made = read_shards(context, artifacts, recipe)
        _refuse_empty_sources(recipe, artifacts, made)
        for reason, count in _reject_reasons(made):
            context.log.warning(f"{count:,} records rejected: {reason}")
        facts = ("documents", "chars", "duplicates", "rejects")
        return sharded_result(context, artifacts, made, facts, "documents")

    return raw_corpus


def read_shards(context: Context, artifacts: ArtifactStore, recipe: Recipe) -> list[Artifact]:
    """Read the run's shards of `raw_corpus`.

    Raises InputError for a shard that is not planned and for input that a reader refuses.
    """
    declared = raw_corpus_declaration(recipe)
    planned = {s.name: s for s in artifacts.at.shards()}
    reserved = {ShardKind.PROBE.named(d.name): f"{d.name}/domain_text" for d in recipe.domains}
    works, made = [], []
    for name in context.partition_keys:
        if name in planned:
            works.append(reading(recipe, planned[name]))
        elif name in reserved:
            text = declared.current(artifacts, reserved[name])
            made.append(
                artifacts.make(
                    declared.work([text], name, settings={}),
                    partial(_probe_documents, text),
                )
            )
        else:
            raise InputError(
                f"shard {name}: is not planned; shards are planned from the recipe's sources"
            )
    size = sum(f.size for w in works for f in planned[str(w.partition)].files)
    sources = {s.name: s for s in recipe.corpus.sources}
    unwanted = unwanted_texts(artifacts)
    made += make_in_processes(
        artifacts,
        works,
        read_shard,
        lambda w: (planned[str(w.partition)].files, list(sources.values()), unwanted),
        Progress(context, size, "bytes"),
        lambda name: sum(f.size for f in planned[name].files),
    )
    return made


def sample_plan_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset `sample_plan`."""
    declared = Declaration(
        "sample_plan",
        GROUP,
        {"parquet"},
        consults=[Read("raw_corpus", Shards.ALL)],
        settings={"sample_chars": recipe.prior.sample_chars},
        seed=recipe.seed,
    )

    @asset(declared)
    def sample_plan(config: Sampling, artifacts: ArtifactStore) -> dg.MaterializeResult:
        """D_prior: a random sample of the corpus, drawn once and then kept.

        It does not change when shards arrive, so a new shard costs only its own scoring. A new
        sample is drawn only if the configuration sets `draw_anew`, as the job `retrain` does.
        """
        raw = [declared.current(artifacts, "raw_corpus", s.name) for s in artifacts.at.shards()]
        last = artifacts.entries().get(("sample_plan", None))
        draw = last["recipe"].get("draw", 0) if last else 0
        if last and config.draw_anew:
            draw += 1
        settings = {**declared.settings, **({"draw": draw} if draw else {})}
        plan = artifacts.make(
            declared.work([], settings=settings, sources=raw),
            lambda folder: sampling.draw_sample(
                {str(a.partition): a.path for a in raw},
                recipe.seed,
                recipe.prior.sample_chars,
                folder,
            ),
        )
        return result([plan], plan.facts)

    return sample_plan


def tokenizer_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset `tokenizer`."""
    given = recipe.tokenizer.path
    declared = Declaration(
        "tokenizer",
        GROUP,
        {"huggingface"},
        inputs=[] if given else [Read("sample_plan")],
        settings=recipe.tokenizer.facts(),
    )

    @asset(declared)
    def tokenizer(artifacts: ArtifactStore) -> dg.MaterializeResult:
        """The tokenizer: trained on D_prior (`sample_plan`), or the one given in the recipe."""
        if given:
            content = {**declared.settings, "content": checkpoint_content(given)}
            work = declared.work([], settings=content)
            made = artifacts.make(work, lambda folder: copy_tokenizer(folder, given))
        else:
            plan = declared.current(artifacts, "sample_plan")
            size = recipe.tokenizer.vocab_size
            assert size is not None
            work = declared.work([plan])
            made = artifacts.make(work, lambda folder: train_tokenizer(folder, plan, size))
        return result([made], made.facts)

    return tokenizer


def train_tokenizer(folder: Path, plan: Artifact, vocab_size: int) -> dict[str, int | None]:
    """Train a tokenizer on D_prior; return facts for the manifest."""
    rows = documents.read_documents(plan.path / "documents.parquet", ["text"])
    tokens.train_tokenizer((row["text"] for row in rows), vocab_size, folder)
    return _encoder_facts(folder)


def copy_tokenizer(folder: Path, path: str) -> dict[str, int | None]:
    """Copy the tokenizer that the recipe gives; return facts for the manifest."""
    tokens.copy_tokenizer(path, folder)
    return _encoder_facts(folder)


def _encoder_facts(folder: Path) -> dict[str, int | None]:
    encoder = tokens.Encoder(folder)
    return {"vocab_size": encoder.vocab_size, "end_of_text": encoder.end_of_text}


def plan_read(recipe: Recipe) -> list[Read]:
    """Return the read of D_prior; empty if the recipe scores its documents too."""
    return [] if recipe.prior.score_sample else [Read("sample_plan")]


def corpus_tokens_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset `corpus_tokens`."""
    left_out = plan_read(recipe)
    declared = Declaration(
        "corpus_tokens",
        GROUP,
        {"numpy"},
        inputs=[Read("raw_corpus", Shards.SAME), Read("tokenizer"), *left_out],
        settings={"sequence_length": recipe.sequence_length},
        sharded=True,
    )

    @asset(declared)
    def corpus_tokens(context: Context, artifacts: ArtifactStore) -> dg.MaterializeResult:
        """Sequences of T tokens per shard, in a memory-mapped array, with spans that map them to
        documents.

        The documents of D_prior (`sample_plan`) are excluded, unless the recipe sets
        `prior.score_sample`.
        """
        plans = [declared.current(artifacts, read.asset) for read in left_out]
        encoder = declared.current(artifacts, "tokenizer")
        raw = {s: declared.current(artifacts, "raw_corpus", s) for s in context.partition_keys}
        without = {ShardKind.CORPUS: plans}
        works = [
            declared.work([source, encoder, *without.get(ShardKind.of(name), [])], name)
            for name, source in raw.items()
        ]
        made = make_in_processes(
            artifacts,
            works,
            pack_shard,
            lambda w: (
                raw[str(w.partition)].path,
                encoder.path,
                [a.path for a in plans if a in w.inputs],
                recipe.sequence_length,
            ),
            Progress(context, total(list(raw.values()), "chars"), "characters"),
            lambda name: raw[name].facts["chars"],
        )
        facts = ("documents", "left_out", "tokens", "sequences")
        return sharded_result(context, artifacts, made, facts, "sequences")

    return corpus_tokens


def corpus_checks(recipe: Recipe) -> list[dg.AssetChecksDefinition]:
    """Return the check `no_shared_documents`, which must pass before anything is trained."""

    @dg.asset_check(asset="raw_corpus", blocking=True)
    def no_shared_documents(artifacts: ArtifactStore) -> dg.AssetCheckResult:
        """No document, by sha256, is in more than one of corpus, D_down, held-out text and probe.

        Compares what has been read so far. Shards and domains that are not read yet give a
        warning, because the web UI can materialize a single shard first.
        """
        entries = artifacts.entries()
        planned = [s.name for s in artifacts.at.shards()]
        read = [name for name in planned if ("raw_corpus", name) in entries]
        corpus = {
            name: artifacts.current("raw_corpus", name).path / "documents.parquet" for name in read
        }
        texts = {}
        domains = [d for d in recipe.domains if (f"{d.name}/domain_text", None) in entries]
        for domain in domains:
            text = artifacts.current(f"{domain.name}/domain_text")
            for split in sampling.SPLITS:
                texts[f"{domain.name}/{split}"] = text.path / split / "documents.parquet"
        shared = sampling.shared_documents(corpus, texts)
        for name, path in texts.items():
            others = {n: p for n, p in texts.items() if n != name}
            shared += sampling.shared_documents({name: path}, others)
        all_read = (len(read), len(domains)) == (len(planned), len(recipe.domains))
        description = "no document is in more than one place"
        if len(read) < len(planned):
            description += f"; {len(planned) - len(read)} of {len(planned)} shards are not read yet"
        if len(domains) < len(recipe.domains):
            description += (
                f"; the text of {len(recipe.domains) - len(domains)} domains is not read yet"
            )
        if shared:
            first = shared[0]
            description = (
                f"{len(shared)} documents are in more than one place, the first in "
                f"{first['text']} and at {first['source_file']} line {first['source_line']}; "
                "remove each from all places but one"
            )
        return dg.AssetCheckResult(
            passed=not shared and all_read,
            severity=dg.AssetCheckSeverity.ERROR if shared else dg.AssetCheckSeverity.WARN,
            metadata={"shared": len(shared), "shards not read": len(planned) - len(read)},
            description=description,
        )

    return [no_shared_documents]


def _probe_documents(text: Artifact, folder: Path) -> dict[str, int]:
    """Write a domain's probe documents as a shard; return facts for the manifest."""
    counts = {"documents": 0, "chars": 0, "bytes": 0, "duplicates": 0, "rejects": 0}
    with TableWriter(folder / "documents.parquet", documents.DOCUMENTS) as writer:
        path = text.path / "probe" / "documents.parquet"
        for row in documents.read_documents(path, documents.DOCUMENTS.names):
            writer.add(row, len(row["text"]))
            counts["documents"] += 1
            counts["chars"] += row["n_chars"]
            counts["bytes"] += len(row["text"].encode("utf-8"))
    return counts


def _refuse_empty_sources(
    recipe: Recipe, artifacts: ArtifactStore, made: Sequence[Artifact]
) -> None:
    """Raise InputError for a source if all its shards are in `made` and none has a document."""
    documents_of = {str(a.partition): a.facts["documents"] for a in made}
    for source in recipe.corpus.sources:
        shards = [s for s in artifacts.at.shards() if s.files[0].source == source.name]
        if all(documents_of.get(s.name) == 0 for s in shards):
            raise InputError(
                f"source {source.name}: {source.files} holds no usable document; see the "
                f"rejects in {artifacts.at.artifacts / 'raw_corpus'} or correct `text_field`"
            )


def _reject_reasons(made: Sequence[Artifact]) -> list[tuple[str, int]]:
    """Return the reasons for rejects in newly built shards with counts, most frequent first."""
    files = [a.path / "rejects.parquet" for a in made if not a.reused]
    there = [f for f in files if f.exists()]
    if not there:
        return []
    counts = pl.scan_parquet(there).group_by("reason").len().sort("len", descending=True)
    return counts.collect().rows()
