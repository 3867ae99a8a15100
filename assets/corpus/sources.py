"""What the sources hold, planned into shards: at first, and again as data arrives."""

from typing import NamedTuple

import dagster as dg

from assets.declaration import Declaration, Read
from colorfilter.config.recipe import Recipe
from colorfilter.data.shards import Shard, list_files, plan_shards, with_vanished
from colorfilter.errors import InputError
from colorfilter.stages import ShardKind
from colorfilter.storage.files import lock
from resources.artifacts import ArtifactStore, Work


def raw_corpus_declaration(recipe: Recipe) -> Declaration:
    """Declare `raw_corpus`; a domain's reserved shard is read from its text."""
    return Declaration(
        "raw_corpus",
        "corpus",
        {"parquet"},
        inputs=[Read(f"{domain.name}/domain_text") for domain in recipe.domains],
        settings=recipe.corpus.facts(),
        sharded=True,
    )


def reading(recipe: Recipe, shard: Shard) -> Work:
    """What is to be done to read a shard.

    Raises InputError for a shard of a source that the recipe no longer has.
    """
    name = shard.files[0].source
    source = next((s for s in recipe.corpus.sources if s.name == name), None)
    if source is None:
        raise InputError(
            f"shard {shard.name}: is of the source '{name}', which the recipe no longer has; "
            "`colorfilter run` retires it, and so does the sensor `arrivals`"
        )
    read = source.model_dump(include={"name", "format", "text_field"})
    files = [[f.path, f.size, f.version] for f in shard.files]
    return raw_corpus_declaration(recipe).work([], shard.name, settings={**read, "files": files})


class Arrivals(NamedTuple):
    """What planning found: all shards, the reserved ones last, and what has changed."""

    shards: list[str]
    new: list[str]
    retired: list[str]
    vanished: list[str]  # files whose text is kept
    lost: list[str]  # files whose text leaves the corpus
    waiting: bool  # something has changed, and is planned when the run at work has ended


def arrive(artifacts: ArtifactStore, recipe: Recipe, *, keep_vanished: bool = True) -> Arrivals:
    """Plan shards for what the sources hold now.

    New and changed files become new shards. A file that has vanished stays in the corpus if it was
    read, as long as its shard need not be read again and `keep_vanished`. While a run is at work
    the plan stays as it is: every step of a run has to find the same shards.
    """
    home = artifacts.at
    with lock(home.leases / "shards"):
        standing = home.shards()
        read = [s for s in standing if ("raw_corpus", s.name) in artifacts.entries()]
        listed = list_files(recipe.corpus.sources)
        files = listed
        if keep_vanished:
            files = with_vanished(listed, recipe.corpus.sources, read)
        planned = plan_shards(files, recipe.corpus.shard_bytes, standing)
        waiting = planned != standing and home.is_at_work()
        if waiting:
            planned, files = standing, [f for s in standing for f in s.files]
        elif planned != standing:
            home.write_shards(planned)
    before, after = {s.name for s in standing}, {s.name for s in planned}
    return Arrivals(
        shards=[s.name for s in planned] + [ShardKind.PROBE.named(d.name) for d in recipe.domains],
        new=sorted(after - before),
        retired=sorted(before - after),
        vanished=[f.name for f in files if f.vanished],
        lost=sorted({f.name for s in standing for f in s.files} - {f.name for f in files}),
        waiting=waiting,
    )


def arrival_checks() -> list[dg.AssetChecksDefinition]:
    """What is worth knowing about the sources."""

    @dg.asset_check(asset="raw_corpus")
    def sources_present(artifacts: ArtifactStore) -> dg.AssetCheckResult:
        """The files that the corpus was read from are still where they were."""
        files = [file for shard in artifacts.at.shards() for file in shard.files]
        gone = [f.name for f in files if f.vanished]
        return dg.AssetCheckResult(
            passed=not gone,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"{len(gone)} files have vanished, their text is kept, the first "
            f"{gone[0]}; `colorfilter prune --vanished` takes it out"
            if gone
            else "every file is there",
            metadata={"vanished": len(gone), "files": gone[:20]},
        )

    return [sources_present]
