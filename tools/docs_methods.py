"""The pages of the methods: docs/methods/*.md, docs/papers.md, and README's table of capabilities."""

from __future__ import annotations

import inspect
import json
from typing import Any

from docs_parts import MARK, cell, paper_link, table

SECTIONS = ("Options", "Shapes", "Raises", "Paper", "Departs from the paper")


def cards() -> list[tuple[str, Any]]:
    """Every method's capability and card, own methods only: a plug-in of this machine is no part of the docs."""
    from plures.flows.capabilities import folders

    return [(kind, c) for kind, f in folders().items() for c in f.cards() if c.module.startswith("plures.")]


def sections(doc: str) -> dict[str, str]:
    """A method's docstring by section; "" is the text before the first. Lines keep their indent below the section."""
    out: dict[str, list[str]] = {"": []}
    current = ""
    for line in inspect.cleandoc(doc).splitlines():
        name = line.partition(":")[0]
        if name in SECTIONS and ":" in line:
            current, line = name, line.partition(":")[2].strip()
            out[current] = []
        out[current].append(line)
    return {k: "\n".join(v).strip("\n") for k, v in out.items()}


COMMANDS = {
    "cluster": "plures select pool.parquet 'cells={method: {name}}' --at-most cells=0:5%",
    "merge": "plures merge recipe.yaml merged/        # merge_method: {name}",
    "pack": "plures pack acme.fleet --method {name}",
    "route": "plures score support held_out.jsonl --with support-2 --route {name}",
    "select": "plures select pool.parquet --budget 5% --method {name}",
}
"""How a method is chosen of a capability that no recipe names."""


def recipe_line(kind: str, options: dict[str, tuple[str, Any, str]], name: str) -> str:
    """The line that chooses the method of a capability: a recipe's, every option at its default, or a command's."""
    if kind in COMMANDS:
        return COMMANDS[kind].replace("{name}", name)
    said = [f"method: {name}", *(f"{k}: {json.dumps(default)}" for k, (_, default, _) in options.items())]
    return f"{kind}: {{{', '.join(said)}}}"


def method_page(kind: str, card: Any) -> str:
    """docs/methods/<name>.md."""
    from plures.core.folder import options_of
    from plures.flows.capabilities import folders

    cls = folders()[kind][card.name]
    options, doc = options_of(cls), sections(cls.__doc__ or "")
    file = f"src/{card.module.replace('.', '/')}.py"
    facts = [
        ("capability", f"`{kind}`"), ("status", card.status), ("when", card.when),
        ("paper", f"{card.title}, {paper_link(card.paper)}"), ("source", f"[`{file}`](../../{file})"),
    ]  # fmt: skip
    rows = [(f"`{k}`", cell(t), f"`{json.dumps(d)}`", cell(h)) for k, (t, d, h) in options.items()]
    listed = table("option | type | default | what it does", rows) if rows else "None."
    rest = "\n\n".join(f"**{s}.** {' '.join(doc[s].split())}" for s in SECTIONS[1:] if s in doc)
    where, language = ("On the command line", "bash") if kind in COMMANDS else (
        "In a recipe, every default written out", "yaml")  # fmt: skip
    return (
        f"# {card.name}\n\n{MARK}{card.summary}\n\n{table(' | ', facts)}\n\n## The idea\n\n```text\n{doc['']}\n```\n\n"
        f"## Options\n\n{listed}\n\n{where}:\n\n"
        f"```{language}\n{recipe_line(kind, options, card.name)}\n```\n\n{rest}\n"
    )


def papers_page() -> str:
    """docs/papers.md: paper, method, the recipe's line."""
    from plures.core.folder import options_of
    from plures.flows.capabilities import folders

    rows = []
    for kind, c in sorted(cards(), key=lambda pair: (pair[1].paper == "none", pair[1].paper)):
        line = recipe_line(kind, options_of(folders()[kind][c.name]), c.name)
        page = f"[{c.name}](methods/{c.name}.md)"
        rows.append((paper_link(c.paper), cell(c.title), page, cell(c.summary), f"`{line}`"))
    every = table("paper | title | method | what it does | recipe", rows)
    return (
        f"# From the paper to the recipe\n\n{MARK}Each paper that a method implements, and the recipe's line for it."
        f"\n\n{every}\n\nWhere a method departs from its paper is said on its page. The recipes of the MoS paper's "
        "ablation are in [mos.md](mos.md#the-papers-ablation-as-recipes).\n"
    )


def methods_table() -> str:
    """README's table of capabilities: their methods, each a link to its page; what each does is on docs/papers.md."""
    links: dict[str, list[str]] = {}
    for kind, c in cards():
        mark = "" if c.status == "stable" else f" ({c.status})"
        links.setdefault(kind, []).append(f"[{c.name}](docs/methods/{c.name}.md){mark}")
    return table("capability | methods", [(f"`{kind}`", " · ".join(found)) for kind, found in links.items()])
