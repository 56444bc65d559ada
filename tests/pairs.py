"""Rows of pairs: short and long, with a rule to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import NOUNS, sentences, write_rows


def pairs(n: int = 24, seed: int = 2) -> list[dict[str, Any]]:
    """Prompts of different lengths; chosen answers begin with "Yes", rejected ones with "No", of different lengths."""
    texts = sentences(n, seed)
    return [
        {
            "prompt": " ".join(texts[i : i + 1 + i % 3]) + " Well?",
            "chosen": f" Yes, the {NOUNS[i % 10]}" + " did" * (i % 2) + ".",
            "rejected": f" No, the {NOUNS[(i + 3) % 10]}" + " did not" * (i % 4) + ".",
        }
        for i in range(n)
    ]


def chats(n: int = 8) -> list[dict[str, Any]]:
    """The same as messages."""

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text.strip()}]

    return [
        {"prompt": turn("user", r["prompt"]), **{k: turn("assistant", r[k]) for k in ("chosen", "rejected")}}
        for r in pairs(n)
    ]


def write_pairs(path: Path, n: int = 24) -> Path:
    """Pairs as JSON lines."""
    return write_rows(path, pairs(n))
