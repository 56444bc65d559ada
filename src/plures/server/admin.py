"""The administration, on a port of its own: publish, roll back, canary, pin, remove, upload, tenants, keys, the log.

Every route needs an admin key. What an upload may hold is fixed: three file names, no folders, safetensors only.
"""

import asyncio
import io
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

import plures
from plures.core.errors import BadInput, disk
from plures.engine.ask import Serving
from plures.flows.desk import Desk
from plures.server.app import MAX_BODY_BYTES, Edge, Keys
from plures.server.errors import Refused, install
from plures.store.access import Key, Tenant
from plures.store.names import check_name, shown

MAX_UPLOAD_BYTES = 2 << 30
FILES = {"adapter_config.json": 1 << 20, "plures.json": 64 << 20, "README.md": 1 << 20}
WEIGHTS = "adapter_model.safetensors"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Pointing(_Body):
    """Which version an alias points at."""

    version: Annotated[int, Field(ge=1, lt=10**9)]


class CanaryBody(_Body):
    """Which version answers which share of the requests."""

    version: Annotated[int, Field(ge=1, lt=10**9)]
    share: Annotated[float, Field(ge=0, le=1)]


class PinBody(_Body):
    """What stays resident."""

    ref: Annotated[str, Field(max_length=300)]


class TenantBody(_Body):
    """What a tenant may do; see `plures.store.access.Tenant`."""

    variants: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=1000)] = ["*"]
    base: bool = True
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    concurrency: Annotated[int, Field(ge=0, le=10**6)] = 0
    rate: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    tokens_per_minute: Annotated[float, Field(ge=0, le=1e12)] = 0.0


class KeyBody(_Body):
    """A key to be made."""

    tenant: Annotated[str, Field(max_length=128)] = ""
    admin: bool = False
    note: Annotated[str, Field(max_length=1000)] = ""


def make_admin(desk: Desk, serving: Serving, *, max_upload_bytes: int = MAX_UPLOAD_BYTES) -> Any:
    """The ASGI app of the administration."""
    app = FastAPI(title="Plures administration", version=plures.__version__, docs_url=None, redoc_url=None)
    install(app)
    keys = Keys(desk, open=False)

    def admin(request: Request) -> str:
        """Who administers, as the log names it: the id of an admin key."""
        key = keys.key(request)
        if key.kind != "admin":
            raise Refused(403, "this needs an admin key: plures key --admin", "not_admin")
        return f"key {key.id}"

    by = Annotated[str, Depends(admin)]
    app.include_router(_variants(desk, by, max_upload_bytes))
    app.include_router(_people(desk, serving, by))
    upload, other = (Edge(app, most, lambda *_: None) for most in (max_upload_bytes, MAX_BODY_BYTES))

    async def edge(scope: Scope, receive: Receive, send: Send) -> None:
        """Bodies of JSON are read whole, before the key is looked at: only an upload, which is not, may be large."""
        uploads = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/versions")
        await (upload if uploads else other)(scope, receive, send)

    return edge


