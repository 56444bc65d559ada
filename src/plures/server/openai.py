"""OpenAI's API: models, chat completions and completions, each answered by the variant that `model` names."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from plures.engine.ask import BASE, Piece, Serving
from plures.flows.desk import Desk, as_model
from plures.server.answers import Answer, Asked, Prompt, asks_of, encode, prompts_of, text_of
from plures.server.errors import Refused, shape
from plures.server.job import Job, Mailbox
from plures.server.metrics import Metrics
from plures.server.routing import Router, Table
from plures.server.schemas import ChatRequest, CompletionRequest
from plures.store.access import Tenant

GONE = "the caller went away"
_LONG_TEXT = 20_000  # characters; longer prompts are encoded beside the event loop
_MOST_SUBMITS = 256  # at once, where they wait for another process
Body = TypeVar("Body", bound=BaseModel)
WhoAsks = Callable[[Request], Tenant]


def router(desk: Desk, serving: Serving, metrics: Metrics, who: WhoAsks,
           routes: Table = MappingProxyType({})) -> APIRouter:  # fmt: skip
    """The routes under /v1; `routes` are names that stand for several variants."""
    routed = Router(desk, serving, routes, metrics)
    made, dice = APIRouter(prefix="/v1"), random.Random()
    waiting = ThreadPoolExecutor(_MOST_SUBMITS, "plures-submit") if serving.waits else None

    @made.get("/models")
    def models(request: Request) -> dict[str, Any]:
        """The models that this key may name."""
        tenant = who(request)
        return {"object": "list", "data": [*desk.visible(tenant), *routed.visible(tenant)]}

    @made.get("/models/{model}")
    def model(model: str, request: Request) -> dict[str, Any]:
        """One model."""
        tenant = who(request)
        if model in routes and (seen := [m for m in routed.visible(tenant) if m["id"] == model]):
            return seen[0]
        target = desk.resolve(model, tenant)
        if target.identity == BASE:
            return next(m for m in desk.visible(tenant) if m["id"] == model)
        return as_model(model, desk.store.resolve(target.ref))

    async def begin(request: Request, asked: Asked, prompts: Sequence[Sequence[int]]) -> Job:
        mailbox = Mailbox()
        if asked.schema_text or waiting:  # compiling a large schema takes long enough to be noticed by everybody
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(waiting, put, request, asked, prompts, mailbox)
        return put(request, asked, prompts, mailbox)

    def put(request: Request, asked: Asked, prompts: Sequence[Sequence[int]], mailbox: Mailbox) -> Job:
        tenant = who(request)  # again: since the body began to come the key may have ended
        target = desk.resolve(asked.model, tenant, dice.random())
        answer = Answer.to(asked, len(prompts), target.ref, desk.store.base.hash)
        job = Job(serving, metrics, tenant, target, answer, mailbox, [], time.monotonic(), {})
        seed = dice.getrandbits(62)
        try:
            for at, ask in enumerate(asks_of(asked, prompts, tenant.name, target.identity, seed, serving.context)):
                job.tickets.append(serving.submit(ask, job.deliver_to(at)))
        except BaseException:
            job.cancel()
            raise
        return job

    async def answered(request: Request, form: type[ChatRequest] | type[CompletionRequest]) -> Any:
        tenant = who(request)
        asked = await parsed(request, form)
        prompts = [await _encoded(serving, prompt) for prompt in prompts_of(asked)]
        if asked.model in routes:
            asked = asked.model_copy(update={"model": await routed.choose(asked.model, tenant, prompts)})
        return await _answered(request, asked, await begin(request, asked, prompts))

    @made.post("/chat/completions", openapi_extra=described(ChatRequest))
    async def chat(request: Request) -> Any:
        """Answer a chat by the variant that `model` names."""
        return await answered(request, ChatRequest)

    @made.post("/completions", openapi_extra=described(CompletionRequest))
    async def complete(request: Request) -> Any:
        """Go on from a text by the variant that `model` names."""
        return await answered(request, CompletionRequest)

    return made


def described(body: type[BaseModel]) -> dict[str, Any]:
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


async def parsed(request: Request, body: type[Body]) -> Body:
    """The body as a model. Raises: RequestValidationError, told as 400."""
    try:
        raw = await request.body()
        return body.model_validate_json(raw)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from error
    except ClientDisconnect as error:
        raise Refused(499, GONE) from error


async def _encoded(serving: Serving, prompt: Prompt) -> list[int]:
    if len(text_of(prompt)) < _LONG_TEXT:
        return encode(serving, prompt)
    return await asyncio.to_thread(encode, serving, prompt)


async def _answered(request: Request, asked: Asked, job: Job) -> Any:
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


async def _whole(job: Job, first: list[tuple[int, Piece]], gone: asyncio.Future[None]) -> dict[str, Any]:
    """The answer in one object."""
    choices, taken, left = [list[Piece]() for _ in job.tickets], first, len(job.tickets)
    while True:
        for at, piece in taken:
            choices[at].append(piece)
            left -= bool(piece.finish)
            if piece.finish == "error":
                raise Refused(503, piece.error)
        if not left:
            break
        taken = await _take(job, gone)
    job.metrics.answered(job.tenant.name, job.started)
    return job.answer.whole(choices)


async def _stream(job: Job, first: list[tuple[int, Piece]], usage: bool) -> AsyncIterator[str]:
    """Server-sent events: one a piece, then the usage where it is wanted, then [DONE]."""
    answer, taken, ended = job.answer, first, list[Piece]()
    common = answer.common | {"object": "chat.completion.chunk" if answer.chat else "text_completion"}
    offsets = [0] * len(job.tickets)
    try:
        if answer.chat:
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
                    choice = answer.choice(at, piece.text, piece.tokens, piece.finish, whole=False, offset=offsets[at])
                    offsets[at] += len(piece.text)
                    yield _event(common | {"choices": [choice]})
                if piece.finish:
                    ended.append(piece)
            if len(ended) == len(job.tickets):
                break
            taken = await job.mailbox.take()
        if usage:
            yield _event(common | {"choices": [], "usage": answer.usage(ended)})
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
