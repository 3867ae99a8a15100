"""The measured cost of each stage, from the records of kernel runs."""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from colorfilter import cost
from colorfilter.compute.local_pool import Workers
from colorfilter.config.recipe import Domain, Recipe
from colorfilter.cost import Measured, Text
from colorfilter.stages import ArtifactName, ShardKind, Stage
from resources.artifacts import ArtifactStore
from resources.home import Home

NOT_CURRENT = "no longer current"


def cost_rows(artifacts: ArtifactStore, recipe: Recipe, domain: Domain) -> list[dict[str, Any]]:
    """Return a row per stage of a domain: cost predicted from data sizes, and measured cost."""
    shards = [s.name for s in artifacts.at.shards()]
    corpus = sum(artifacts.current("corpus_tokens", s).facts["tokens"] for s in shards)
    packed = artifacts.current(f"{domain.name}/domain_tokens").facts
    probe = artifacts.current("corpus_tokens", ShardKind.PROBE.named(domain.name)).facts["tokens"]
    text = Text(packed["down_tokens"], packed["held_out_tokens"], probe)
    sample = artifacts.current("prior_model").facts.get("tokens", 0)  # a given prior has none
    with Workers(1) as one:  # a worker, as importing torch into this process takes seconds
        ((_, sizes),) = one.run(cost.sizes_of, [(recipe, corpus)])
    sizes = replace(sizes, sample=sample, domains={domain.name: text})
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
    """Return the records of kernel runs, oldest first. A line cut off by a crash is skipped."""
    records = []
    if home.kernel_runs.exists():
        for line in home.kernel_runs.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records


def took_by_stage(home: Home, records: Iterable[dict[str, Any]]) -> dict[str, Measured]:
    """Return measured tokens and seconds by asset; a record's folder identifies its artifact."""
    entries = ArtifactStore(home=str(home.root)).entries()
    assets = {e["path"]: asset for (asset, _), e in entries.items()}
    stages: dict[str, Measured] = {}
    for record in records:
        folder = PurePath(record.get("folder") or "")
        known = [str(path) for path in (folder, *folder.parents) if str(path) in assets]
        asset = assets[known[0]] if known else NOT_CURRENT
        name = ArtifactName.parse(asset) if known else None
        if name and name.stage is Stage.EVALUATION:
            asset = f"{name.domain}/*/{name.stage}"
        so_far = stages.get(asset, Measured(0, 0.0))
        stages[asset] = Measured(
            so_far.tokens + record["tokens"], so_far.seconds + record["seconds"]
        )
    return stages