def _variants(desk: Desk, by: Any, max_upload_bytes: int) -> APIRouter:
    made = APIRouter(prefix="/admin")

    @made.get("/variants")
    def variants(who: by) -> dict[str, Any]:
        """The latest version of every name."""
        return {"variants": [_version(v) for v in desk.store.versions()]}

    @made.get("/variants/{name}/versions")
    def versions(name: str, who: by) -> dict[str, Any]:
        """Every version of a name, the oldest first."""
        return {"versions": [_version(v) for v in desk.store.versions(name, all=True)]}

    @made.post("/variants/{name}/versions", status_code=201, openapi_extra={
        "requestBody": {"content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}}}
    })  # fmt: skip
    async def upload(name: str, request: Request, who: by) -> dict[str, Any]:
        """Import a zip of adapter_config.json and adapter_model.safetensors (and plures.json) as the next version."""
        check_name(name)  # before the body comes
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "upload.zip"
            with path.open("wb") as f:
                async for part in request.stream():
                    with disk(path):
                        f.write(part)
            folder = Path(scratch) / "adapter"
            await asyncio.to_thread(unzip, path, folder, max_upload_bytes)
            return await asyncio.to_thread(desk.upload, folder, name, who)

    @made.post("/variants/{name}/aliases/{alias}")
    def point(name: str, alias: str, body: Pointing, who: by) -> dict[str, Any]:
        """Publish: the alias points at this version from now on."""
        return desk.point(f"{name}@{body.version}", alias, who)

    @made.post("/variants/{name}/aliases/{alias}/rollback")
    def roll_back(name: str, alias: str, who: by) -> dict[str, Any]:
        """The alias points again at what it pointed at before."""
        return desk.roll_back(name, alias, who)

    @made.put("/variants/{name}/aliases/{alias}/canary")
    def canary(name: str, alias: str, body: CanaryBody, who: by) -> dict[str, Any]:
        """Send a share of the alias's requests to a version; the alias "latest" means the bare name."""
        return desk.canary(name, _bare(alias), body.version, body.share, who)

    @made.delete("/variants/{name}/aliases/{alias}/canary", status_code=204)
    def end_canary(name: str, alias: str, who: by) -> None:
        """End it."""
        desk.end_canary(name, _bare(alias), who)

    @made.delete("/variants/{name}/versions/{version}")
    def remove(name: str, version: int, who: by, force: bool = False) -> dict[str, Any]:
        """Remove a version; requests in flight are answered still."""
        return {"removed": desk.remove(f"{name}@{version}", who, force)}

    @made.get("/canaries")
    def canaries(who: by) -> dict[str, Any]:
        """All canaries."""
        return {"canaries": [vars(c) for c in desk.access.canaries()]}

    @made.get("/pins")
    def pins(who: by) -> dict[str, Any]:
        """What stays resident."""
        return {"pins": desk.access.pins()}

    @made.put("/pins", status_code=204)
    def pin(body: PinBody, who: by) -> None:
        """Keep what a reference means resident."""
        desk.pin(body.ref, who)

    @made.delete("/pins", status_code=204)
    def unpin(body: PinBody, who: by) -> None:
        """Let it go."""
        desk.unpin(body.ref, who)

    return made


def _people(desk: Desk, serving: Serving, by: Any) -> APIRouter:
    made, access = APIRouter(prefix="/admin"), desk.access

    @made.get("/tenants")
    def tenants(who: by) -> dict[str, Any]:
        """All tenants."""
        return {"tenants": [vars(t) for t in access.tenants()]}

    @made.put("/tenants/{name}")
    def put_tenant(name: str, body: TenantBody, who: by) -> dict[str, Any]:
        """Make a tenant, or set all of what it may."""
        said = body.model_dump()
        tenant = Tenant(name, tuple(said.pop("variants")), **said)
        access.put_tenant(tenant, who)
        return vars(tenant)

    @made.delete("/tenants/{name}", status_code=204)
    def remove_tenant(name: str, who: by, force: bool = False) -> None:
        """Remove a tenant; with force, its live keys are revoked."""
        if name not in {t.name for t in access.tenants()}:
            raise Refused(404, f"no tenant {shown(name)}", "tenant_not_found")
        access.remove_tenant(name, who, force)

    @made.get("/keys")
    def list_keys(who: by) -> dict[str, Any]:
        """All keys, without their secrets."""
        return {"keys": list(map(_key, desk.access.keys()))}

    @made.post("/keys", status_code=201)
    def make_key(body: KeyBody, who: by) -> dict[str, Any]:
        """Make a key; its secret is in this answer and nowhere else."""
        key, secret = access.make_key(body.tenant, who, admin=body.admin, note=body.note)
        return _key(key) | {"secret": secret}

    @made.delete("/keys/{id}", status_code=204)
    def revoke(id: str, who: by) -> None:
        """End a key."""
        access.revoke(id, who)

    @made.get("/audit")
    def audit(who: by, limit: Annotated[int, Field(ge=1, le=1000)] = 100, before: int | None = None) -> dict[str, Any]:
        """The log of changes, the newest first."""
        return {"log": access.log(limit, before)}

    @made.get("/state")
    def state(who: by) -> dict[str, Any]:
        """What the engine does."""
        return serving.state().as_json()

    return made


def unzip(path: Path, folder: Path, most_bytes: int) -> None:
    """Unpack an uploaded adapter into `folder`: known names only, no folders, no more bytes than allowed.

    Raises: BadInput for anything else in it, a damaged archive, or one that unpacks to more than it may.
    """
    folder.mkdir()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [e.filename for e in entries]
            strange = [n for n in names if n != WEIGHTS and n not in FILES]
            if strange or len(set(names)) != len(names):
                raise BadInput(f"an upload holds {WEIGHTS}, {', '.join(FILES)} once each and nothing else, "
                               f"got {str(strange or names)[:200]}")  # fmt: skip
            if WEIGHTS not in names or "adapter_config.json" not in names:
                raise BadInput(f"an upload needs adapter_config.json and {WEIGHTS}, got {str(names)[:200]}")
            if any(e.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for e in entries):
                raise BadInput("an upload is stored or deflated; the other ways of packing take memory as they say")
            for entry in entries:
                _take(archive, entry, folder / entry.filename, FILES.get(entry.filename, most_bytes))
    except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError, OSError,
            ValueError, OverflowError) as error:  # what zipfile raises, by what is damaged
        raise BadInput(f"the upload is not a zip file that can be read: {error}") from error


def _take(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, most: int) -> None:
    """Unpack one entry, its bytes counted as they come: a declared size is only a claim."""
    if entry.file_size > most:
        raise BadInput(f"{entry.filename!r} would unpack to {entry.file_size} bytes; at most {most} are taken")
    left = most
    with archive.open(entry) as source, target.open("wb") as out:
        while block := source.read(min(io.DEFAULT_BUFFER_SIZE * 16, left + 1)):
            left -= len(block)
            if left < 0:
                raise BadInput(f"{entry.filename!r} unpacks to more than {most} bytes")
            with disk(target):
                out.write(block)


def _bare(alias: str) -> str:
    return "" if alias == "latest" else alias


def _version(v: Any) -> dict[str, Any]:
    return {
        "ref": v.ref, "name": v.name, "version": v.version, "identity": v.identity, "method": v.method,
        "created": v.created, "bytes": v.n_bytes, "trained": v.trained, "aliases": v.aliases, "note": v.note,
    }  # fmt: skip


def _key(key: Key) -> dict[str, Any]:
    return dict(vars(key))
