"""A prompt is the same tokens in training, generation and serving."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from plures.core.errors import WrongUse
from plures.engine.ask import Prompt
from plures.engine.data import encode, read_rows
from plures.engine.model import Base, encode_prompt
from plures.tensors.variant import BaseRef

TEMPLATE = "{% for m in messages %}<s> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def tokenizer(around: str, template: Any = None) -> Any:
    """One token a word; what it puts around a text is `around`, where $A stands for the text."""
    vocab = {t: i for i, t in enumerate(["<u>", "<s>", "</s>", "<a>", "the", "cat", "sat"])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<u>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(t, vocab[t]) for t in ("<s>", "</s>")])  # fmt: skip
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<u>", eos_token="</s>")
    made.chat_template = template
    return made


def asked(of: Any, prompt: Prompt) -> list[str]:
    return list(of.convert_ids_to_tokens(encode_prompt(Base(None, of, BaseRef("tiny"), Path()), prompt)))


def trained(of: Any, prompt: str) -> list[str]:
    (e,) = encode(read_rows([{"prompt": prompt, "completion": "sat"}]), of, max_tokens=9)
    return list(of.convert_ids_to_tokens([i for i, c in zip(e.ids, e.counted, strict=True) if not c]))


@pytest.mark.parametrize("around", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("prompt", ["the cat", "the", "the cat </s>"])
def test_a_prompt_is_asked_as_it_was_trained(around: str, prompt: str) -> None:
    of = tokenizer(around)
    got = asked(of, prompt)
    assert got == trained(of, prompt)
    assert got[-1] != "</s>" or prompt.endswith("</s>")
    assert got[: 1 + around.startswith("<s>")] == (["<s>"] if around.startswith("<s>") else []) + ["the"]


def test_a_prompt_of_nothing_keeps_the_token_that_every_text_begins_with() -> None:
    for around in ("<s> $A", "</s> $A"):  # some models have one token for both
        assert asked(tokenizer(around), "") == [around.split()[0]]


def test_messages_are_asked_through_the_template_of_several_the_default() -> None:
    chat = [{"role": "user", "content": "the cat"}]
    said = ["<s>", "the", "cat", "<a>"]
    assert asked(tokenizer("$A </s>", TEMPLATE), chat) == said
    assert asked(tokenizer("$A </s>", {"default": TEMPLATE, "tool_use": "x"}), chat) == said


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('a user\nmust begin') }}", "a user must begin"),
        ("{{ messages[0].content + 3 }}", "str"),  # a TypeError of Python's
        (None, "has no chat template; give the prompt as plain text"),
    ],
)
def test_messages_that_a_template_refuses_are_one_line(template: str | None, why: str) -> None:
    with pytest.raises(WrongUse, match=why) as told:
        asked(tokenizer("$A", template), [{"role": "user", "content": "the"}])
    assert "base 'tiny'" in str(told.value) and "\n" not in str(told.value)


def test_a_template_that_lacks_a_key_is_one_line() -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise KeyError("tool_calls")

    of = SimpleNamespace(chat_template="x", apply_chat_template=fails)
    with pytest.raises(WrongUse, match="refuses these messages: 'tool_calls'"):
        encode_prompt(Base(None, of, BaseRef("tiny"), Path()), [])  # type: ignore[arg-type]
