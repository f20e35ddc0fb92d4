"""What goes wrong, in words for a person."""

from collections.abc import Iterable


class MQAError(ValueError):
    """What was asked for cannot be done. The message says what is wrong, with the numbers, and what to do.

    Parameters are named in backticks, as in Python; the command line shows them as flags.
    """


class ConversionError(MQAError):
    """A source that cannot be converted as asked."""


class ConversionWarning(UserWarning):
    """What makes the result of a conversion doubtful, though it could be made."""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
