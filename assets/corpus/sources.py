"""Plan shards for the files of the sources, initially and whenever data arrives."""

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
    """Declare `raw_corpus`; a domain's reserved shard is read from its `domain_text`."""
    return Declaration(
        "raw_corpus",
        "corpus",
        {"parquet"},
        inputs=[Read(f"{domain.name}/domain_text") for domain in recipe.domains],
        settings=recipe.corpus.facts(),
        sharded=True,
    )


def reading(recipe: Recipe, shard: Shard) -> Work:
    """Return the work that reads a shard.

    Raises InputError for a shard of a source that the recipe no longer has.
    """
    name = shard.files[0].source
    source = next((s for s in recipe.corpus.sources if s.name == name), None)
    if source is None:
        raise InputError(
            f"shard {shard.name}: the recipe no longer has its source '{name}'; use "
            "`colorfilter run` or the sensor `arrivals` to retire the shard"
        )
    read = source.model_dump(include={"name", "format", "text_field"})
    files = [[f.path, f.size, f.version] for f in shard.files]
    return raw_corpus_declaration(recipe).work([], shard.name, settings={**read, "files": files})


class Arrivals(NamedTuple):
    """The result of planning: names of all shards, reserved ones last, and what has changed."""

    shards: list[str]
    new: list[str]
    retired: list[str]
    vanished: list[str]  # missing files whose text is kept
    lost: list[str]  # missing files whose text is removed from the corpus
    waiting: bool  # changes exist that are planned when the current run has finished


def arrive(artifacts: ArtifactStore, recipe: Recipe, *, keep_vanished: bool = True) -> Arrivals:
    """Plan shards for the current files of the sources.

    New and changed files become new shards. With `keep_vanished`, the text of a file that has
    disappeared stays in the corpus if it was read and its shard need not be read again. The plan
    does not change during a run, because all steps of a run must see the same shards.
    """
    home = artifacts.at
    with lock(home.leases / "shards"):
        existing = home.shards()
        read = [s for s in existing if ("raw_corpus", s.name) in artifacts.entries()]
        listed = list_files(recipe.corpus.sources)
        files = listed
        if keep_vanished:
            files = with_vanished(listed, recipe.corpus.sources, read)
        planned = plan_shards(files, recipe.corpus.shard_bytes, existing)
        waiting = planned != existing and home.is_at_work()
        if waiting:
            planned, files = existing, [f for s in existing for f in s.files]
        elif planned != existing:
            home.write_shards(planned)
    before, after = {s.name for s in existing}, {s.name for s in planned}
    return Arrivals(
        shards=[s.name for s in planned] + [ShardKind.PROBE.named(d.name) for d in recipe.domains],
        new=sorted(after - before),
        retired=sorted(before - after),
        vanished=[f.name for f in files if f.vanished],
        lost=sorted({f.name for s in existing for f in s.files} - {f.name for f in files}),
        waiting=waiting,
    )


def arrival_checks() -> list[dg.AssetChecksDefinition]:
    """Return the check `sources_present`."""

    @dg.asset_check(asset="raw_corpus")
    def sources_present(artifacts: ArtifactStore) -> dg.AssetCheckResult:
        """The files that the corpus was read from still exist at the sources."""
        files = [file for shard in artifacts.at.shards() for file in shard.files]
        gone = [f.name for f in files if f.vanished]
        return dg.AssetCheckResult(
            passed=not gone,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"{len(gone)} files have disappeared, the first {gone[0]}; their text is "
            "kept until you run `colorfilter prune --vanished`"
            if gone
            else "all files exist",
            metadata={"vanished": len(gone), "files": gone[:20]},
        )

    return [sources_present]
