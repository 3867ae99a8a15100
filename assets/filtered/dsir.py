"""Stage 4 for DSIR: draw documents by importance and pack them in the order drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.common import Context, Progress, result, total
from assets.corpus.corpus import plan_read
from assets.declaration import Declaration, Read, Shards, asset
from assets.filtered.selection import GROUP, PACKED
from colorfilter.config.recipe import Arm, Domain, Recipe
from colorfilter.data.corpus import pack_shard
from colorfilter.data.documents import read_documents
from colorfilter.errors import InputError
from colorfilter.selection import dsir, select
from colorfilter.stages import ShardKind
from resources.artifacts import Artifact, ArtifactStore
from resources.score_store import ScoreStore


def dsir_declaration(recipe: Recipe, domain: Domain, arm: Arm) -> Declaration:
    """Declare `<domain>/dsir/selection`."""
    (needed,) = recipe.endpoints(arm, 0)
    return Declaration(
        f"{domain.name}/{arm.name}/selection",
        GROUP,
        {"numpy"},
        inputs=[
            Read("tokenizer"),
            Read(f"{domain.name}/domain_text"),
            *plan_read(recipe),
            Read("raw_corpus", Shards.ALL),
            Read("corpus_tokens", Shards.ALL),
        ],
        consults=[Read("score_tables")],
        settings={"needed": needed, "sequence_length": recipe.sequence_length},
        seed=recipe.seed,
        description=f"{arm.name} for {domain.name}: documents drawn by the importance weights of "
        "their n-grams, with the package data-selection, and packed in the order drawn. A lower "
        f"score is better. The selection contains its own sequences (`{PACKED}/`) instead of "
        "those of the corpus.",
        arm=arm.name,
    )


def dsir_selection(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    """Return the asset `<domain>/dsir/selection`, with sequences packed from drawn documents."""
    declared = dsir_declaration(recipe, domain, arm)

    @asset(declared)
    def selection(
        context: Context, artifacts: ArtifactStore, score_store: ScoreStore
    ) -> dg.MaterializeResult:
        encoder = declared.current(artifacts, "tokenizer")
        text = declared.current(artifacts, f"{domain.name}/domain_text")
        plan = [declared.current(artifacts, read.asset) for read in plan_read(recipe)]
        shards = [s.name for s in artifacts.at.shards()]
        corpus = [declared.current(artifacts, "raw_corpus", s) for s in shards]
        packed = [declared.current(artifacts, "corpus_tokens", s) for s in shards]
        tables = declared.current(artifacts, "score_tables", made_from=[*corpus, *packed])

        def build(folder: Path) -> dict[str, Any]:
            left_out = {
                row["sha256"]
                for sample in plan
                for row in read_documents(sample.path / "documents.parquet", ["sha256"])
            }
            progress = Progress(context, 2 * total(corpus, "chars"), "characters")
            raw = {str(a.partition): a.path / "documents.parquet" for a in corpus}
            down = text.path / "down" / "documents.parquet"
            ranked = dsir.rank_documents(raw, down, left_out, recipe.seed, progress)
            if ranked.is_empty():
                raise InputError(
                    f"{domain.name}/{arm.name}: dsir considers only documents of at least 100 "
                    "words, and the corpus has none; remove the arm from the recipe"
                )
            with score_store.read() as connection:
                sizes = select.document_tokens(connection)
            ranked = ranked.join(sizes, on=["shard", "doc_id"], maintain_order="left")
            return pack_drawn(folder, recipe, domain, arm, ranked, raw, encoder)

        inputs = [encoder, text, *plan, *corpus, *packed, *declared.exclusions(artifacts)]
        made = artifacts.make(declared.work(inputs, sources=[tables]), build)
        return result([made], made.facts)

    return selection


def pack_drawn(
    folder: Path,
    recipe: Recipe,
    domain: Domain,
    arm: Arm,
    ranked: pl.DataFrame,
    raw: Mapping[str, Path],
    encoder: Artifact,
) -> dict[str, Any]:
    """Pack as many ranked documents as an arm needs, in order; return facts for the manifest.

    `ranked` includes each document's `n_tokens`; `raw` maps shards to documents.parquet. Raises
    InputError if all documents together have too few tokens.
    """
    (needed,) = recipe.endpoints(arm, 0)
    before = pl.col("n_tokens").cum_sum() - pl.col("n_tokens")
    wanted = recipe.with_spare(arm)
    drawn = ranked.filter(before < wanted * recipe.sequence_length)
    own = folder / PACKED
    own.mkdir(exist_ok=True)
    dsir.write_in_order(drawn, raw, own / "documents.parquet")
    counts = pack_shard(own, own, encoder.path, [], recipe.sequence_length)
    if counts["tokens"] < needed * recipe.sequence_length:
        raise InputError(
            "target.training_tokens: dsir considers only documents of at least 100 words, which "
            f"have {counts['tokens']} tokens in total; lower training_tokens or add to the corpus"
        )
    # A sequence has the score of the first document in it, so that scores rise with ranks.
    spans = pl.read_parquet(own / "spans.parquet").join(drawn, on="doc_id")
    chosen = (
        spans.group_by("position")
        .agg(pl.col("score").min())
        .sort("position")
        .head(min(wanted, counts["tokens"] // recipe.sequence_length))
        .select(
            pl.col("position").alias("rank") + 1,
            "position",
            "score",
            shard=pl.lit(ShardKind.DRAWN.named(domain.name)),
            color=pl.lit(None, dtype=pl.Float64),
        )
    )
    select.write_selection(chosen, folder)
    return {
        "considered": len(ranked),
        "documents": len(drawn),
        "selected": len(chosen),
        "cutoff": chosen["score"].max(),
    }
