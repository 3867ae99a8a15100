"""The commands `colorfilter backup` and `colorfilter restore`."""

from pathlib import Path
from typing import Annotated

import typer

from commands.options import (
    HomeOption,
    console,
)
from pipelines import settings

BackupArgument = Annotated[Path, typer.Argument(help="Folder of the backup.")]


def backup(
    folder: BackupArgument,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Back up the home into a folder. The pipeline may be running.

    Copies only what the folder does not have yet. Artifacts removed by `prune` stay in the backup;
    documents removed by `forget` do not. If interrupted, the previous backup remains valid and the
    next one resumes.
    """
    from commands.backup.backup import back_up
    from commands.display import show_copying
    from resources.home import Home

    with show_copying(console) as listener:
        done = back_up(Home(home), folder, listener)
    console.print(done.summary, highlight=False)


def restore(
    folder: BackupArgument,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Restore a backup into a new home, verifying the sha256 of every file.

    --home must be a new or empty folder. A damaged backup is refused and leaves no home.
    """
    from commands.backup.backup import restore as bring_back
    from commands.display import show_copying
    from resources.home import Home

    with show_copying(console) as listener:
        done = bring_back(folder, Home(home), listener)
    console.print(done.summary, highlight=False)
