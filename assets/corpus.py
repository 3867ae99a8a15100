"""Stage 1: raw text to packed tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
from pydantic import Field

from assets.arrivals import reading
from assets.common import (
    ONE_RUN,
    OWNERS,
    SHARDS,
    Context,
    Progress,
    all_of,
    code_version,
    make_in_processes,
    probe_shard,
    result,
    same_shard,
    sharded_result,
    total,
)
from assets.tombstones import forgotten_texts
from colorfilter import documents, sampling, tokens
from colorfilter.corpus import pack_shard, read_shard
from colorfilter.errors import InputError
from colorfilter.files import checkpoint_content
from colorfilter.parquet import TableWriter
from colorfilter.recipe import Recipe
from resources.artifacts import Artifact, ArtifactStore, Work

GROUP = "corpus"


class Sampling(dg.Config):
    """How D_prior is chosen."""

    draw_anew: bool = Field(False, description="draw from the corpus as it is now")


def corpus_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """`raw_corpus`, `sample_plan`, `tokenizer`, `corpus_tokens`."""
    texts = [dg.AssetKey([d.name, "domain_text"]) for d in recipe.domains]
    sources = {s.name: s for s in recipe.corpus.sources}

    @dg.asset(
        partitions_def=SHARDS,
        backfill_policy=ONE_RUN,
        deps=texts,
        group_name=GROUP,
        kinds={"parquet"},
        owners=OWNERS,
        code_version=code_version(1, recipe.corpus),
    )
    def raw_corpus(context: Context, artifacts: ArtifactStore) -> dg.MaterializeResult:
        """Documents of every shard, with their place, sha256 and other fields.

        Exact duplicates within a shard and what could not be read stand in `rejects.parquet` with
        the reason. A domain's reserved shard holds its probe documents.
        """
        planned = {s.name: s for s in artifacts.at.shards()}
        works, made = [], []
        for name in context.partition_keys:
            if name in planned:
                works.append(reading(recipe, planned[name]))
            else:
                domain = next((d for d in recipe.domains if probe_shard(d.name) == name), None)
                if domain is None:
                    raise InputError(
                        f"no shard named '{name}' is planned; shards come from the recipe's sources"
                    )
                text = artifacts.current(f"{domain.name}/domain_text")
                made.append(_probe_documents(artifacts, name, text))
        size = sum(f.size for w in works for f in planned[str(w.partition)].files)
        progress = Progress(context, size, "bytes")
        gone = forgotten_texts(artifacts)
        made += make_in_processes(
            artifacts,
            works,
            read_shard,
            lambda w: (planned[str(w.partition)].files, list(sources.values()), gone),
            progress,
            lambda name: sum(f.size for f in planned[name].files),
        )
        _refuse_empty_sources(recipe, artifacts, made)
        for reason, count in _reject_reasons(made):
            context.log.warning(f"{count:,} rejected: {reason}")
        facts = ("documents", "chars", "duplicates", "rejects")
        return sharded_result(context, artifacts, made, facts, "documents")

    @dg.asset(
        deps=[all_of("raw_corpus")],
        group_name=GROUP,
        kinds={"parquet"},
        owners=OWNERS,
        code_version=code_version(1, recipe.prior.sample_chars, recipe.seed),
    )
    def sample_plan(config: Sampling, artifacts: ArtifactStore) -> dg.MaterializeResult:
        """D_prior: a random sample of the corpus, drawn once and frozen.

        It stays as shards arrive, so that a new shard costs its own scoring and nothing else. Only
        where the configuration asks for it (the job `retrain` does) it is drawn anew.
        """
        raw = [artifacts.current("raw_corpus", s.name) for s in artifacts.at.shards()]
        last = artifacts.entries().get(("sample_plan", None))
        draw = last["recipe"].get("draw", 0) if last else 0
        if last and config.draw_anew:
            draw += 1
        work = Work(
            "sample_plan",
            recipe={
                "sample_chars": recipe.prior.sample_chars,
                **({"draw": draw} if draw else {}),
            },
            seed=recipe.seed,
            sources=raw,
        )
        plan = artifacts.make(
            work,
            lambda folder: sampling.draw_sample(
                {str(a.partition): a.path for a in raw},
                recipe.seed,
                recipe.prior.sample_chars,
                folder,
            ),
        )
        return result([plan], plan.facts)

    @dg.asset(
        deps=[sample_plan],
        group_name=GROUP,
        kinds={"huggingface"},
        owners=OWNERS,
        code_version=code_version(1, recipe.tokenizer),
    )
    def tokenizer(artifacts: ArtifactStore) -> dg.MaterializeResult:
        """The tokenizer: trained on D_prior, or the one the recipe names."""
        plan = artifacts.current("sample_plan")

        def build(folder: Path) -> dict[str, Any]:
            if recipe.tokenizer.path:
                tokens.copy_tokenizer(recipe.tokenizer.path, folder)
            else:
                assert recipe.tokenizer.vocab_size is not None
                rows = documents.read_documents(plan.path / "documents.parquet", ["text"])
                texts = (row["text"] for row in rows)
                tokens.train_tokenizer(texts, recipe.tokenizer.vocab_size, folder)
            encoder = tokens.Encoder(folder)
            return {"vocab_size": encoder.vocab_size, "end_of_text": encoder.end_of_text}

        given = recipe.tokenizer.path
        content = {"content": checkpoint_content(given)} if given else {}
        work = Work(
            "tokenizer",
            inputs=[] if given else [plan],
            recipe={**recipe.tokenizer.facts(), **content},
        )
        made = artifacts.make(work, build)
        return result([made], made.facts)

    @dg.asset(
        partitions_def=SHARDS,
        backfill_policy=ONE_RUN,
        deps=[same_shard("raw_corpus"), sample_plan, tokenizer],
        group_name=GROUP,
        kinds={"numpy"},
        owners=OWNERS,
        code_version=code_version(1, recipe.sequence_length, int(recipe.prior.score_sample)),
    )
    def corpus_tokens(context: Context, artifacts: ArtifactStore) -> dg.MaterializeResult:
        """Sequences of T tokens per shard, memory-mapped, with spans back to documents.

        The documents of D_prior are left out, unless the recipe has them scored too.
        """
        plan = artifacts.current("sample_plan")
        encoder = artifacts.current("tokenizer")
        raw = {name: artifacts.current("raw_corpus", name) for name in context.partition_keys}
        left_out = [] if recipe.prior.score_sample else [plan]
        works = [
            Work(
                "corpus_tokens",
                name,
                inputs=[raw[name], encoder, *([] if name.startswith("_") else left_out)],
                recipe={"sequence_length": recipe.sequence_length},
            )
            for name in raw
        ]
        progress = Progress(context, total(list(raw.values()), "chars"), "characters")
        made = make_in_processes(
            artifacts,
            works,
            pack_shard,
            lambda w: (
                raw[str(w.partition)].path,
                encoder.path,
                [a.path for a in left_out if a in w.inputs],
                recipe.sequence_length,
            ),
            progress,
            lambda name: raw[name].facts["chars"],
        )
        facts = ("documents", "left_out", "tokens", "sequences")
        return sharded_result(context, artifacts, made, facts, "sequences")

    return [raw_corpus, sample_plan, tokenizer, corpus_tokens]


def corpus_checks(recipe: Recipe) -> list[dg.AssetChecksDefinition]:
    """What must hold of the corpus before anything is trained on it."""

    @dg.asset_check(asset="raw_corpus", blocking=True)
    def no_shared_documents(artifacts: ArtifactStore) -> dg.AssetCheckResult:
        """Corpus, D_down, held-out and probe share no document, by sha256.

        As far as they have been read, for the web UI can materialize one shard before all else;
        what is not read yet is a warning.
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
        whole = (len(read), len(domains)) == (len(planned), len(recipe.domains))
        description = "no document stands in two places"
        if len(read) < len(planned):
            description += f"; {len(planned) - len(read)} of {len(planned)} shards not read yet"
        if len(domains) < len(recipe.domains):
            description += f"; text of {len(recipe.domains) - len(domains)} domains not read yet"
        if shared:
            first = shared[0]
            description = (
                f"{len(shared)} documents stand both in {first['text']} and elsewhere, the first "
                f"at {first['source_file']} line {first['source_line']}; take them out of one"
            )
        return dg.AssetCheckResult(
            passed=not shared and whole,
            severity=dg.AssetCheckSeverity.ERROR if shared else dg.AssetCheckSeverity.WARN,
            metadata={"shared": len(shared), "shards not read": len(planned) - len(read)},
            description=description,
        )

    return [no_shared_documents]


