"""The demo's fleet behind a server: asked through OpenAI's client, and a bad release rolled back."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ANSWER_TOKENS = 40
Ask = Callable[[str, str], tuple[str, str]]
"""A model's name and a prompt in; the answer's text and the version that gave it out."""


def caller(url: str, key: str = "none") -> tuple[Ask, str]:
    """How a server's completions are asked for, and by which client: OpenAI's, or plain HTTP where there is none."""
    try:
        from openai import OpenAI
    except ImportError:
        return lambda model, prompt: _plain(url, key, model, prompt), "plain HTTP (pip install openai for its client)"
    client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)

    def ask(model: str, prompt: str) -> tuple[str, str]:
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=ANSWER_TOKENS, temperature=0)
        return answer.choices[0].text, answer.model

    return ask, "the OpenAI client"


def _plain(url: str, key: str, model: str, prompt: str) -> tuple[str, str]:
    said = {"model": model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    told = _post(f"{url}/v1/completions", key, said)
    return told["choices"][0]["text"], told["model"]


def _post(url: str, key: str, said: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(said).encode(), headers), timeout=120) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


def serve_and_ask(fleet: Path, asked: Sequence[tuple[str, str]], released: str, prompt: str) -> dict[str, Any]:
    """Serve a fleet on free ports; ask `(model, prompt)` pairs at once; release a second version and roll it back.

    `released` is its name, whose alias `prod` points at the first version.
    """
    from plures.server.run import Service

    with Service(fleet, port=0, admin_port=0, open=True) as service:
        ask, client = caller(service.url)
        ask(*asked[0])  # what is computed once is not counted
        before = service.serving.state()
        with ThreadPoolExecutor(len(asked)) as threads:
            answers = list(threads.map(lambda pair: ask(*pair), asked))
        after = service.serving.state()
        key, secret = service.desk.access.make_key("", "the demo", admin=True)
        aliases = f"{service.admin_url}/admin/variants/{released}/aliases/prod"

        def turn(when: str) -> dict[str, str]:
            text, by = ask(f"{released}@prod", prompt)
            return {"when": when, "by": by, "text": text}

        turns = [turn("before")]
        _post(aliases, secret, {"version": 2})
        turns.append(turn("released"))
        _post(f"{aliases}/rollback", secret, {})
        turns.append(turn("rolled back"))
        service.desk.access.revoke(key.id, "the demo")
    return {
        "client": client,
        "answers": [{"asked": model, "prompt": p, "text": text, "by": by}
                    for (model, p), (text, by) in zip(asked, answers, strict=True)],
        "steps": after.steps - before.steps, "tokens": after.new_tokens - before.new_tokens,
        "turns": turns,
    }  # fmt: skip
