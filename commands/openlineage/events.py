"""Convert the ledger to OpenLineage events, for lineage catalogues (https://openlineage.io).

A job is an asset. A run of the job is one Dagster run that produced artifacts of the asset. A
dataset is an artifact, and its version is the fingerprint. Ids and times come from the ledger
alone, so converting again gives identical events. START has the time of the run's first artifact
and COMPLETE that of its last, because the ledger does not record when work began. Reused artifacts
are omitted, because the run that built them reports them.
"""

import uuid
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from itertools import groupby
from pathlib import Path

import pyarrow.parquet as pq
from openlineage.client import facet_v2 as facets
from openlineage.client import set_producer
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState

from colorfilter.errors import InputError
from colorfilter.storage.manifest import stands
from resources.artifacts import ArtifactStore
from resources.ledger import Entry
from resources.lineage import Lineage, name_of

Field = facets.schema_dataset.SchemaDatasetFacetFields
set_producer(f"pkg:generic/colorfilter@{metadata.version('colorfilter')}")


def events(artifacts: ArtifactStore) -> tuple[list[RunEvent], int]:
    """Return the events in ledger order, and how many artifacts have no run in the ledger.

    Raises InputError for a folder that is not a home.
    """
    recipe = artifacts.at.owner()
    if recipe is None:
        raise InputError(f"home {artifacts.at.root}: does not exist; give another with --home")
    made: dict[tuple[str | None, str], list[Entry]] = {}
    for entry in artifacts.ledger:
        if not entry["reused"]:
            made.setdefault((entry.get("run"), entry["asset"]), []).append(entry)
    home = _Home(artifacts, recipe)
    found = [e for (run, _), entries in made.items() if run for e in home.events(entries)]
    return found, sum(len(entries) for (run, _), entries in made.items() if not run)


class _Home:
    """Converts the ledger entries of a home to OpenLineage objects."""

    def __init__(self, artifacts: ArtifactStore, recipe: str) -> None:
        self._root = artifacts.at.root
        self._recipe = recipe
        self._namespace = f"colorfilter.{recipe}"
        self._lineage = Lineage(artifacts)
        self._columns = cache(_columns)

    def events(self, entries: Sequence[Entry]) -> list[RunEvent]:
        """Return the START and COMPLETE events of one asset in one Dagster run."""
        first, last = entries[0], entries[-1]
        versions, parent = first["environment"], facets.parent_run
        engine = facets.processing_engine_run.ProcessingEngineRunFacet
        # The commit is a tag, because the source code facet requires a repository URL.
        git = facets.tags_run.TagsRunFacetFields("git", versions.get("git"), "colorfilter")
        of_run: dict[str, facets.RunFacet] = {
            "parent": parent.ParentRunFacet(
                parent.Run(first["run"]), parent.Job(self._namespace, self._recipe)
            ),
            "processing_engine": engine(version=versions["dagster"], name="dagster"),
            "tags": facets.tags_run.TagsRunFacet([git] if git.value else []),
        }
        run = Run(str(uuid.uuid5(uuid.UUID(first["run"]), first["asset"])), of_run)
        job = Job(self._namespace, first["asset"])
        inputs, outputs = self._inputs(entries), [self._output(entry) for entry in entries]
        return [
            RunEvent(run=run, job=job, eventType=s, eventTime=t, inputs=inputs, outputs=outputs)
            for s, t in ((RunState.START, first["recorded"]), (RunState.COMPLETE, last["recorded"]))
        ]

    def _inputs(self, entries: Sequence[Entry]) -> list[InputDataset]:
        """Return the artifacts and raw files that artifacts were built from, each artifact once.

        An input that is part of an artifact is reported as the complete artifact, because that is
        the output of a run. An input missing from the ledger is reported by name and fingerprint.
        """
        artifacts: dict[tuple[str, str], Entry] = {}
        files: list[InputDataset] = []
        for entry in entries:
            for name, fingerprint in self._lineage.made_from(entry):
                whole = self._lineage.whole(name, fingerprint, before=entry["recorded"])
                whole = whole or {"asset": name, "partition": None, "fingerprint": fingerprint}
                artifacts[name_of(whole), whole["fingerprint"]] = whole
            record = self._root / entry["path"] / "files.parquet"
            for file in pq.read_table(record).to_pylist() if record.exists() else []:
                read = {"fingerprint": file["sha256"], "bytes": file["bytes"]}
                files.append(self._input(*address(file["uri"]), read))
        found = [self._input(self._namespace, name, e) for (name, _), e in artifacts.items()]
        return found + files

    def _input(self, namespace: str, name: str, entry: Entry) -> InputDataset:
        dataset = InputDataset(namespace, name, facets=self._described(entry))
        if dataset.inputFacets is not None and "bytes" in entry:
            metrics = facets.data_quality_metrics_input_dataset.DataQualityMetricsInputDatasetFacet
            dataset.inputFacets["dataQualityMetrics"] = metrics(
                columnMetrics={}, rowCount=entry.get("rows"), bytes=entry["bytes"]
            )
        return dataset

    def _output(self, entry: Entry) -> OutputDataset:
        statistics = facets.output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet
        return OutputDataset(
            self._namespace,
            name_of(entry),
            outputFacets={"outputStatistics": statistics(entry["rows"], entry["bytes"])},
            facets=self._described(entry),
        )

    def _described(self, entry: Entry) -> dict[str, facets.DatasetFacet]:
        """Return the facets for the version and columns of a dataset."""
        version = facets.dataset_version_dataset.DatasetVersionDatasetFacet(entry["fingerprint"])
        columns = self._columns(self._root / entry["path"]) if "path" in entry else []
        schema = {"schema": facets.schema_dataset.SchemaDatasetFacet(columns)} if columns else {}
        return {"version": version, **schema}


def address(uri: str) -> tuple[str, str]:
    """Return OpenLineage's namespace and name of a file on disk or in a bucket."""
    scheme, remote, path = uri.partition("://")
    bucket, _, name = path.partition("/")
    return (f"{scheme}://{bucket}", name) if remote else ("file", uri)


def _columns(folder: Path) -> list[Field]:
    """Return the columns of an artifact's Parquet table, or one struct per table if it has several.

    Files in the same folder with the same columns are one table. Empty if the folder is gone.
    """
    files = sorted(folder.rglob("*.parquet"), key=lambda p: (p.parent, p.name))
    by_table = groupby(files if stands(folder) else [], lambda p: (p.parent, pq.read_schema(p)))
    tables = []
    for (place, schema), (first, *others) in by_table:
        columns = [
            Field(column.name, str(column.type), ordinal_position=number, fields=None)
            for number, column in enumerate(schema, 1)
        ]
        name = place / "*.parquet" if others else first
        tables.append(Field(str(name.relative_to(folder)), "struct", fields=columns))
    return (tables[0].fields or []) if len(tables) == 1 else tables
