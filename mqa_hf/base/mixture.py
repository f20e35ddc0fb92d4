"""Texts mixed by weight, and the texts that come with the package or with Python.

- `builtin:manual`: Python's reference manual, English technical prose.
- `builtin:code`: the modules of Python's standard library.
- `builtin:languages`: the Universal Declaration of Human Rights in 24 languages (`texts/README.md`).
- `builtin:verse`: plays and poems of Shakespeare.
"""

import json
import lzma
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from .errors import MQAError

SPOKEN = 250  # bytes of UTF-8 that are spoken together, 5 to 30 s


@dataclass(frozen=True)
class Part:
    """A data set of a mixture and its weight."""

    source: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Part":
        """`SOURCE` or `SOURCE=WEIGHT`."""
        source, sign, weight = text.rpartition("=")
        try:
            return cls(source, float(weight)) if sign else cls(text)
        except ValueError:
            return cls(text)  # a name with "=" in it


def manual() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def code() -> list[str]:
    found = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not found:
        raise MQAError("this Python has no source of its standard library; name a text with `calibration`")
    return [path.read_text(encoding="utf-8", errors="replace") for path in found]


def packed(package: str, *path: str) -> list[dict[str, str]]:
    """The rows of compressed JSON lines in a package."""
    content = files(package).joinpath(*path).read_bytes()
    return [json.loads(line) for line in lzma.decompress(content).decode().splitlines()]


def languages() -> list[str]:
    return [row["text"] for row in packed("mqa_hf.conversion", "texts", "languages.jsonl.xz")]


def spoken_sentences() -> list[tuple[str, str]]:
    """(language, text) of `builtin:languages`: paragraphs, short ones joined."""
    found = []
    for row in packed("mqa_hf.conversion", "texts", "languages.jsonl.xz"):
        said = ""
        for text in row["text"].split("\n\n"):
            if said and len(said.encode()) + len(text.encode()) > SPOKEN:
                found.append((row["language"].split("-")[0], said))
                said = ""
            said = f"{said} {text}".strip()
        found.append((row["language"].split("-")[0], said))
    return found


def verse() -> list[str]:
    return [row["text"] for row in packed("mqa_hf.eval", "shakespeare", "text", "train.jsonl.xz")]


BUILT_IN: dict[str, Callable[[], list[str]]] = {
    "builtin:manual": manual,
    "builtin:code": code,
    "builtin:languages": languages,
    "builtin:verse": verse,
}
MANUAL = "builtin:manual"
DEFAULT = (Part(MANUAL, 4), Part("builtin:languages", 3), Part("builtin:code", 2), Part("builtin:verse", 1))


def shares(parts: Sequence[Part], count: int) -> list[int]:
    """Divide `count` by weight, in whole numbers (largest remainders)."""
    total = sum(part.weight for part in parts)
    exact = [count * part.weight / total for part in parts]
    found = [int(share) for share in exact]
    for i in sorted(range(len(parts)), key=lambda i: found[i] - exact[i])[: count - sum(found)]:
        found[i] += 1
    return found
