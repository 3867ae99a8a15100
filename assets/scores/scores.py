"""Stage 3: losses of every sequence with each scoring model, and the score tables."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg

from assets.auxiliary.models import checkpoint
from assets.common import (
    ONE_RUN,
    SHARDS,
    Context,
    Progress,
    result,
    shard_names,
    sharded_result,
    total,
)
from assets.declaration import Declaration, Read, Shards, asset
from assets.metadata import picture
from colorfilter.config.recipe import Domain, Recipe, Scoring
from colorfilter.errors import InputError
from colorfilter.evaluation.figures import binned_scores
from colorfilter.selection import drift
from colorfilter.selection.sql import fetch_row
from colorfilter.stages import IN_CORPUS, ArtifactName, ShardKind, Stage
from colorfilter.storage import manifest
from resources.artifacts import Artifact, ArtifactStore, Attempt
from resources.gpu import Gpu, ScoreJob
from resources.score_parts import Part, PublishedModel
from resources.score_store import ScoreStore

if TYPE_CHECKING:
    from colorfilter.scoring.chunks import Receipt

GROUP = "scores"
REFINED = "refined.parquet"


def score_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """Return the assets with losses, such as `prior_scores`, and `score_tables`."""
    return [losses_asset(recipe), score_tables_asset(recipe)]


def losses_declaration(recipe: Recipe, losses: "LossAsset") -> Declaration:
    """Declare the asset with the losses of the corpus under one model."""
    return Declaration(
        losses.asset,
        GROUP,
        {"pytorch", "parquet"},
        inputs=[Read("corpus_tokens", Shards.SAME), Read(losses.model)],
        consults=end_of_text_read(recipe.scoring),
        settings={"labels": recipe.scoring.labels},
        precision=recipe.scoring.precision,
        description=f"Loss of every sequence with {losses.model}, in nats per token. Losses with "
        "several models that are materialized together take one pass over the sequences.",
    )


def losses_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """Return all losses of the corpus as one multi-asset.

    Losses that are materialized together are computed in one pass.
    """
    declared = {losses: losses_declaration(recipe, losses) for losses in loss_assets(recipe)}

    @dg.multi_asset(
        specs=[declaration.spec for declaration in declared.values()],
        can_subset=True,
        partitions_def=SHARDS,
        backfill_policy=ONE_RUN,
        pool="gpu",
    )
    def losses(
        context: Context, artifacts: ArtifactStore, gpu: Gpu
    ) -> Iterator[dg.MaterializeResult]:
        wanted = {key.to_user_string() for key in context.selected_asset_keys}
        asked = {of: it for of, it in declared.items() if of.asset in wanted}
        made = score_shards(context, artifacts, gpu, recipe.scoring, asked)
        facts = ("sequences", "unscored", "tokens", "chunks", "tokens_per_second")
        for of in asked:
            mine = [a for a in made if a.asset == of.asset]
            yield sharded_result(context, artifacts, mine, facts, "sequences")

    return losses


def score_tables_declaration(recipe: Recipe) -> Declaration:
    """Declare `score_tables`."""
    scored = loss_assets(recipe)
    return Declaration(
        "score_tables",
        GROUP,
        {"duckdb"},
        inputs=[
            Read("raw_corpus", Shards.ALL),
            Read("corpus_tokens", Shards.ALL),
            *(Read(losses.asset, Shards.ALL) for losses in scored),
            *(Read(losses.model) for losses in scored),
        ],
        pool="scores",
    )


def score_tables_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset `score_tables`."""
    declared = score_tables_declaration(recipe)

    @asset(declared)
    def score_tables(artifacts: ArtifactStore, score_store: ScoreStore) -> dg.MaterializeResult:
        """The losses joined with sequences, spans and documents, published as `scores.duckdb`.

        The Parquet files of the other assets are the record. The database can be rebuilt from
        them at any time.
        """
        parts, models, inputs = publication(artifacts, recipe)
        rows = score_store.publish(parts, models, recipe.sequence_length)
        made = artifacts.make(declared.work(inputs), lambda folder: _record(folder, inputs, rows))
        shown: dict[str, Any] = dict(rows)
        for domain in recipe.domains:
            shown |= _picture(score_store, domain.name)
        shown["dagster/row_count"] = rows["losses"]
        shown["file"] = dg.MetadataValue.path(str(artifacts.at.scores))
        return result([made], shown)

    return score_tables


