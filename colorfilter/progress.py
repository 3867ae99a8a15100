"""How long work says how far it is: it calls a function with the amount just done."""

from collections.abc import Callable

Progress = Callable[[int], None]


def silent(_amount: int) -> None:
    """Say nothing."""
