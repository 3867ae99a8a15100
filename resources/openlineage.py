"""The ledger as OpenLineage events, for catalogues that draw lineage (https://openlineage.io).

A job is an asset, its run what one run of Dagster made of it; a dataset is an artefact, its version
the fingerprint. Ids and times come from the ledger alone, so that what is sent twice is the same.
The ledger knows when an artefact was entered, not when its making began: START bears the time of
the run's first artefact, COMPLETE that of its last.

Left out are artefacts that were taken up again, since the run that made them tells of them, and
those that no run of Dagster is on record for.
"""

import os
import uuid
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from openlineage.client import OpenLineageClient, set_producer
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.facet_v2 import (
    DatasetFacet,
    InputDatasetFacet,
    RunFacet,
    data_quality_metrics_input_dataset,
    dataset_version_dataset,
    output_statistics_output_dataset,
    parent_run,
    processing_engine_run,
    schema_dataset,
    tags_run,
)
from openlineage.client.transport.file import FileConfig, FileTransport
from openlineage.client.transport.noop import NoopConfig, NoopTransport

from colorfilter.errors import InputError, one_line
from colorfilter.files import write_atomically
from colorfilter.provenance import stands
from resources.artifacts import ArtifactStore
from resources.ledger import Entry
from resources.lineage import Lineage, name_of

URL = "OPENLINEAGE_URL"
Field = schema_dataset.SchemaDatasetFacetFields

set_producer(f"pkg:generic/colorfilter@{metadata.version('colorfilter')}")


class Found(NamedTuple):
    """The events of a ledger, and how many artefacts no run is on record for."""

    events: list[RunEvent]
    without_run: int


def events(artifacts: ArtifactStore) -> Found:
    """START and COMPLETE of every asset in every run of Dagster, in the order of the ledger.

    Raises InputError where there is no home.
    """
    recipe = artifacts.at.owner()
    if recipe is None:
        raise InputError(f"home {artifacts.at.root}: there is none; name another with --home")
    made: dict[tuple[str, str], list[Entry]] = {}
    without_run = 0
    for entry in artifacts.ledger:
        if entry["reused"]:
            continue
        if entry.get("run") is None:
            without_run += 1
        else:
            made.setdefault((entry["run"], entry["asset"]), []).append(entry)
    telling = _Telling(artifacts, recipe)
    return Found([e for entries in made.values() for e in telling.of(entries)], without_run)


class _Telling:
    """What it takes to tell of a home's artefacts."""

    def __init__(self, artifacts: ArtifactStore, recipe: str) -> None:
        self._root = artifacts.at.root
        self._lineage = Lineage(artifacts)
        self._recipe = recipe
        self._namespace = f"colorfilter.{recipe}"
        self._found: dict[tuple[str, str], list[Entry]] = {}
        self._schemas: dict[str, list[Field]] = {}

    def of(self, entries: Sequence[Entry]) -> list[RunEvent]:
        """The two events of what one run made of one asset."""
        first, last = entries[0], entries[-1]
        run = str(uuid.uuid5(uuid.UUID(first["run"]), first["asset"]))
        return [
            RunEvent(
                eventType=state,
                eventTime=entry["recorded"],
                run=Run(run, self._run_facets(first)),
                job=Job(self._namespace, first["asset"]),
                inputs=self._inputs(entries),
                outputs=[self._output(entry) for entry in entries],
            )
            for state, entry in ((RunState.START, first), (RunState.COMPLETE, last))
        ]

    def _run_facets(self, entry: Entry) -> dict[str, RunFacet]:
        """Dagster's run, its version, and the revision of this code.

        The latter as a tag: the facet for the location of source code wants its address, which is
        not on record.
        """
        environment = entry["environment"]
        facets: dict[str, RunFacet] = {
            "parent": parent_run.ParentRunFacet(
                run=parent_run.Run(entry["run"]),
                job=parent_run.Job(self._namespace, self._recipe),
            ),
            "processing_engine": processing_engine_run.ProcessingEngineRunFacet(
                version=environment["dagster"], name="dagster"
            ),
        }
        if environment.get("git"):
            tag = tags_run.TagsRunFacetFields("git", environment["git"], "colorfilter")
            facets["tags"] = tags_run.TagsRunFacet([tag])
        return facets

    def _inputs(self, entries: Sequence[Entry]) -> list[InputDataset]:
        """What these were made from, each once.

        An input that is a part of an artefact is told as the whole, as which it is some run's
        output; one that the ledger does not have, by its name and fingerprint alone.
        """
        inputs: dict[tuple[str, str], InputDataset] = {}
        for entry in entries:
            for name, fingerprint in self._lineage.made_from(entry):
                whole = self._whole(name, fingerprint, before=entry["recorded"])
                if whole:
                    name, fingerprint = name_of(whole), whole["fingerprint"]  # noqa: PLW2901
                if (name, fingerprint) not in inputs:
                    inputs[name, fingerprint] = self._input(name, fingerprint, whole)
        return [*inputs.values(), *(file for entry in entries for file in self._raw_files(entry))]

    def _raw_files(self, entry: Entry) -> Iterator[InputDataset]:
        """The files that text was read from, where they lie, each with its sha256 as version."""
        record = self._root / entry["path"] / "files.parquet"
        for file in pq.read_table(record).to_pylist() if record.exists() else []:
            yield InputDataset(
                *_address(file["uri"]),
                facets=self._dataset_facets(file["sha256"], None),
                inputFacets=_amount(None, file["bytes"]),
            )

    def _whole(self, name: str, fingerprint: str, before: str) -> Entry | None:
        """The entry of an input: of several that have it as a part, the last one before then."""
        if (name, fingerprint) not in self._found:
            found = self._lineage.find(name, fingerprint)
            found.sort(key=lambda e: str(e["recorded"]))
            self._found[name, fingerprint] = found
        found = self._found[name, fingerprint]
        earlier = [e for e in found if e["recorded"] <= before]
        return next(reversed(earlier or found), None)

    def _input(self, name: str, fingerprint: str, entry: Entry | None) -> InputDataset:
        dataset = InputDataset(
            self._namespace, name, facets=self._dataset_facets(fingerprint, entry)
        )
        if entry:
            dataset.inputFacets = _amount(entry.get("rows"), entry.get("bytes"))
        return dataset

    def _output(self, entry: Entry) -> OutputDataset:
        statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
            rowCount=entry["rows"], size=entry["bytes"]
        )
        return OutputDataset(
            self._namespace,
            name_of(entry),
            facets=self._dataset_facets(entry["fingerprint"], entry),
            outputFacets={"outputStatistics": statistics},
        )

    def _dataset_facets(self, fingerprint: str, entry: Entry | None) -> dict[str, DatasetFacet]:
        facets: dict[str, DatasetFacet] = {
            "version": dataset_version_dataset.DatasetVersionDatasetFacet(fingerprint)
        }
        if entry:
            path = entry["path"]
            if path not in self._schemas:
                self._schemas[path] = _schema(self._root / path)
            if self._schemas[path]:
                facets["schema"] = schema_dataset.SchemaDatasetFacet(self._schemas[path])
        return facets


