"""What the tests of files and batches have in common: lines, and how a batch is begun, awaited and read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fakes import last, wait_until
from openai import OpenAI

from plures.engine.ask import Ask, Chosen, Piece

CHAT, OLD = "/v1/chat/completions", "/v1/completions"
ENDED = ("completed", "failed", "cancelled")


def said(ask: Ask) -> str:
    """What the engine answers: the prompt backwards."""
    return bytes(t for t in reversed(ask.tokens) if t < 128).decode()


def pieces(ask: Ask) -> list[Piece]:
    text = said(ask)[: ask.how.max_tokens]
    top = tuple((i, f"t{i}", -0.5 - i) for i in range(ask.how.logprobs or 0))
    chosen = [(Chosen(ord(c), c, -0.25, top),) if ask.how.logprobs is not None else () for c in text]
    made = [Piece((ord(c),), c, t) for c, t in zip(text, chosen, strict=True)]
    return [*made, last(len(text), len(ask.tokens), n_cached=1)]


def chat(id: str, text: str = "hi", **body: Any) -> dict[str, Any]:
    """A line of a batch of chats."""
    whole = {"model": "mos", "messages": [{"role": "user", "content": text}]} | body
    return {"custom_id": id, "method": "POST", "url": CHAT, "body": whole}


def old(id: str, prompt: Any = "hi", **body: Any) -> dict[str, Any]:
    """A line of a batch of completions."""
    return {"custom_id": id, "method": "POST", "url": OLD, "body": {"model": "mos", "prompt": prompt} | body}


def upload(client: OpenAI, lines: Sequence[Any] | bytes, name: str = "in.jsonl") -> str:
    data = lines if isinstance(lines, bytes) else "".join(json.dumps(line) + "\n" for line in lines).encode()
    return client.files.create(file=(name, data), purpose="batch").id


def begin(client: OpenAI, lines: Sequence[Any] | bytes, endpoint: Any = CHAT, **more: Any) -> str:
    made = client.batches.create(
        input_file_id=upload(client, lines), endpoint=endpoint, completion_window="24h", **more
    )
    assert made.object == "batch" and made.id.startswith("batch_") and not made.output_file_id
    return made.id


def ended(client: OpenAI, id: str, status: str = "completed") -> Any:
    wait_until(lambda: client.batches.retrieve(id).status in ENDED, 20)
    batch = client.batches.retrieve(id)
    assert batch.status == status, batch
    return batch


def rows(client: OpenAI, file: str | None) -> list[dict[str, Any]]:
    assert file
    return [json.loads(line) for line in client.files.content(file).text.splitlines()]


def plain(body: dict[str, Any]) -> dict[str, Any]:
    """A body without what is another one every time."""
    return {k: v for k, v in body.items() if k not in ("id", "created")}
