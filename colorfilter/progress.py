"""Progress reports of long-running work: a callback receives the amount just done."""

from collections.abc import Callable

Progress = Callable[[int], None]


def silent(_amount: int) -> None:
    """Ignore progress."""
