"""What stages of the lineage took, from the records of the loss kernel's runs."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from colorfilter import cost
from colorfilter.cost import Measured
from colorfilter.recipe import Domain, Recipe
from resources.artifacts import ArtifactStore
from resources.home import Home

NOT_CURRENT = "no longer current"
NEAR_CUTOFFS = "refined_scores"


def cost_rows(artifacts: ArtifactStore, recipe: Recipe, domain: Domain) -> list[dict[str, Any]]:
    """Every stage of a domain predicted from the sizes of its data, and what it took."""
    shards = [s.name for s in artifacts.at.shards()]
    corpus = sum(artifacts.current("corpus_tokens", s).facts["tokens"] for s in shards)
    packed = artifacts.current(f"{domain.name}/domain_tokens").facts
    text = packed["down_tokens"] + packed["held_out_tokens"]
    sizes = cost.sizes_of(recipe, corpus, round(text / (1 - domain.probe)))
    took = took_by_stage(artifacts.at, kernel_runs(artifacts.at))
    rows = []
    for stage in cost.predict(recipe, sizes):
        measured = took.get(stage.asset)
        if stage.asset.startswith(f"{domain.name}/") or "/" not in stage.asset:
            rows.append(
                {
                    "stage": stage.asset,
                    "tokens": round(stage.tokens or 0),
                    "forwards (B)": (stage.forwards or 0) / 1e9,
                    "tokens measured": measured.tokens if measured else "-",
                    "seconds": round(measured.seconds) if measured else "-",
                }
            )
    return rows


def kernel_runs(home: Home) -> list[dict[str, Any]]:
    """Runs of the kernel, oldest first. A line cut off by a crash is passed over."""
    records = []
    if home.kernel_runs.exists():
        for line in home.kernel_runs.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records


def took_by_stage(home: Home, records: Iterable[dict[str, Any]]) -> dict[str, Measured]:
    """What stages took, by asset; the ledger says which asset a record belongs to."""
    entries = ArtifactStore(home=str(home.root)).entries()
    by_key = {e["key"][:16]: asset for (asset, _), e in entries.items()}
    models = {e["fingerprint"]: a for (a, _), e in entries.items() if a.endswith("_model")}
    shards = {partition for asset, partition in entries if asset == "corpus_tokens"}
    stages: dict[str, Measured] = {}
    for record in records:
        # A checkpoint that is no artefact of its own goes by the folder it lies in.
        within = [by_key[part] for part in Path(record["model"]).parts if part in by_key]
        if within:
            asset = within[0]
        elif record["model"] not in models:
            asset = NOT_CURRENT
        elif record["shard"] in shards:
            asset = models[record["model"]].replace("_model", "_scores")
        else:
            asset = NEAR_CUTOFFS
        so_far = stages.get(asset, Measured(0, 0.0))
        stages[asset] = Measured(
            so_far.tokens + record["tokens"], so_far.seconds + record["seconds"]
        )
    return stages
