class ConversionError(ValueError):
    """A source that cannot be converted as asked, in words for the person who asked."""


class ConversionWarning(UserWarning):
    """What makes the result of a conversion doubtful, though it could be made."""


def listing(names, limit: int = 8) -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