def _address(uri: str) -> tuple[str, str]:
    """A file's namespace and name, as OpenLineage names files on a disk and in buckets."""
    scheme, remote, rest = uri.partition("://")
    if not remote:
        return "file", uri
    bucket, _, name = rest.partition("/")
    return f"{scheme}://{bucket}", name


def _amount(rows: int | None, size: int | None) -> dict[str, InputDatasetFacet]:
    """How much an input is."""
    facet = data_quality_metrics_input_dataset.DataQualityMetricsInputDatasetFacet(
        columnMetrics={}, rowCount=rows, bytes=size
    )
    return {"dataQualityMetrics": facet}


def _schema(folder: Path) -> list[Field]:
    """The columns of an artefact's Parquet files; where they are several tables, within each.

    Files side by side with the same columns are one table. Empty where the folder no longer stands.
    """
    if not stands(folder):
        return []
    paths = sorted(folder.rglob("*.parquet"), key=lambda p: (p.parent, p.name))
    schemas = {path: pq.read_schema(path) for path in paths}
    tables: dict[str, list[Field]] = {}
    for (place, schema), group in groupby(paths, lambda p: (p.parent, schemas[p])):
        files = list(group)
        name = "*.parquet" if len(files) > 1 else files[0].name
        tables[str((place / name).relative_to(folder))] = [
            Field(column.name, str(column.type), ordinal_position=number, fields=None)
            for number, column in enumerate(schema, 1)
        ]
    if len(tables) == 1:
        return next(iter(tables.values()))
    return [Field(name, "struct", fields=columns) for name, columns in tables.items()]


def send(found: Sequence[RunEvent]) -> None:
    """Send events to where the configuration of OpenLineage's client says.

    Raises InputError where it says nothing, and where an event is not taken.
    """
    try:
        # Asked first: a client that finds nothing writes the events to the log.
        asking = OpenLineageClient(transport=NoopTransport(NoopConfig()))
        configured = (asking.config.transport or {}).get("type") or os.environ.get(URL)
        client = OpenLineageClient() if configured else asking
    except (ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"openlineage: its configuration cannot be used ({one_line(error)}); correct it"
        ) from error
    if not configured:
        raise InputError(
            f"openlineage: nothing says where to send the events; set {URL} or "
            "OPENLINEAGE__TRANSPORT__*, write an openlineage.yml, or name a file with --file"
        )
    if client.transport.kind == NoopTransport.kind:
        raise InputError(
            "openlineage: is switched off; unset OPENLINEAGE_DISABLED, or configure a transport "
            "other than noop"
        )
    _emit(client, found)


def write(found: Sequence[RunEvent], path: Path) -> None:
    """Write events to a file, one a line, whole or not at all; what was there goes.

    Raises InputError where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(b"")
        transport = FileTransport(FileConfig(str(temporary), append=True))
        _emit(OpenLineageClient(transport=transport), found)
        write_atomically(temporary, path)
    except OSError as error:
        raise InputError(f"--file {path}: {one_line(error)}; name another") from error
    finally:
        temporary.unlink(missing_ok=True)


def _emit(client: OpenLineageClient, found: Sequence[RunEvent]) -> None:
    for number, event in enumerate(found, 1):
        try:
            client.emit(event)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"openlineage: event {number} of {len(found)} was not taken ({one_line(error)}); "
                "mend that and send again: what is sent twice is the same event"
            ) from error
    if not client.close():
        raise InputError("openlineage: not every event was taken in time; send again")
