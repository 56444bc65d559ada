"""OpenAI's files and batches: upload requests, have them answered when there is room, fetch the answers."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect

from plures.core.errors import BadInput, DiskTrouble, WrongUse, disk
from plures.flows.batch_run import Runner
from plures.flows.batches import Batch, File
from plures.server.errors import Refused
from plures.server.openai import GONE, WhoAsks, described, parsed
from plures.store.names import shown

MAX_FILE_BYTES = 200 << 20
"""Of a request that uploads a file, which goes to the disk as it comes."""
_FIELDS, _FIELD_BYTES, _CHUNK = 8, 1024, 1 << 20
_TIMES = ("created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at",
          "cancelling_at", "cancelled_at")  # fmt: skip
_UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object", "required": ["file", "purpose"], "additionalProperties": False,
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": ["batch"]}},
}}}}}  # fmt: skip
_BYTES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}
Text = Annotated[str, Field(max_length=512)]
After = Annotated[str, Query(max_length=100)]
Kept = TypeVar("Kept", File, Batch)


class BatchRequest(BaseModel):
    """POST /v1/batches."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    input_file_id: Annotated[str, Field(max_length=100)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"]
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Text], Field(max_length=16)] | None = None


def router(runner: Runner, who: WhoAsks) -> APIRouter:
    """The routes under /v1; what they make is run by `runner`, once it is started."""
    made, store = APIRouter(prefix="/v1"), runner.store

    @made.post("/files", openapi_extra=_UPLOAD)
    async def upload(request: Request) -> dict[str, Any]:
        """Keep a file of requests."""
        tenant = who(request)
        form = await _form(request)
        try:
            file = _file_of(form)
            file.file.seek(0)
            chunks = iter(lambda: file.file.read(_CHUNK), b"")
            return _file(await asyncio.to_thread(store.put, tenant.name, file.filename or "", "batch", chunks))
        finally:
            await form.close()

    @made.get("/files")
    def files(
        request: Request, purpose: Annotated[str, Query(max_length=100)] = "", after: After = "",
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000, order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:  # fmt: skip
        """The files, the newest first."""
        found = [f for f in store.files(who(request).name) if purpose in ("", f.purpose)]
        return _page(found if order == "desc" else found[::-1], after, limit, _file)

    @made.get("/files/{file_id}")
    def file(file_id: str, request: Request) -> dict[str, Any]:
        """One file."""
        return _file(store.file(who(request).name, file_id))

    @made.get("/files/{file_id}/content", response_class=StreamingResponse, responses=_BYTES)
    def content(file_id: str, request: Request) -> StreamingResponse:
        """What is in it."""
        opened = store.open(who(request).name, file_id)
        headers = {"content-length": str(os.fstat(opened.fileno()).st_size),
                   "content-disposition": f'attachment; filename="{file_id}.jsonl"'}  # fmt: skip
        return StreamingResponse(_read(opened), media_type="application/octet-stream", headers=headers)

    @made.delete("/files/{file_id}")
    def delete(file_id: str, request: Request) -> dict[str, Any]:
        """Delete a file, unless a batch reads it."""
        store.remove(who(request).name, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    @made.post("/batches", openapi_extra=described(BatchRequest))
    async def create(request: Request) -> dict[str, Any]:
        """Have the requests of a file answered."""
        tenant = who(request).name
        asked = await parsed(request, BatchRequest)
        batch = await asyncio.to_thread(
            store.make, tenant, asked.endpoint, asked.input_file_id, asked.completion_window, asked.metadata
        )
        runner.wake()
        return _batch(batch)

    @made.get("/batches")
    def batches(request: Request, after: After = "", limit: Annotated[int, Query(ge=1, le=100)] = 20) -> dict[str, Any]:
        """The batches, the newest first."""
        return _page(store.batches(who(request).name), after, limit, told)

    @made.get("/batches/{batch_id}")
    def batch(batch_id: str, request: Request) -> dict[str, Any]:
        """One batch."""
        return told(store.batch(who(request).name, batch_id))

    @made.post("/batches/{batch_id}/cancel")
    def cancel(batch_id: str, request: Request) -> dict[str, Any]:
        """End a batch; what was answered until then is in its files."""
        cancelled = store.cancel(who(request).name, batch_id)
        runner.wake()
        return told(cancelled)

    def told(batch: Batch) -> dict[str, Any]:
        return _batch(batch, runner.why(batch))

    return made


async def _form(request: Request) -> FormData:
    """The form of an upload, its file on the disk where it is large. Raises: WrongUse, DiskTrouble, Refused."""
    kind, _, more = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "multipart/form-data" or "charset" in more.lower():
        raise WrongUse(f"a file comes as multipart/form-data in UTF-8, got {shown(kind)}")
    try:
        with disk(tempfile.gettempdir()):
            return await request.form(max_files=1, max_fields=_FIELDS, max_part_size=_FIELD_BYTES)
    except ClientDisconnect as error:
        raise Refused(499, GONE) from error
    except BadInput as error:
        raise DiskTrouble("the server has no room for an upload of this size now; nothing was kept") from error


def _file_of(form: FormData) -> UploadFile:
    """The file of a form with nothing else than its purpose. Raises: WrongUse."""
    said = form.multi_items()
    for name in ("file", "purpose"):
        if [key for key, _ in said].count(name) != 1:
            raise WrongUse(f"an upload has one field {name!r}")
    for name, _ in said:
        if name not in ("file", "purpose"):
            raise WrongUse(f"{shown(name)} is not supported here; leave it out")
    file, purpose = form["file"], form["purpose"]
    if not isinstance(file, UploadFile):
        raise WrongUse("'file' must be a file, with a file name")
    if purpose != "batch":
        raise WrongUse(f"purpose must be 'batch', got {shown(purpose)}")
    return file


def _read(opened: IO[bytes]) -> Iterator[bytes]:
    with opened:
        while chunk := opened.read(_CHUNK):
            yield chunk


def _page(found: Sequence[Kept], after: str, limit: int, told: Callable[[Kept], dict[str, Any]]) -> dict[str, Any]:
    """A page of a list. Raises: WrongUse where there is no `after` in it."""
    start = 0
    if after:
        start = next((at + 1 for at, one in enumerate(found) if one.id == after), 0)
        if not start:
            raise WrongUse(f"after: there is no {shown(after)} in this list")
    page = found[start : start + limit]
    ends = {"first_id": page[0].id if page else None, "last_id": page[-1].id if page else None}
    return {"object": "list", "data": [told(one) for one in page], "has_more": start + limit < len(found)} | ends


def _file(file: File) -> dict[str, Any]:
    return {"id": file.id, "object": "file", "bytes": file.n_bytes, "created_at": file.made_ns // 10**9,
            "filename": file.filename, "purpose": file.purpose, "status": "processed", "expires_at": None}  # fmt: skip


def _batch(batch: Batch, paused: str = "") -> dict[str, Any]:
    times = {**batch.times, "created_at": batch.made_ns // 10**9}
    errors: list[Any] = [{**e, "param": None} for e in batch.errors]
    if paused:
        errors = [{"code": "paused", "message": f"{paused}; it goes on by itself", "line": None, "param": None}]
    ended = batch.status in ("completed", "cancelled")
    return {
        "id": batch.id, "object": "batch", "endpoint": batch.endpoint, "input_file_id": batch.input,
        "completion_window": batch.window, "status": batch.status, "metadata": batch.metadata,
        "errors": {"object": "list", "data": errors} if errors else None,
        "output_file_id": batch.output if ended and batch.completed else None,
        "error_file_id": batch.error if ended and batch.failed else None,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
    } | {name: times.get(name) for name in _TIMES}  # fmt: skip
