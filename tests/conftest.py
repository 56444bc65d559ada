"""A tiny base made here, rows for it, fleets of it; no network, one thread."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
NOUNS = "parcel invoice battery garden engine teapot ladder window printer bicycle".split()
VERBS = "arrived broke leaked rattled vanished melted stopped burned".split()


class NetworkUsed(OSError):
    """A test touched the network."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network (sockets between processes of this machine stay), and no fleet from the environment."""
    connect, bind = socket.socket.connect, socket.socket.bind

    def guard(real: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(self: socket.socket, *args: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                raise NetworkUsed(f"a test may not use the network: {args}")
            return real(self, *args)

        return guarded

    def resolve(host: Any, *_: Any, **__: Any) -> Any:
        raise NetworkUsed(f"a test may not use the network: {host}")

    monkeypatch.setattr(socket.socket, "connect", guard(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex))
    monkeypatch.setattr(socket.socket, "bind", guard(bind))
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("PLURES_FLEET", "PLURES_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def sentences(n: int, seed: int = 0) -> list[str]:
    """English-looking sentences of a small vocabulary, all different in their number."""
    rng = random.Random(seed)
    return [f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} near the {rng.choice(NOUNS)} {i}." for i in range(n)]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_base(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A Llama of 3 layers and width 32 with random weights, and a byte-level BPE tokenizer, saved in `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
        model = LlamaForCausalLM(LlamaConfig(**(settings | config)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base. Copy it before changing it."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def text_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short texts as JSON lines."""
    return write_rows(tmp_path_factory.mktemp("rows") / "text.jsonl", ({"text": t} for t in sentences(60, 1)))


@pytest.fixture(scope="session")
def answer_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty prompts with completions as JSON lines."""
    rows = ({"prompt": f"{t} Why?", "completion": f" Because of the {NOUNS[i % 10]}."}
            for i, t in enumerate(sentences(30, 2)))  # fmt: skip
    return write_rows(tmp_path_factory.mktemp("rows") / "answers.jsonl", rows)


@pytest.fixture
def make_fleet(tmp_path: Path, base_folder: Path) -> Callable[..., Path]:
    """Makes empty fleets of the tiny base, or of another."""

    def make(name: str = "acme.fleet", base: Path | None = None) -> Path:
        from plures.engine.model import reference
        from plures.store import Store

        Store.create(tmp_path / name, reference(str(base or base_folder))).close()
        return tmp_path / name

    return make


METHODS: dict[str, dict[str, Any]] = {
    "mos": {"r": 4, "e": 2, "l": 2, "p": 1, "lr": 3e-2},
    "lora": {"r": 2, "alpha": 4.0, "lr": 1e-2},
    "vera": {"r": 8, "lr": 1e-1},
    "full": {"lr": 2e-3},
}


@pytest.fixture(scope="session")
def trained_fleet(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, text_rows: Path) -> Path:
    """A fleet with one short-trained variant of every method, named after it. Look, do not touch: `own_fleet` is yours."""
    import plures

    path = tmp_path_factory.mktemp("trained") / "acme.fleet"
    with plures.Fleet(path, base=str(base_folder)) as fleet:
        for method, settings in METHODS.items():
            fleet.train(method, text_rows, method=method, steps=8, batch_rows=4, max_tokens=32, save_every=0, **settings)
    return path


@pytest.fixture
def own_fleet(tmp_path: Path, trained_fleet: Path) -> Path:
    """A copy of the trained fleet."""
    return Path(shutil.copytree(trained_fleet, tmp_path / "acme.fleet"))