class LossAsset(NamedTuple):
    """An asset with losses of the corpus, the asset of the model, and its role and domain."""

    asset: str
    model: str
    role: str
    domain: str | None


def loss_assets(recipe: Recipe) -> list[LossAsset]:
    """Return the assets with losses, one for each model that scores the corpus."""
    roles = ["conditional", *(["domain_only"] if recipe.has_domain_only_model else [])]
    return [
        LossAsset("prior_scores", "prior_model", "prior", None),
        *(
            LossAsset(f"{d.name}/{role}_scores", f"{d.name}/{role}_model", role, d.name)
            for d in recipe.domains
            for role in roles
        ),
    ]


def losses_by(recipe: Recipe, domain: Domain, roles: Set[str]) -> list[str]:
    """Return the loss assets of models with the given roles, out of the prior and a domain's."""
    return [
        losses.asset
        for losses in loss_assets(recipe)
        if losses.role in roles and losses.domain in {None, domain.name}
    ]


def end_of_text_read(scoring: Scoring) -> list[Read]:
    """Return the read of the tokenizer, if labels after its end-of-text token are ignored."""
    return [] if scoring.labels == "all" else [Read("tokenizer")]


def eot_id(artifacts: ArtifactStore, scoring: Scoring) -> int | None:
    """Return the end-of-text id; a label after it is ignored. None if all labels count."""
    if scoring.labels == "all":
        return None
    return int(artifacts.current("tokenizer").facts["end_of_text"])


def score_shards(
    context: Context,
    artifacts: ArtifactStore,
    gpu: Gpu,
    scoring: Scoring,
    asked: Mapping["LossAsset", Declaration],
) -> list[Artifact]:
    """Compute the requested losses of the run's shards, in one pass over the sequences.

    Raises InputError if two of the models are the same.
    """
    eot = eot_id(artifacts, scoring)
    packed = {name: artifacts.current("corpus_tokens", name) for name in context.partition_keys}
    models = {of.asset: it.current(artifacts, of.model) for of, it in asked.items()}
    refuse_same_models({of.model: models[of.asset] for of in asked})
    size = len(models) * total(list(packed.values()), "tokens")
    progress = Progress(context, size, "tokens")
    works = [
        it.work([models[of.asset], source], shard, settings={"boundary": eot})
        for shard, source in packed.items()
        for of, it in asked.items()
    ]
    with artifacts.attempts(works) as attempts:
        jobs: list[ScoreJob] = []
        missing: dict[tuple[str, str], Attempt] = {}
        for shard, source in packed.items():
            ours = [a for a in attempts if a.work.partition == shard]
            progress.stands(source.facts["tokens"] * sum(a.standing is not None for a in ours))
            wanted = {models[a.work.asset].fingerprint: a for a in ours if not a.standing}
            if wanted:
                by = {m.fingerprint: m for m in models.values() if m.fingerprint in wanted}
                jobs.append(
                    ScoreJob(
                        models={name: checkpoint(m) for name, m in by.items()},
                        outs={name: a.folder for name, a in wanted.items()},
                        parameters=max(m.facts["parameters"] for m in by.values()),
                        tokens=source.path,
                        shard=shard,
                        precision=scoring.precision,
                        eot_id=eot,
                    )
                )
                missing |= {(shard, name): a for name, a in wanted.items()}
        for job, model, receipts in gpu.score(jobs, progress, progress.stands):
            attempt = missing[job.shard, model]
            attempt.commit(_facts(receipts))
            nodes = Counter(str(r.node) for r in receipts if r.node)
            if nodes:
                context.add_asset_metadata(
                    {"chunks by node": dg.MetadataValue.json(dict(nodes))},
                    asset_key=dg.AssetKey(attempt.work.asset.split("/")),
                    partition_key=job.shard,
                )
        return [a.artifact for a in attempts]


