"""Send OpenLineage events to a catalogue, or write them to a file."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from openlineage.client import OpenLineageClient
from openlineage.client.event_v2 import RunEvent
from openlineage.client.transport.file import FileConfig, FileTransport
from openlineage.client.transport.noop import NoopConfig, NoopTransport

from colorfilter.errors import InputError, one_line
from colorfilter.storage.files import write_atomically


def send(events: Sequence[RunEvent]) -> None:
    """Send events to the destination in OpenLineage's own configuration.

    Raises InputError if the configuration is missing or invalid, or an event is not accepted.
    """
    try:
        # Checked first, because a client without a transport prints the events.
        config = OpenLineageClient(transport=NoopTransport(NoopConfig())).config
        if not (config.transport or {}).get("type") and not os.environ.get("OPENLINEAGE_URL"):
            raise InputError(
                "openlineage: no destination is configured; set OPENLINEAGE_URL or "
                "OPENLINEAGE__TRANSPORT__*, write an openlineage.yml, or pass --file"
            )
        client = OpenLineageClient()
    except (ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"openlineage: the configuration is invalid ({one_line(error)}); fix it"
        ) from error
    _emit(client, events)


def write(events: Sequence[RunEvent], path: Path) -> None:
    """Write events to a file, one per line. An existing file is replaced atomically.

    Raises InputError if the file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder) / path.name
            file.touch()
            transport = FileTransport(FileConfig(str(file), append=True))
            _emit(OpenLineageClient(transport=transport), events)
            write_atomically(file, path)
    except OSError as error:
        raise InputError(f"--file {path}: {one_line(error)}; give another path") from error


def _emit(client: OpenLineageClient, events: Sequence[RunEvent]) -> None:
    if client.transport.kind == NoopTransport.kind:
        raise InputError(
            "openlineage: sending is disabled; unset OPENLINEAGE_DISABLED, or configure a "
            "transport other than noop"
        )
    for number, event in enumerate(events, 1):
        try:
            client.emit(event)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"openlineage: event {number} of {len(events)} was not accepted "
                f"({one_line(error)}); fix the cause and run again, events keep their ids"
            ) from error
    if not client.close():
        raise InputError("openlineage: not every event was accepted in time; run again")
