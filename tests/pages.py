"""The fenced blocks of a page."""

from __future__ import annotations

import re
from pathlib import Path


def fenced(page: Path, languages: str = r"\w*") -> list[tuple[str, str, str]]:
    """`(heading, language, text)` of every fenced block whose language matches, in the order of the page."""
    text = page.read_text(encoding="utf-8")
    out, heading = [], ""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```|^#+ ([^\n]+)$", text, re.MULTILINE | re.DOTALL):
        heading = found[3] or heading
        if found[3] is None and re.fullmatch(languages, found[1]):
            out.append((heading, found[1], found[2]))
    return out