def refuse_same_models(models: Mapping[str, Artifact]) -> None:
    """Raise InputError if two models, given by asset, have the same content."""
    named: dict[str, str] = {}
    for name, model in models.items():
        same = named.setdefault(model.fingerprint, name)
        if same != name:
            raise InputError(
                f"{same} and {name} are the same model, because their domains have the same text "
                "and training settings; remove one of the domains from the recipe"
            )


def _facts(receipts: Sequence["Receipt"]) -> dict[str, int]:
    seconds = sum(r.seconds for r in receipts)
    timed = sum(r.tokens for r in receipts if r.seconds)
    return {
        "chunks": len(receipts),
        "sequences": sum(r.sequences for r in receipts),
        "unscored": sum(r.unscored for r in receipts),
        "tokens": sum(r.tokens for r in receipts),
        "tokens_per_second": round(timed / seconds) if seconds else 0,
    }


def publication(
    artifacts: ArtifactStore, recipe: Recipe
) -> tuple[list[Part], list[PublishedModel], list[Artifact]]:
    """Return the parts and models to publish, and the artifacts that the tables are built from.

    Raises InputError if an artifact does not exist or was not built from the current inputs.
    """
    scored_by = {losses.asset: artifacts.current(losses.model) for losses in loss_assets(recipe)}
    models = [
        PublishedModel(made.fingerprint, losses.role, losses.domain, str(checkpoint(made)))
        for losses, made in zip(loss_assets(recipe), scored_by.values(), strict=True)
    ]
    parts, inputs, scored = [], list(scored_by.values()), []
    for shard in shard_names(artifacts, recipe):
        raw = artifacts.current("raw_corpus", shard)
        packed = artifacts.current_from("corpus_tokens", shard, [raw])
        inputs += [raw, packed]
        parts.append(
            Part(
                shard,
                fingerprint="".join(made.fingerprint[:32] for made in (raw, packed)),
                documents=raw.path,
                tokens=packed.path,
            )
        )
        for name, model in scored_by.items():
            losses = artifacts.current_from(name, shard, [model, packed])
            inputs.append(losses)
            scored.append((model, losses))
    inputs += score_tables_declaration(recipe).exclusions(artifacts)
    parts += [
        Part(str(losses.partition), losses.fingerprint, model=model.fingerprint, losses=losses.path)
        for model, losses in scored
    ]
    return parts, models, inputs


def refined_of(artifacts: ArtifactStore, domain: str, tables: str) -> list[Artifact]:
    """Return a domain's refined losses, if built from the score tables with this fingerprint.

    The list has at most one artifact.
    """
    name = f"{domain}/refined_scores"
    entry = artifacts.entries().get((name, None))
    if entry is None or entry["inputs"]["score_tables"] != tables:
        return []
    return [artifacts.current(name)] if manifest.stands(artifacts.at.root / entry["path"]) else []


def all_refined(artifacts: ArtifactStore) -> list[Artifact]:
    """Return the refined losses of all domains that were built from the current score tables."""
    entries = artifacts.entries()
    tables = entries.get(("score_tables", None))
    names = [ArtifactName.parse(asset) for asset, _ in entries]
    domains = [name.domain for name in names if name.stage is Stage.REFINED_SCORES and name.domain]
    if tables is None:
        return []
    return [made for d in domains for made in refined_of(artifacts, d, tables["fingerprint"])]


def overlays(refined: Sequence[Artifact]) -> dict[str, Path]:
    """Return files of refined losses by domain, for `ScoreStore.read`."""
    return {str(ArtifactName.parse(r.asset).domain): r.path / REFINED for r in refined}


