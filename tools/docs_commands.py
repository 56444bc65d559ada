"""The pages of the commands: the help of every verb, and the templates of their recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docs_parts import MARK

WIDTH = 100


def verb_helps() -> Iterator[tuple[str, str]]:
    """Every verb with its help text, at a fixed width."""
    import typer

    from plures.cli.app import app

    top: Any = typer.main.get_command(app)
    context = top.make_context("plures", [], resilient_parsing=True)
    for name in top.list_commands(context):
        verb = top.get_command(context, name)
        inner = type(context)(verb, info_name=name, parent=context, terminal_width=WIDTH, max_content_width=WIDTH)
        yield name, verb.get_help(inner)


def cli_page() -> str:
    """docs/cli.md: the help of every verb."""
    helps = list(verb_helps())
    contents = " · ".join(f"[{name}](#plures-{name})" for name, _ in helps)
    parts = "\n\n".join(
        f"## plures {name}\n\n```text\n{re.sub(' +$', '', text, flags=re.M)}\n```" for name, text in helps
    )
    lead = (
        "The help of every verb, as `plures VERB --help` prints it. What a command ends with is in "
        "[exit-codes.md](exit-codes.md), which variables it reads in [environment.md](environment.md)."
    )
    return f"# The command line\n\n{MARK}{lead}\n\n{contents}\n\n{parts}\n"


def recipe_page() -> str:
    """docs/recipe-train.md: the template with every key."""
    from plures.core.recipe import template
    from plures.flows.recipes import TrainRecipe

    lead = (
        "What `plures recipe train` prints: every key with its meaning, type, limits and default. A key left out keeps "
        "its default; an unknown key is an error. How the keys work together is in [train.md](train.md)."
    )
    return f"# The recipe of `plures train`\n\n{MARK}{lead}\n\n```yaml\n{template(TrainRecipe)}```\n"


def recipes_page() -> str:
    """docs/recipes.md: the templates of all verbs but train, which has a page of its own."""
    from plures.core.recipe import template
    from plures.flows.recipes import RECIPES

    parts = [f"## `plures {verb}`\n\n```text\n{template(of)}```\n" for verb, of in RECIPES.items()
             if verb != "train"]  # fmt: skip
    return (f"# The recipes of the verbs\n\n{MARK}What `plures recipe VERB` prints; each verb has a page with its "
            "name. `plures train`'s is in [recipe-train.md](recipe-train.md).\n\n" + "\n".join(parts))  # fmt: skip