def _probe_documents(artifacts: ArtifactStore, name: str, text: Artifact) -> Artifact:
    def build(folder: Path) -> dict[str, int]:
        counts = {"documents": 0, "chars": 0, "bytes": 0, "duplicates": 0, "rejects": 0}
        with TableWriter(folder / "documents.parquet", documents.DOCUMENTS) as writer:
            path = text.path / "probe" / "documents.parquet"
            for row in documents.read_documents(path, documents.DOCUMENTS.names):
                writer.add(row, len(row["text"]))
                counts["documents"] += 1
                counts["chars"] += row["n_chars"]
                counts["bytes"] += len(row["text"].encode("utf-8"))
        return counts

    return artifacts.make(Work("raw_corpus", name, inputs=[text]), build)


def _refuse_empty_sources(
    recipe: Recipe, artifacts: ArtifactStore, made: Sequence[Artifact]
) -> None:
    """Raise InputError for a source all of whose shards are here and hold no document."""
    documents_of = {str(a.partition): a.facts["documents"] for a in made}
    for source in recipe.corpus.sources:
        shards = [s for s in artifacts.at.shards() if s.files[0].source == source.name]
        if all(documents_of.get(s.name) == 0 for s in shards):
            raise InputError(
                f"source {source.name}: {source.files} holds no usable document; look at the "
                f"rejects in {artifacts.at.artifacts / 'raw_corpus'} or correct `text_field`"
            )


def _reject_reasons(made: Sequence[Artifact]) -> list[tuple[str, int]]:
    """Reasons for rejects with their counts, most frequent first, of what was made just now."""
    files = [a.path / "rejects.parquet" for a in made if not a.reused]
    there = [f for f in files if f.exists()]
    if not there:
        return []
    counts = pl.scan_parquet(there).group_by("reason").len().sort("len", descending=True)
    return counts.collect().rows()
