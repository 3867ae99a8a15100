"""The job `select`: a single selection at any tau, compared with the last one, and its dataset."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field, ValidationError

from assets.common import AnyContext, data_version, identity
from assets.filtered.change_checks import in_and_out, last_published
from assets.filtered.filtered_dataset import make_dataset
from assets.filtered.leakage import find_leakage, leaks_in
from assets.filtered.selection import choose, near_cutoff, select_by_query
from assets.scores.refined_scores import refine
from assets.scores.scores import overlays, refined_of
from colorfilter.config.load import first_problem
from colorfilter.config.recipe import SCORED, Arm, Domain, Recipe
from colorfilter.errors import InputError
from colorfilter.stages import ArtifactName, Stage
from resources.artifacts import Artifact, ArtifactStore
from resources.gpu import Gpu
from resources.score_store import ScoreStore

if TYPE_CHECKING:
    import duckdb
    import polars as pl


SELECT_OP = "select_once"


class Choice(dg.Config):
    """Configuration of the job `select`."""

    domain: str
    method: str = Field("color", description="color or conditional_only")
    tau: float = Field(description="keep the best 1/tau")
    batch: int | None = Field(
        None, description="keep the best `batch` of every tau * batch random sequences"
    )
    tokens: int | None = Field(
        None,
        description="fail if fewer tokens are selected (default: the recipe's training_tokens)",
    )
    refine: bool = Field(
        False,
        description="score sequences near the cutoff again in float32, which loads models",
    )
    dry_run: bool = Field(
        False, description="only report what would change; write no dataset (`refine` still scores)"
    )


def with_choice(recipe: Recipe, choice: Choice) -> tuple[Recipe, Domain, Arm]:
    """Return the recipe with the choice as its only arm, the domain and the arm.

    Raises InputError for an invalid choice.
    """
    domain = next((d for d in recipe.domains if d.name == choice.domain), None)
    if domain is None:
        names = ", ".join(d.name for d in recipe.domains)
        raise InputError(f"domain: the recipe has no domain '{choice.domain}'; give one of {names}")
    if choice.method not in SCORED:
        raise InputError(
            f"method: '{choice.method}' does not select by scores alone; give "
            f"{' or '.join(SCORED)}, or add an arm to the recipe"
        )
    arm = {"method": choice.method, "tau": choice.tau, "batch": choice.batch}
    target = recipe.target.model_dump()
    if choice.tokens is not None:
        target["training_tokens"] = choice.tokens
    try:
        narrowed = Recipe.model_validate({**recipe.model_dump(), "arms": [arm], "target": target})
    except ValidationError as error:
        raise InputError(first_problem(error)) from error
    return narrowed, domain, narrowed.arms[0]


def what_would_change(
    connection: "duckdb.DuckDBPyConnection",
    recipe: Recipe,
    domain: Domain,
    arm: Arm,
    refined: list[Artifact],
) -> dict[str, Any]:
    """Return figures of a selection, also compared with the last one by its method.

    Writes nothing.
    """
    chosen = choose(connection, recipe, domain, arm)
    return {
        "arm": arm.name,
        "selected": len(chosen),
        "tokens": len(chosen) * recipe.sequence_length,
        "cutoff": chosen["score"][-1],
        **near_cutoff(connection, recipe, domain.name, arm, refined),
        **_against_the_last(connection, domain, arm, chosen),
    }


def _against_the_last(
    connection: "duckdb.DuckDBPyConnection", domain: Domain, arm: Arm, chosen: "pl.DataFrame"
) -> dict[str, Any]:
    last = last_published(connection, domain, arm)
    if last is None:
        return {"last": "none"}
    return {"last": f"{last.arm} of {last.created}", **in_and_out(connection, chosen, last)}


def select(
    context: AnyContext,
    artifacts: ArtifactStore,
    score_store: ScoreStore,
    gpu: Gpu,
    recipe: Recipe,
    choice: Choice,
) -> tuple[dict[str, Any], list[Artifact]]:
    """Select by a choice; return what changes and the artifacts: selection, leakage, dataset.

    A dry run builds nothing and returns no artifacts, unless `refine` is set, which builds
    `refined_scores`. Raises InputError if the written dataset quotes held-out text.
    """
    narrowed, domain, arm = with_choice(recipe, choice)
    tables = artifacts.current("score_tables")
    if choice.refine and recipe.scoring.precision != "float32":
        others = [other for other in recipe.arms if other.name != arm.name]
        with_arm = recipe.model_copy(update={"arms": [*others, arm]})
        refine(context, artifacts, gpu, score_store, with_arm, domain)
    refined = refined_of(artifacts, domain.name, tables.fingerprint)
    with score_store.read(overlays(refined)) as connection:
        changes = what_would_change(connection, narrowed, domain, arm, refined)
    context.log.info(", ".join(f"{name} {value}" for name, value in changes.items()))
    if choice.dry_run:
        return changes, []
    made = [
        select_by_query(artifacts, score_store, narrowed, domain, arm),
        find_leakage(context, artifacts, narrowed, domain, arm),
        make_dataset(artifacts, score_store, narrowed, domain, arm),
    ]
    leaks, words = leaks_in(artifacts, domain, arm)
    if leaks:
        raise InputError(f"{made[-1].name}: {words}")
    return {**changes, "dataset": str(made[-1].path)}, made


def select_job(recipe: Recipe) -> dg.JobDefinition:
    """Return the job `select`, configured by a Choice."""

    @dg.op(
        name=SELECT_OP,
        pool="scores",
        description="Select by the existing scores, compare with the last selection, and write "
        "the dataset.",
    )
    def select_op(
        context: dg.OpExecutionContext,
        config: Choice,
        artifacts: ArtifactStore,
        score_store: ScoreStore,
        gpu: Gpu,
    ) -> dict[str, Any]:
        changes, made = select(context, artifacts, score_store, gpu, recipe, config)
        for artifact in made:
            context.log_event(_materialization(artifact, changes))
        context.add_output_metadata(_shown(changes))
        return changes

    tau = next((arm.tau for arm in recipe.arms if arm.tau), 16.0)
    example = {"domain": recipe.domains[0].name, "tau": tau, "dry_run": True}

    @dg.job(
        name="select",
        config={"ops": {SELECT_OP: {"config": example}}},
        description="Makes one selection at any tau, without a change to the recipe: reports which "
        "sequences enter and leave compared with the last selection, then writes the dataset next "
        "to the existing ones. Cost: seconds, as no model is loaded unless `refine` is set. "
        "Unchanged: scores, models, the recipe's arms.",
        executor_def=dg.in_process_executor,
    )
    def job() -> None:
        select_op()

    return job


def _materialization(artifact: Artifact, changes: Mapping[str, Any]) -> dg.AssetMaterialization:
    selected = ArtifactName.parse(artifact.asset).stage is Stage.SELECTION
    about = changes if selected else artifact.facts
    return dg.AssetMaterialization(
        asset_key=artifact.asset.split("/"),
        metadata={**_shown(about), **identity(artifact)},
        tags={"dagster/data_version": data_version([artifact]).value},
    )


def _shown(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}
