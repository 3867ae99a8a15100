"""Stage 4 for DSIR: documents are drawn, then packed in the order in which they were."""

from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.common import OWNERS, Context, Progress, all_of, code_version, result, total
from assets.selected import GROUP, PACKED
from assets.tombstones import forgotten, forgotten_texts
from colorfilter import dsir
from colorfilter import selection as method
from colorfilter.corpus import pack_shard
from colorfilter.documents import read_documents
from colorfilter.errors import InputError
from colorfilter.recipe import Arm, Domain, Recipe
from resources.artifacts import ArtifactStore, Work
from resources.score_store import ScoreStore


def dsir_selection(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    """`<domain>/dsir/selection`: sequences of its own, packed of the documents that are drawn."""
    name = f"{domain.name}/{arm.name}"
    shard = f"_dsir_{domain.name}"

    @dg.asset(
        description=f"{arm.name} for {domain.name}: documents drawn by the importance of their "
        "n-grams, by the package data-selection, and packed in that order; lower is better. Its "
        f"sequences are its own (`{PACKED}/`), not the corpus's.",
        key_prefix=[domain.name, arm.name],
        deps=[
            "score_tables",
            "sample_plan",
            "tokenizer",
            dg.AssetKey([domain.name, "domain_text"]),
            all_of("raw_corpus"),
            all_of("corpus_tokens"),
        ],
        group_name=GROUP,
        kinds={"numpy"},
        tags={"arm": arm.name},
        owners=OWNERS,
        code_version=code_version(1, arm.name, recipe.target.training_tokens, recipe.seed),
    )
    def selection(
        context: Context, artifacts: ArtifactStore, score_store: ScoreStore
    ) -> dg.MaterializeResult:
        encoder = artifacts.current("tokenizer")
        text = artifacts.current(f"{domain.name}/domain_text")
        plan = [] if recipe.prior.score_sample else [artifacts.current("sample_plan")]
        corpus = [artifacts.current("raw_corpus", s.name) for s in artifacts.at.shards()]
        raw = {str(a.partition): a.path / "documents.parquet" for a in corpus}
        packed = [artifacts.current("corpus_tokens", s) for s in raw]
        tables = artifacts.current_from("score_tables", None, [*corpus, *packed])
        (needed,) = recipe.endpoints(arm, 0)

        def build(folder: Path) -> dict[str, Any]:
            left_out = {
                row["sha256"]
                for sample in plan
                for row in read_documents(sample.path / "documents.parquet", ["sha256"])
            } | forgotten_texts(artifacts)
            down = text.path / "down" / "documents.parquet"
            progress = Progress(context, 2 * total(corpus, "chars"), "characters")
            ranked = dsir.rank_documents(raw, down, left_out, recipe.seed, progress)
            if ranked.is_empty():
                raise InputError(
                    f"{name}: dsir considers documents of 100 words and more, and the corpus has "
                    "none; leave the arm out"
                )
            with score_store.read() as connection:
                sizes = method.document_tokens(connection)
            ranked = ranked.join(sizes, on=["shard", "doc_id"], maintain_order="left")
            before = pl.col("n_tokens").cum_sum() - pl.col("n_tokens")
            wanted = recipe.with_spare(arm)
            drawn = ranked.filter(before < wanted * recipe.sequence_length)
            own = folder / PACKED
            own.mkdir(exist_ok=True)
            dsir.write_in_order(drawn, raw, own / "documents.parquet")
            counts = pack_shard(own, own, encoder.path, [], recipe.sequence_length)
            if counts["tokens"] < needed * recipe.sequence_length:
                raise InputError(
                    f"target.training_tokens: dsir considers documents of 100 words and more, "
                    f"{counts['tokens']} tokens in all; lower training_tokens or add to the corpus"
                )
            # A sequence goes by the first document in it: the scores rise with the ranks.
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
                    shard=pl.lit(shard),
                    color=pl.lit(None, dtype=pl.Float64),
                )
            )
            method.write_selection(chosen, folder)
            return {
                "considered": len(ranked),
                "documents": len(drawn),
                "selected": len(chosen),
                "cutoff": chosen["score"].max(),
            }

        made = artifacts.make(
            Work(
                f"{name}/selection",
                inputs=[encoder, text, *plan, *corpus, *packed, *forgotten(artifacts)],
                sources=[tables],
                recipe={"needed": needed, "sequence_length": recipe.sequence_length},
                seed=recipe.seed,
            ),
            build,
        )
        return result([made], made.facts)

    return selection
