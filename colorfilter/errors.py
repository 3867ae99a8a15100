"""Exceptions for bad input, unreachable systems, and a lost process of a group."""


class InputError(Exception):
    """Bad input; the message is one line that says what is wrong, where, and how to fix it.

    The command line prints it without a traceback and exits with code 2.
    """


class UnreachableError(InputError):
    """An external system, such as a cluster, is unreachable; partial work stays valid."""


class LeftAloneError(RuntimeError):
    """Another process of the group has ended; its error is the actual cause."""


def one_line(error: Exception) -> str:
    """Return the message of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__
