"""Exceptions for bad input, for what cannot be reached, and for a lost process of a group."""


class InputError(Exception):
    """Bad input: one line that says what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """


class UnreachableError(InputError):
    """What is to be reached, such as a cluster, is not there now. What was begun is not bad."""


class LeftAloneError(RuntimeError):
    """Another process of the group has ended; the error that it raised is the cause."""


def one_line(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
