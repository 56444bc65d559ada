"""Tokenizers small enough to read: one token a byte, or a word; chat templates for them; rows as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from plures.engine.data import Example

OPEN, ASK = "{% for m in messages %}<{{ m.role[0] }}>", "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
PLAIN = OPEN + "{{ m.content }}<e>" + ASK
MARKED = (
    OPEN + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<e>{% endgeneration %}"
    "{% else %}{{ m.content }}<e>{% endif %}" + ASK
)
FORGETFUL = OPEN + "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}<e>" + ASK
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('a user must begin') }}{% endif %}" + PLAIN


def chars(*, eos: bool = True, bos: bool = False, template: str | None = None) -> Any:
    """A tokenizer of one token a byte: ids 0..4 are <e> <u> <a> <s> <b>, then the bytes."""
    special = ["<e>", "<u>", "<a>", "<s>", "<b>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*special, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 4)])
    ends = {"eos_token": "<e>"} if eos else {}
    made = PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=special[not eos and 1 : 5], **ends)
    if not eos:
        made.add_special_tokens({"additional_special_tokens": special})
    made.chat_template = template
    return made


def words() -> Any:
    """A tokenizer of one token a word."""
    raw = Tokenizer(models.WordLevel({"[unk]": 0, "<e>": 1, "the": 2, "cat": 3, "sat": 4}, unk_token="[unk]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>", unk_token="[unk]")


def shown(tokenizer: Any, example: Example) -> str:
    """The counted tokens, the others as dots."""
    tokens = tokenizer.convert_ids_to_tokens(example.ids)
    return " ".join(t if c else "." for t, c in zip(tokens, example.counted, strict=True))


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path
