"""OpenAI's API: models, chat completions and completions, each answered by the variant that `model` names."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from plures.core.errors import WrongUse
from plures.core.seeds import stream
from plures.engine.ask import BASE, Ask, Chosen, Piece, Sampling, Serving
from plures.flows.desk import Desk
from plures.server.errors import Refused, shape
from plures.server.job import Job, Mailbox
from plures.server.metrics import Metrics
from plures.server.schemas import ChatRequest, CompletionRequest
from plures.store.access import Tenant

DEFAULT_TOKENS = 512
"""New tokens of a chat answer that says no limit; with OpenAI's "as many as fit" one caller could hold a row long."""
OLD_DEFAULT_TOKENS = 16  # OpenAI's own, of a completion
GONE = "the caller went away"
_LONG_TEXT = 20_000  # characters; longer prompts are encoded beside the event loop
_TOKEN_CHARS = 256  # no tokenizer has longer tokens; 8 MB would take 10 s to encode and then not fit
_MOST_CHOICES = 128
Body = TypeVar("Body", bound=BaseModel)
WhoAsks = Callable[[Request], Tenant]


def router(desk: Desk, serving: Serving, metrics: Metrics, who: WhoAsks) -> APIRouter:
    """The routes under /v1."""
    made, dice = APIRouter(prefix="/v1"), random.Random()
    fingerprint = f"plures-{desk.store.base.hash[:12]}"

    @made.get("/models")
    def models(request: Request) -> dict[str, Any]:
        """The models that this key may name."""
        return {"object": "list", "data": desk.visible(who(request))}

    @made.get("/models/{model}")
    def model(model: str, request: Request) -> dict[str, Any]:
        """One model."""
        tenant = who(request)
        target = desk.resolve(model, tenant)
        if target.identity == BASE:
            return next(m for m in desk.visible(tenant) if m["id"] == model)
        found = desk.store.resolve(target.ref)
        created = int(datetime.fromisoformat(found.created).timestamp())
        return {"id": model, "object": "model", "created": created, "owned_by": "plures", "identity": found.identity,
                "method": found.method, "version": found.ref}  # fmt: skip

    async def begin(request: Request, asked: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]]) -> Job:
        mailbox = Mailbox()
        if len(prompts) * (asked.n or 1) > _MOST_CHOICES:
            raise WrongUse(f"{len(prompts)} prompts with n = {asked.n} are over {_MOST_CHOICES} answers in one request")
        if asked.schema_text:  # compiling a large schema takes long enough to be noticed by everybody
            return await asyncio.to_thread(put, request, asked, prompts, mailbox)
        return put(request, asked, prompts, mailbox)

    def put(
        request: Request, asked: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]], mailbox: Mailbox
    ) -> Job:
        tenant = who(request)
        target = desk.resolve(asked.model, tenant, dice.random())
        chat = isinstance(asked, ChatRequest)
        id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        job = Job(serving, metrics, tenant, target, chat, len(prompts), asked.wanted_logprobs, mailbox, [], id,
                  int(time.time()), fingerprint, time.monotonic(), {})  # fmt: skip
        seed = dice.getrandbits(62) if asked.seed is None else asked.seed
        try:
            for prompt in prompts:
                for choice in range(asked.n or 1):
                    mine = stream(seed, "choice", choice) if choice else seed  # seed + 1 is another request's
                    how = _sampling(asked, len(prompt), mine, serving.context)
                    at = len(job.tickets)
                    ask = Ask(tenant.name, target.identity, tuple(prompt), how)
                    job.tickets.append(serving.submit(ask, job.deliver_to(at)))
        except BaseException:
            job.cancel()
            raise
        return job

    @made.post("/chat/completions", openapi_extra=_described(ChatRequest))
    async def chat(request: Request) -> Any:
        """Answer a chat by the variant that `model` names."""
        who(request)
        asked = await _parsed(request, ChatRequest)
        messages = [m.plain() for m in asked.messages]
        tokens = await _encoded(serving, messages, sum(len(m["content"]) for m in messages))
        return await _answered(request, asked, await begin(request, asked, [tokens]))

    @made.post("/completions", openapi_extra=_described(CompletionRequest))
    async def complete(request: Request) -> Any:
        """Go on from a text by the variant that `model` names."""
        who(request)
        asked = await _parsed(request, CompletionRequest)
        prompts = [p if isinstance(p, list) else await _encoded(serving, p, len(p)) for p in asked.prompts()]
        return await _answered(request, asked, await begin(request, asked, prompts))

    return made


