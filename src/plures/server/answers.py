"""From a request to what the engine is asked, and from its pieces to the body of the answer; for HTTP and batches."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plures.core.errors import WrongUse
from plures.core.seeds import stream
from plures.engine.ask import Ask, Chosen, Piece, Sampling, Serving
from plures.server.schemas import ChatRequest, CompletionRequest

DEFAULT_TOKENS = 512
"""New tokens of a chat answer that says no limit; with OpenAI's "as many as fit" one caller could hold a row long."""
OLD_DEFAULT_TOKENS = 16  # OpenAI's own, of a completion
_TOKEN_CHARS = 256  # no tokenizer has longer tokens; 8 MB would take 10 s to encode and then not fit
_MOST_CHOICES = 128
Asked = ChatRequest | CompletionRequest
Prompt = str | list[int] | list[dict[str, str]]
"""A text, token ids, or messages as the chat template takes them."""


def prompts_of(asked: Asked) -> list[Prompt]:
    """The prompts of a request: a chat has one."""
    return [[m.plain() for m in asked.messages]] if isinstance(asked, ChatRequest) else list(asked.prompts())


def text_of(prompt: Prompt) -> str:
    """What of a prompt is text."""
    return prompt if isinstance(prompt, str) else "".join(m["content"] for m in prompt if isinstance(m, Mapping))


def encode(serving: Serving, prompt: Prompt) -> list[int]:
    """A prompt's token ids. Raises: WrongUse where it cannot fit the context, or cannot be encoded."""
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        return [t for t in prompt if isinstance(t, int)]
    size = len(text_of(prompt))
    if size > _TOKEN_CHARS * serving.context:
        raise WrongUse(f"the prompt has {size} characters; they cannot fit the context of {serving.context} tokens")
    return serving.encode(prompt)


def asks_of(
    asked: Asked, prompts: Sequence[Sequence[int]], tenant: str, identity: str, seed: int, context: int
) -> list[Ask]:
    """What the engine is asked: for each prompt `n` answers; `seed` is of a request that says none.

    Raises: WrongUse for too many answers, a prompt that fills the context, or a limit that does not fit beside it.
    """
    n, seed = asked.n or 1, seed if asked.seed is None else asked.seed
    if len(prompts) * n > _MOST_CHOICES:
        raise WrongUse(f"{len(prompts)} prompts with n = {n} are over {_MOST_CHOICES} answers in one request")
    made = []
    for prompt in prompts:
        for choice in range(n):
            mine = stream(seed, "choice", choice) if choice else seed  # seed + 1 is another request's
            made.append(Ask(tenant, identity, tuple(prompt), _sampling(asked, len(prompt), mine, context)))
    return made


def _sampling(asked: Asked, n_prompt: int, seed: int, context: int) -> Sampling:
    room = context - n_prompt
    if room < 1:
        raise WrongUse(f"the prompt has {n_prompt} tokens; the context is {context}, prompt and answer together")
    most = asked.most_tokens or min(usual_tokens(asked), room)
    if most > room:
        raise WrongUse(f"max_tokens {most} does not fit: the prompt has {n_prompt} tokens and the context is {context}")
    temperature = 1.0 if asked.temperature is None else asked.temperature
    top_p = 1.0 if asked.top_p is None else asked.top_p
    return Sampling(
        most, temperature, top_p, seed, asked.stops, asked.wanted_logprobs, asked.schema_text, asked.ignore_eos
    )


def usual_tokens(asked: Asked) -> int:
    """New tokens at most of a request that says no limit."""
    return DEFAULT_TOKENS if isinstance(asked, ChatRequest) else OLD_DEFAULT_TOKENS


@dataclass(frozen=True)
class Answer:
    """What all parts of one answer have in common."""

    id: str
    created: int
    model: str
    fingerprint: str
    chat: bool
    n_prompts: int
    logprobs: int | None

    @classmethod
    def to(cls, asked: Asked, n_prompts: int, ref: str, base_hash: str) -> Answer:
        """A new answer to a request, by the version `ref`."""
        chat = isinstance(asked, ChatRequest)
        id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        return cls(id, int(time.time()), ref, f"plures-{base_hash[:12]}", chat, n_prompts, asked.wanted_logprobs)

    @property
    def common(self) -> dict[str, Any]:
        """The fields of the body and of every chunk."""
        said = {"id": self.id, "created": self.created, "model": self.model}
        return said | {"system_fingerprint": self.fingerprint}

    def whole(self, choices: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The body, of all pieces of all choices."""
        told = [self.choice(at, "".join(p.text for p in pieces), [t for p in pieces for t in p.tokens],
                            pieces[-1].finish, whole=True) for at, pieces in enumerate(choices)]  # fmt: skip
        kind = "chat.completion" if self.chat else "text_completion"
        return self.common | {"object": kind, "choices": told, "usage": self.usage([c[-1] for c in choices])}

    def choice(
        self, at: int, text: str, tokens: Sequence[Chosen], finish: str, *, whole: bool, offset: int = 0
    ) -> dict[str, Any]:
        """One choice, or one chunk of it that begins `offset` characters into it."""
        said: dict[str, Any] = {"index": at, "finish_reason": finish or None}
        told = self.logprobs is not None
        if not self.chat:
            return said | {"text": text, "logprobs": _old_logprobs(tokens, offset) if told else None}
        logprobs = {"content": [_logprob(t) for t in tokens], "refusal": None} if told else None
        if whole:
            return said | {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logprobs}
        return said | {"delta": {"content": text} if text else {}, "logprobs": logprobs}

    def usage(self, ended: Sequence[Piece]) -> dict[str, Any]:
        """Tokens, by the last piece of every choice: each prompt counted once, however many answers it has."""
        each = max(1, len(ended) // self.n_prompts)
        prompt = sum(p.n_prompt for p in ended) // each
        new = sum(p.n_new for p in ended)
        cached = sum(p.n_cached for p in ended) // each
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
                "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip


def _logprob(token: Chosen) -> dict[str, Any]:
    def one(text: str, p: float) -> dict[str, Any]:
        return {"token": text, "logprob": p, "bytes": list(text.encode("utf-8", "replace"))}

    return one(token.text, token.logprob) | {"top_logprobs": [one(text, p) for _, text, p in token.top]}


def _old_logprobs(tokens: Sequence[Chosen], offset: int) -> dict[str, Any]:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [t.text for t in tokens], "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [{text: p for _, text, p in t.top} for t in tokens], "text_offset": offsets,
    }  # fmt: skip
