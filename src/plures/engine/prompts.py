"""Prompts as tokens, alike in training, generation and serving."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plures.core.errors import PluresError, WrongUse
from plures.engine.ask import Prompt


def prompt_ids(prompt: Prompt, tokenizer: Any, base: str) -> list[int]:
    """Token ids of a text, or of messages through the chat template, for an answer to follow.

    Raises: WrongUse for messages to a base (by its name) without a template, or that the template refuses.
    """
    if isinstance(prompt, str):
        got = tokenizer(prompt, add_special_tokens=True, truncation=False, verbose=False)
        ids: list[int] = list(got["input_ids"])
        return ids[: open_end(ids, tokenizer)]
    if not template_of(tokenizer):
        raise WrongUse(f"base {base!r} has no chat template; give the prompt as plain text")

    def refused(why: str) -> WrongUse:
        return WrongUse(f"the chat template of base {base!r} refuses these messages: {why}")

    return list(render(prompt, tokenizer, refused, add_generation_prompt=True, return_dict=True)["input_ids"])


def open_end(ids: Sequence[int], tokenizer: Any) -> int:
    """How many of a prompt's tokens stand before the end-of-text token that the tokenizer puts after a text, if it
    does so: the row goes on. A token that is alone stays: it may be the one that every text begins with."""
    return len(ids) - (len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)


def template_of(tokenizer: Any) -> str:
    """The chat template, of several the one called "default"; "" where there is none."""
    found = tokenizer.chat_template
    return (found.get("default") if isinstance(found, dict) else found) or ""


def render(messages: Sequence[Mapping[str, Any]], tokenizer: Any, refused: Callable[[str], PluresError],
           **how: Any) -> Any:  # fmt: skip
    """`apply_chat_template`. Raises: what `refused` makes of the reason, where the template refuses the messages."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **how)
    except (TemplateError, TypeError, KeyError) as error:
        raise refused(" ".join(str(error).split())) from error
