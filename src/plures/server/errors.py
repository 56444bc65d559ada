"""Errors over HTTP, in OpenAI's shape: what status each error of ours has, and one body for all."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from plures.core.errors import BadInput, DiskTrouble, MissingExtra, PluresError, StoreBusy, Unreachable, WrongUse
from plures.engine.ask import Overloaded, Unavailable
from plures.flows.batch_disk import Missing
from plures.flows.desk import NotFound

_STATUS: tuple[tuple[type[PluresError], int, str], ...] = (
    (Overloaded, 429, "rate_limit_error"),
    (MissingExtra, 501, "server_error"),
    (Unavailable, 503, "service_unavailable_error"),
    (NotFound, 404, "not_found_error"),
    (Missing, 404, "not_found_error"),
    (WrongUse, 400, "invalid_request_error"),
    (StoreBusy, 409, "conflict_error"),
    (DiskTrouble, 507, "server_error"),
    (Unreachable, 502, "server_error"),
    (BadInput, 422, "invalid_request_error"),
)
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 405: "invalid_request_error",
          413: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error"}  # fmt: skip


_PATH = re.compile(r"'(/[^']*)'")


class Refused(HTTPException):
    """A refusal with an OpenAI code, such as "invalid_api_key"."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.code, self.param = code, param


def status_of(error: PluresError) -> int:
    """The HTTP status of an error of ours; 500 for what is our bug."""
    return next((status for kind, status, _ in _STATUS if isinstance(error, kind)), 500)


def body_of(error: PluresError) -> dict[str, Any]:
    """The body of an error of ours."""
    kind = next((kind for known, _, kind in _STATUS if isinstance(error, known)), "server_error")
    code = "model_not_found" if isinstance(error, NotFound) else None
    return shape(public(error), kind, code, "model" if code else None)


def public(error: PluresError) -> str:
    """The text of an error for callers: of the server's own paths they see the last name."""
    if isinstance(error, (WrongUse, NotFound)):  # what is quoted there is the caller's
        return str(error)
    return _PATH.sub(lambda found: f"'{found[1].rpartition('/')[2]}'", str(error))


def shape(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid_body(errors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The body for a request that pydantic finds these errors in."""
    first = max(errors, key=lambda e: len(e["loc"]))  # of the forms a value may have, the nearest one
    where = ".".join(str(part) for part in first["loc"] if part != "body") or None
    message = f"{where}: {first['msg']}" if where else str(first["msg"])
    return shape(_plain(message), "invalid_request_error", None, where and _plain(where))


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to come back, in whole seconds."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def install(app: FastAPI) -> None:
    """Answer every error of `app` in this shape; what is unexpected says nothing of what went on inside."""

    @app.exception_handler(PluresError)
    async def ours(request: Request, error: PluresError) -> JSONResponse:
        headers = retry_after(error.retry_after_s) if isinstance(error, Overloaded) else None
        return JSONResponse(body_of(error), status_of(error), headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(invalid_body(error.errors()), 400)

    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: StarletteHTTPException) -> JSONResponse:
        kind = _TYPES.get(error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error")
        code, param = getattr(error, "code", None), getattr(error, "param", None)
        return JSONResponse(shape(str(error.detail), kind, code, param), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(shape("internal error; the server's log has it", "server_error"), 500)


def _plain(text: str) -> str:
    """Text that can be sent: lone surrogates in what a caller wrote would not encode."""
    return text.encode("utf-8", "replace").decode()[:1000]
