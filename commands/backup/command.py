"""The commands `colorfilter backup` and `colorfilter restore`."""

from pathlib import Path
from typing import Annotated

import typer

from commands.options import (
    HomeOption,
    console,
)
from pipelines import settings

BackupArgument = Annotated[Path, typer.Argument(help="The folder of the backup.")]


def backup(
    folder: BackupArgument,
    home: HomeOption = Path(settings.DEFAULT_HOME),
) -> None:
    """Back up the home into a folder, while the pipeline may be at work.

    Copies what the folder does not have yet; what was copied once stays there. A backup that was
    stopped leaves the last one whole, and the next goes on from there.
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
    """Make a new home of a backup, every file checked against its sha256.

    A damaged backup is refused, and leaves no home.
    """
    from commands.backup.backup import restore as bring_back
    from commands.display import show_copying
    from resources.home import Home

    with show_copying(console) as listener:
        done = bring_back(folder, Home(home), listener)
    console.print(done.summary, highlight=False)
