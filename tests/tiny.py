"""A tiny base, rows for it, and a short training of every method."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NOUNS = ["parcel", "invoice", "battery", "garden", "engine", "teapot", "ladder", "window", "printer", "bicycle"]
VERBS = ["arrived", "broke", "leaked", "rattled", "vanished", "melted", "stopped", "burned"]
QUICK: dict[str, Any] = {"steps": 8, "batch_rows": 4, "max_tokens": 32, "save_every": 0}
METHODS: dict[str, dict[str, Any]] = {
    "mos": {"r": 4, "e": 2, "l": 2, "p": 1, "lr": 3e-2},
    "lora": {"r": 2, "alpha": 4.0, "lr": 1e-2},
    "vera": {"r": 8, "lr": 1e-1},
    "full": {"lr": 2e-3},
}


def sentences(n: int, seed: int = 0) -> list[str]:
    """English-looking sentences of a small vocabulary, all different in their number."""
    rng = random.Random(seed)
    return [f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} near the {rng.choice(NOUNS)} {i}." for i in range(n)]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_base(folder: Path, seed: int = 0, kind: str = "llama", **config: Any) -> Path:
    """A Llama (or its kin) of 3 layers and width 32 with random weights, and a byte-level BPE, saved in `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    raw.train_from_iterator(sentences(200), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = CHAT
    settings = {
        "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "eos_token_id": 0,
        "num_key_value_heads": 1, "intermediate_size": 64, "max_position_embeddings": 128, "initializer_range": 0.3,
        "bos_token_id": None, "pad_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(settings | config)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
