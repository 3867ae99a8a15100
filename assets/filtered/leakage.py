"""Stage 4: find selected text that quotes held-out text, before the dataset is written."""

from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.common import AnyContext, Context, Progress, result
from assets.declaration import Declaration, Read, asset
from assets.filtered.selection import GROUP, origin_reads, origins
from assets.metadata import table
from colorfilter.config.recipe import Arm, Domain, Recipe
from colorfilter.data.documents import read_documents
from colorfilter.selection import decontamination
from resources.artifacts import Artifact, ArtifactStore


def leakage_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """Return the asset `leakage` of every domain and arm."""
    return [leakage_asset(recipe, domain, arm) for domain in recipe.domains for arm in recipe.arms]


def leakage_checks(recipe: Recipe) -> list[dg.AssetChecksDefinition]:
    """Return the check `leakage_removed` of every domain and arm."""
    return [_leakage_removed(domain, arm) for domain in recipe.domains for arm in recipe.arms]


def held_out(text: Artifact) -> decontamination.Protected:
    """Return the held-out documents of a domain, each identified by file and line."""
    path = text.path / "held_out" / "documents.parquet"
    rows = read_documents(path, ["source_file", "source_line", "text"])
    return decontamination.Protected(
        (f"{r['source_file']}:{r['source_line']}", r["text"]) for r in rows
    )


def leakage_declaration(recipe: Recipe, domain: Domain, arm: Arm) -> Declaration:
    """Declare `<domain>/<arm>/leakage`."""
    name = f"{domain.name}/{arm.name}"
    return Declaration(
        f"{name}/leakage",
        GROUP,
        {"numpy"},
        inputs=[
            Read(f"{name}/selection"),
            Read(f"{domain.name}/domain_text"),
            *origin_reads(arm),
        ],
        consults=[Read("score_tables")] if origin_reads(arm) else [],
        settings={"whole_documents": recipe.filtered.whole_documents_from is not None},
        description=f"{arm.name} for {domain.name}: selected text that has 13 consecutive words "
        "in common with held-out text, longest match first, and the sequences that contain it. "
        "Text in common with D_down is not a leak.",
        arm=arm.name,
    )


def leakage_asset(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    """Return the asset `<domain>/<arm>/leakage`."""

    @asset(leakage_declaration(recipe, domain, arm))
    def leakage(context: Context, artifacts: ArtifactStore) -> dg.MaterializeResult:
        made = find_leakage(context, artifacts, recipe, domain, arm)
        return result([made], {**made.facts, **_longest(made)})

    return leakage


def find_leakage(
    context: AnyContext, artifacts: ArtifactStore, recipe: Recipe, domain: Domain, arm: Arm
) -> Artifact:
    """Build an arm's `leakage`: the matches between its selection and held-out text."""
    declared = leakage_declaration(recipe, domain, arm)
    chosen = declared.current(artifacts, f"{domain.name}/{arm.name}/selection")
    text = declared.current(artifacts, f"{domain.name}/domain_text")
    rows = pl.read_parquet(chosen.path / "selection.parquet")
    shards = sorted(rows["shard"].unique())
    tokens, texts, made_from = origins(artifacts, declared, chosen, shards)
    whole_documents = bool(declared.settings["whole_documents"])

    def build(folder: Path) -> dict[str, Any]:
        progress = Progress(context, len(rows), "sequences")
        protected = held_out(text)
        tables, n_texts = [], 0
        for shard in shards:
            mine = rows.filter(pl.col("shard") == shard)
            found, n_searched = decontamination.find_leaks(
                protected, shard, mine, tokens[shard], texts[shard], whole_documents
            )
            tables.append(found)
            n_texts += n_searched
            progress(len(mine))
        leaks = pl.concat(tables).sort(
            "n_words", "shard", "doc_id", "char_start", descending=[True, False, False, False]
        )
        leaks.write_parquet(folder / "leakage.parquet", compression="zstd")
        sequences = len(rows) - len(decontamination.without_leaks(rows, leaks))
        return {
            "texts": n_texts,
            "matches": len(leaks),
            "sequences": sequences,
            "share": sequences / len(rows),
            "protected": len(protected),
            "too_short_to_protect": protected.too_short,
        }

    return artifacts.make(declared.work([chosen, text, *made_from]), build)


def _longest(made: Artifact) -> dict[str, dg.TableMetadataValue]:
    leaks = pl.read_parquet(made.path / "leakage.parquet").head(10)
    shown = leaks.select(
        words="n_words",
        quote=pl.col("quote").str.slice(0, 200),
        file=pl.col("source_file").str.split("/").list.last(),
        held_out=pl.col("protected").str.split("/").list.last(),
    )
    return {"longest matches": table(shown.to_dicts())} if len(shown) else {}


def _leakage_removed(domain: Domain, arm: Arm) -> dg.AssetChecksDefinition:
    prefix = [domain.name, arm.name]
    kept = arm.leaks == "keep"

    @dg.asset_check(
        asset=dg.AssetKey([*prefix, "filtered_dataset"]), name="leakage_removed", blocking=True
    )
    def leakage_removed(artifacts: ArtifactStore) -> dg.AssetCheckResult:
        """No text of the written dataset has 13 consecutive words in common with held-out text."""
        found, description = leaks_in(artifacts, domain, arm)
        return dg.AssetCheckResult(
            passed=not found,
            severity=dg.AssetCheckSeverity.WARN if kept else dg.AssetCheckSeverity.ERROR,
            description=description,
            metadata={"matches": found},
        )

    return leakage_removed


def leaks_in(artifacts: ArtifactStore, domain: Domain, arm: Arm) -> tuple[int, str]:
    """Search an arm's written dataset for held-out text; return the match count and a summary."""
    dataset = artifacts.current(f"{domain.name}/{arm.name}/filtered_dataset")
    protected = held_out(artifacts.current(f"{domain.name}/domain_text"))
    files = sorted((dataset.path / "documents").glob("*.parquet"))
    rows = (row for file in files for row in read_documents(file, ["doc_id", "text"]))
    found = sorted(decontamination.search(protected, rows), key=lambda f: -f[1].n_words)
    if not found:
        return 0, f"none of {dataset.facts['texts']:,} texts quotes held-out text"
    row, match = found[0]
    return len(found), (
        f"{len(found):,} quotes of held-out text, the longest in document {row['doc_id']}: "
        f"{match.n_words} words of {match.protected}: {match.quote[:200]}"
    )
