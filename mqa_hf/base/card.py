"""Sections of a model card."""

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

FENCE = re.compile(r"\s*(```|~~~)")


def public(source: str) -> str:
    """A hub id as it is, a file or directory by its name alone: nobody else has the rest of the path."""
    return Path(source).resolve().name if os.path.isabs(source) or os.path.exists(source) else source


def public_command(command: str, names: Mapping[str, str]) -> str:
    """A command with paths replaced: by `names`, else as [`public`]. A weight after a path stays (`a.txt=2`)."""

    def shown(word: str) -> str:
        path, sign, weight = word.rpartition("=")
        if word in names:
            return names[word]
        return public(path) + sign + weight if sign and re.fullmatch(r"[\d.]+", weight) else public(word)

    return shlex.join(word if word.startswith("-") else shown(word) for word in shlex.split(command))


def with_section(text: str, heading: str, body: str) -> str:
    """Replace the section with this heading in a card, or append it.

    Args:
        text: the card.
        heading: a line such as `## Use`; the section ends at the next heading of the same or a higher level.
        body: the text under the heading.
    """
    lines = text.splitlines()
    level = len(heading) - len(heading.lstrip("#"))
    headings = [i for i, line in unfenced(lines) if re.match(rf"#{{1,{level}}} ", line)]
    start = next((i for i in headings if lines[i].rstrip() == heading), len(lines))
    end = next((i for i in headings if i > start), len(lines))
    parts = ("\n".join(lines[:start]).rstrip(), f"{heading}\n\n{body.strip()}", "\n".join(lines[end:]).strip())
    return "\n\n".join(part for part in parts if part) + "\n"


def unfenced(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield the lines outside code blocks, with their numbers."""
    fence = None
    for i, line in enumerate(lines):
        found = FENCE.match(line)
        if found and fence in (None, found.group(1)):
            fence = None if fence else found.group(1)
        elif fence is None:
            yield i, line
