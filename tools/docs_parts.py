"""What the generated pages are made of: their mark, tables, and links to papers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MARK = "<!-- Written by tools/write_docs.py; change the source, then run `make docs`. -->\n\n"


def paper_link(paper: str) -> str:
    """A link to an arXiv paper or a DOI; others as they are."""
    kind, _, number = paper.partition(":")
    where = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(kind)
    return f"[{paper}]({where}{number})" if where else paper


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|")


def table(header: str, rows: Iterable[Sequence[str]]) -> str:
    """A table; a column whose name in `header` ends in ":" stands to the right."""
    names = [h.strip() for h in header.split("|")]
    rule = ["---:" if n.endswith(":") else "---" for n in names]
    every = [[n.removesuffix(":") for n in names], rule, *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in every)