def _record(folder: Path, inputs: Sequence[Artifact], rows: dict[str, int]) -> dict[str, int]:
    content = {a.name: a.fingerprint for a in inputs}
    (folder / "published.json").write_text(json.dumps(content, indent=1))
    return rows


def _picture(score_store: ScoreStore, domain: str) -> dict[str, Any]:
    """Return a histogram of color over the corpus as metadata."""
    with score_store.read() as connection:
        counts, low, high = drift.histogram(connection, "color", domain)
    shown = binned_scores({"corpus": counts[0].tolist()}, low, high)
    return {f"color of the corpus for {domain}": picture(shown)}


def score_checks(recipe: Recipe) -> list[dg.AssetChecksDefinition]:
    """Return the checks of the score tables, which must pass before anything is selected."""

    @dg.asset_check(asset="score_tables", blocking=True)
    def scores_complete(artifacts: ArtifactStore, score_store: ScoreStore) -> dg.AssetCheckResult:
        """Every sequence with at least one label has a finite loss with every current model, and
        a color for every domain.
        """
        assets = [losses.asset for losses in loss_assets(recipe)]
        shards = shard_names(artifacts, recipe)
        unscored = total([artifacts.current(a, s) for a in assets for s in shards], "unscored")
        with score_store.read() as connection:
            wanted, short, scored, not_finite, stored, unpaired = fetch_row(
                connection,
                """
                WITH wanted AS (
                    SELECT m.model, m.role, s.shard, s.position, s.n_tokens
                    FROM models AS m, sequences AS s WHERE m.current
                )
                SELECT
                    count(*), count(*) FILTER (w.n_tokens < 2), count(l.loss),
                    count(*) FILTER (NOT isfinite(l.loss)), (SELECT count(*) FROM losses),
                    count(l.loss) FILTER (w.role = 'conditional') - (SELECT count(*) FROM color)
                FROM wanted AS w LEFT JOIN losses AS l USING (model, shard, position)
                """,
            )
        masked = recipe.scoring.labels == "within_documents"
        explained = unscored >= short if masked else unscored == short
        complete = scored == stored == wanted - unscored and not unpaired
        passed = explained and complete and not not_finite
        return dg.AssetCheckResult(
            passed=passed,
            description=f"{scored:,} of {wanted - unscored:,} losses exist: {not_finite} not "
            f"finite, {unpaired} without a color; also {stored - scored} losses without a "
            f"sequence, and {unscored} sequences without a label",
            metadata={"scored": scored, "unscored": unscored, "not finite": not_finite},
        )

    return [scores_complete, *(_domain_below_corpus(d) for d in recipe.domains)]


def _domain_below_corpus(domain: Domain) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset="score_tables", name=f"{domain.name}_below_corpus", blocking=True)
    def domain_below_corpus(
        artifacts: ArtifactStore, score_store: ScoreStore
    ) -> dg.AssetCheckResult:
        """The mean color of the domain's held-out text, and of its probe, is below the mean color
        of the corpus.
        """
        held_out = artifacts.current(f"{domain.name}/conditional_model").facts["held_out_color"]
        with score_store.read() as connection:
            probe, corpus = fetch_row(
                connection,
                "SELECT avg(color) FILTER (shard = $probe), "
                f"avg(color) FILTER ({IN_CORPUS}) FROM color WHERE domain = $domain",
                {"probe": ShardKind.PROBE.named(domain.name), "domain": domain.name},
            )
        known = probe is not None and corpus is not None
        passed = bool(known and probe < corpus and held_out < corpus)
        shown = {"held-out": held_out, "probe": probe, "corpus": corpus}
        return dg.AssetCheckResult(
            passed=passed,
            description="mean color: "
            + ", ".join(f"{k} {v:.3f}" for k, v in shown.items() if v is not None),
            metadata={k: v for k, v in shown.items() if v is not None},
        )

    return domain_below_corpus