def _described(body: type[BaseModel]) -> dict[str, Any]:
    """A request's body for the OpenAPI page; it is parsed by hand so that no JSON can do harm."""
    schema = body.model_json_schema(ref_template="#/$defs/{model}")
    inlined = _inline(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined}}}}


def _inline(schema: Any, defs: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inline(s, defs) for s in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(defs[schema["$ref"].rpartition("/")[2]], defs)
    return {k: _inline(v, defs) for k, v in schema.items()}


async def _parsed(request: Request, body: type[Body]) -> Body:
    """The body as a model. Raises: RequestValidationError, told as 400."""
    try:
        raw = await request.body()
        return body.model_validate_json(raw)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from error
    except ClientDisconnect as error:
        raise Refused(499, GONE) from error


async def _encoded(serving: Serving, prompt: Any, size: int) -> list[int]:
    if size > _TOKEN_CHARS * serving.context:
        raise WrongUse(f"the prompt has {size} characters; they cannot fit the context of {serving.context} tokens")
    return serving.encode(prompt) if size < _LONG_TEXT else await asyncio.to_thread(serving.encode, prompt)


def _sampling(asked: ChatRequest | CompletionRequest, n_prompt: int, seed: int, context: int) -> Sampling:
    """How to answer, as the engine takes it.

    Raises: WrongUse for a prompt that fills the context, or a limit that does not fit beside it.
    """
    room = context - n_prompt
    if room < 1:
        raise WrongUse(f"the prompt has {n_prompt} tokens; the context is {context}, prompt and answer together")
    usual = DEFAULT_TOKENS if isinstance(asked, ChatRequest) else OLD_DEFAULT_TOKENS
    most = asked.most_tokens or min(usual, room)
    if most > room:
        raise WrongUse(f"max_tokens {most} does not fit: the prompt has {n_prompt} tokens and the context is {context}")
    temperature = 1.0 if asked.temperature is None else asked.temperature
    top_p = 1.0 if asked.top_p is None else asked.top_p
    return Sampling(
        most, temperature, top_p, seed, asked.stops, asked.wanted_logprobs, asked.schema_text, asked.ignore_eos
    )


async def _answered(request: Request, asked: ChatRequest | CompletionRequest, job: Job) -> Any:
    """The answer, whole or as a stream; its first piece decides whether there is one."""
    headers = {"x-plures-identity": job.target.identity or "base"}
    gone = asyncio.ensure_future(_gone(request))
    try:
        first = await _take(job, gone)
        broken = next((p for _, p in first if p.finish == "error"), None)
        if broken is not None:
            job.cancel()
            raise Refused(503, broken.error)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            headers["cache-control"] = "no-cache"
            return _Events(job, _stream(job, first, usage), headers)
        return JSONResponse(await _whole(job, first, gone), headers=headers)
    except BaseException:
        job.cancel()
        raise
    finally:
        gone.cancel()


async def _gone(request: Request) -> None:
    """Returns when the caller has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _take(job: Job, gone: asyncio.Future[None]) -> list[tuple[int, Piece]]:
    """The next pieces. Raises: Refused (nobody will read it) where the caller has gone."""
    taking = asyncio.ensure_future(job.mailbox.take())
    both: set[asyncio.Future[Any]] = {taking, gone}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not taking.done():
            taking.cancel()
    if not taking.done():
        raise Refused(499, GONE)
    return taking.result()


class _Choice:
    """One answer as it grows."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.tokens: list[Chosen] = []
        self.last: Piece | None = None

    def add(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.tokens.extend(piece.tokens)
        self.last = piece if piece.finish else self.last


async def _whole(job: Job, first: list[tuple[int, Piece]], gone: asyncio.Future[None]) -> dict[str, Any]:
    """The answer in one object."""
    choices, taken = [_Choice() for _ in job.tickets], first
    while True:
        for at, piece in taken:
            choices[at].add(piece)
            if piece.finish == "error":
                raise Refused(503, piece.error)
        if all(c.last for c in choices):
            break
        taken = await _take(job, gone)
    told = [_told(job, at, "".join(c.text), c.tokens, c.last.finish if c.last else "stop", whole=True)
            for at, c in enumerate(choices)]  # fmt: skip
    job.metrics.answered(job.tenant.name, job.started)
    kind = "chat.completion" if job.chat else "text_completion"
    return job.common | {"object": kind, "choices": told, "usage": _usage(job, [c.last for c in choices if c.last])}


async def _stream(job: Job, first: list[tuple[int, Piece]], usage: bool) -> AsyncIterator[str]:
    """Server-sent events: one a piece, then the usage where it is wanted, then [DONE]."""
    kind = "chat.completion.chunk" if job.chat else "text_completion"
    common, taken, ended = job.common | {"object": kind}, first, list[Piece]()
    offsets = [0] * len(job.tickets)
    try:
        if job.chat:
            for at in range(len(job.tickets)):
                delta = {"role": "assistant", "content": ""}
                start = {"index": at, "delta": delta, "finish_reason": None, "logprobs": None}
                yield _event(common | {"choices": [start]})
        while True:
            for at, piece in _joined(taken):
                if piece.finish == "error":
                    yield _event(shape(piece.error, "service_unavailable_error"))
                    return
                if piece.text or piece.tokens or piece.finish:
                    choice = _told(job, at, piece.text, piece.tokens, piece.finish, whole=False, offset=offsets[at])
                    offsets[at] += len(piece.text)
                    yield _event(common | {"choices": [choice]})
                if piece.finish:
                    ended.append(piece)
            if len(ended) == len(job.tickets):
                break
            taken = await job.mailbox.take()
        if usage:
            yield _event(common | {"choices": [], "usage": _usage(job, ended)})
        job.metrics.answered(job.tenant.name, job.started)
        yield "data: [DONE]\n\n"
    finally:
        job.cancel()  # what has ended is not touched by it; a caller that went away frees its rows


class _Events(StreamingResponse):
    """Server-sent events whose rows are freed however they end, even before the first is sent."""

    def __init__(self, job: Job, events: AsyncIterator[str], headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


def _joined(taken: list[tuple[int, Piece]]) -> list[tuple[int, Piece]]:
    """Pieces that came while nobody took them, those of a choice in one: a slow reader gets fewer, longer events."""
    by_choice: dict[int, list[Piece]] = {}
    for at, piece in taken:
        by_choice.setdefault(at, []).append(piece)
    return [(at, pieces[0] if len(pieces) == 1 else _one(pieces)) for at, pieces in by_choice.items()]


def _one(pieces: list[Piece]) -> Piece:
    ids = tuple(i for p in pieces for i in p.ids)
    tokens = tuple(t for p in pieces for t in p.tokens)
    return replace(pieces[-1], ids=ids, text="".join(p.text for p in pieces), tokens=tokens)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _told(
    job: Job, at: int, text: str, tokens: Sequence[Chosen], finish: str, *, whole: bool, offset: int = 0
) -> dict[str, Any]:
    """One choice, or one chunk of it."""
    said: dict[str, Any] = {"index": at, "finish_reason": finish or None}
    if not job.chat:
        return said | {"text": text, "logprobs": _old_logprobs(tokens, offset) if job.logprobs is not None else None}
    logprobs = {"content": [_logprob(t) for t in tokens], "refusal": None} if job.logprobs is not None else None
    if whole:
        return said | {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logprobs}
    return said | {"delta": {"content": text} if text else {}, "logprobs": logprobs}


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


def _usage(job: Job, ended: Sequence[Piece]) -> dict[str, Any]:
    """Tokens: each prompt counted once, however many answers it has."""
    each = max(1, len(job.tickets) // job.n_prompts)
    prompt = sum(p.n_prompt for p in ended) // each
    new = sum(p.n_new for p in ended)
    cached = sum(p.n_cached for p in ended) // each
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip
