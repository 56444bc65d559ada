"""The public app: who may come in, how large a request may be, health, metrics, the status page, and OpenAI's API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

import plures
from plures.core.errors import PluresError
from plures.engine.ask import Serving
from plures.flows.batch_run import Runner
from plures.flows.desk import Desk
from plures.server import batches, openai, page
from plures.server.batch_form import make_runner
from plures.server.errors import Refused, install, public, shape
from plures.server.loopback import LOOPBACK
from plures.server.metrics import Metrics
from plures.server.routing import Table
from plures.store.access import Key, Tenant

MAX_BODY_BYTES = 8 << 20
EVERYBODY = Tenant("everybody")
BODY_S = 60.0
_OWN = "script-src 'self'; style-src 'self'; connect-src 'self'"
_CSP = f"default-src 'none'; {_OWN}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Edge:
    """The outermost ASGI layer: refuses a body of more than `most` bytes as soon as that is known, and counts refusals.

    A length that is declared is believed where it is too large; else the bytes are counted as they come. `other` has
    the paths whose bodies have another bound. A body of which nothing comes for `BODY_S` is given up.
    """

    def __init__(
        self, app: ASGIApp, most: int, refused: Callable[[str, int], None], other: Mapping[str, int] | None = None
    ) -> None:
        self.app, self.most, self.refused, self.other = app, most, refused, other or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = self.other.get(scope["path"], self.most)
        seen, whole, said = 0, False, f"the request is larger than {most} bytes"

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen, whole
            try:
                message = await asyncio.wait_for(receive(), None if whole else BODY_S)
            except TimeoutError:
                why = f"nothing of the body came for {BODY_S:g} s"
                raise Refused(408, why, "timeout", headers={"connection": "close"}) from None
            whole = not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > most:
                raise Refused(413, said, "too_large", headers={"connection": "close"})
            return message

        async def noted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
                if message["status"] >= 400 and scope["path"].startswith("/v1/"):
                    self.refused(scope.get("plures.tenant", "unknown"), message["status"])
            await send(message)

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > 18 or int(declared) > most:
            body = shape(said, "invalid_request_error", "too_large")
            await JSONResponse(body, 413, {"connection": "close"})(scope, receive, noted)
            return
        await self.app(scope, counted, noted)


class FromHere:
    """Refuses what a browser sends for another site: serving without keys is for this machine's own programs.

    A page from anywhere may let its reader's browser ask a server on the loopback, and, where its name is made to mean
    127.0.0.1, read the answers. The Host that is asked and the page's Origin tell it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = dict(scope["headers"]) if scope["type"] == "http" else {}
        asked = [b + sent[h] for b, h in ((b"//", b"host"), (b"", b"origin")) if h in sent]
        if all(map(_is_loopback, asked)):
            await self.app(scope, receive, send)
            return
        said = "open serving (no keys) answers to localhost alone, and to no page of another site; serve with keys"
        await JSONResponse(shape(said, "permission_error", "not_local"), 403)(scope, receive, send)


def _is_loopback(place: bytes) -> bool:
    try:
        return urlsplit(place.decode("latin-1")).hostname in LOOPBACK
    except ValueError:
        return False


class Keys:
    """Who asks, by the key in the header; with `open`, everybody and everything."""

    def __init__(self, desk: Desk, open: bool) -> None:
        self.desk, self.open = desk, open

    def key(self, request: Request) -> Key:
        """The key of a request. Raises: Refused (401) where there is none, or none that lives."""
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise Refused(401, "no key: send the header Authorization: Bearer pl-…", "missing_api_key")
        found = self.desk.access.who(secret.strip())
        if found is None:
            raise Refused(401, "this key is not known, or has been revoked", "invalid_api_key")
        return found

    def tenant(self, request: Request) -> Tenant:
        """The tenant of a request. Raises: Refused."""
        tenant = EVERYBODY
        if not self.open:
            key = self.key(request)
            if key.kind != "user":
                raise Refused(401, "an admin key asks no models; use a tenant's key", "invalid_api_key")
            tenant = self.desk.access.tenant(key.tenant)
        request.scope["plures.tenant"] = tenant.name
        return tenant


def make_app(
    desk: Desk, serving: Serving, *, open: bool = False, max_body_bytes: int = MAX_BODY_BYTES,
    max_file_bytes: int = batches.MAX_FILE_BYTES, runner: Runner | None = None, routes: Table = MappingProxyType({}),
) -> Any:  # fmt: skip
    """The public ASGI app over a fleet's desk and an engine; `runner` runs its batches, once it is started, and
    `routes` are names that stand for several variants."""
    app = FastAPI(title="Plures", version=plures.__version__, docs_url=None, redoc_url=None)
    install(app)
    keys, metrics = Keys(desk, open), Metrics(serving)
    app.include_router(openai.router(desk, serving, metrics, keys.tenant, routes))
    runner = runner or make_runner(desk, serving, EVERYBODY if open else None)
    runner.by.spent = metrics.spent
    app.include_router(batches.router(runner, keys.tenant))

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        """The process is up."""
        return {"status": "ok"}

    @app.get("/readyz")
    def readyz() -> JSONResponse:
        """Requests would be answered: the engine runs and the store can be read."""
        why = "" if serving.alive else "the engine does not run"
        if not why:
            try:
                desk.store.names()
                desk.access.pins()
            except PluresError as error:
                why = public(error)
        if why:
            return JSONResponse({"status": "not ready", "reason": why}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    def prometheus(request: Request) -> Response:
        """Metrics as Prometheus reads them; they name tenants and variants, so they need an admin key."""
        if not open and keys.key(request).kind != "admin":
            raise Refused(403, "metrics need an admin key: plures key --admin", "not_admin")
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse)
    def index() -> HTMLResponse:
        """The status page; it asks for a key where one is needed."""
        return HTMLResponse(page.HTML, headers={"content-security-policy": _CSP})

    @app.get("/status.js")
    def script() -> Response:
        """What fills the page."""
        return Response(page.SCRIPT, media_type="text/javascript")

    @app.get("/status.css")
    def style() -> Response:
        """How it looks."""
        return Response(page.STYLE, media_type="text/css")

    @app.get("/status.json")
    def status(request: Request) -> Response:
        """What goes on; to a tenant, of its own variants and queue alone."""
        key = None if open else keys.key(request)
        everything = key is None or key.kind == "admin"
        tenant = EVERYBODY if key is None or everything else desk.access.tenant(key.tenant)
        return Response(json.dumps(page.status(desk, serving, tenant, everything)), media_type="application/json")

    return Edge(app, max_body_bytes, metrics.refused, {"/v1/files": max_file_bytes})
