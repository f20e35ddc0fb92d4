"""Errors and warnings for users."""

from collections.abc import Iterable


class MQAError(ValueError):
    """The request cannot be met. The message says what is wrong, with the numbers, and what to do.

    Parameters are named in backticks, as in Python; the command line shows them as flags.
    """


class ConversionError(MQAError):
    """The source cannot be converted as requested."""


class ConversionWarning(UserWarning):
    """The result of a conversion is doubtful."""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first names in order, and the number of the rest."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
