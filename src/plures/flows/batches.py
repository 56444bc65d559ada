"""The files and batches of a fleet's tenants on the disk, in `<fleet>/batches/<tenant>/`.

A file is `<id>` with `<id>.json` beside it, a batch `<id>.json`, with `<id>.part` (the answers so far) and, where its
end was asked for, `<id>.cancel` while it is not finished. Every file but the part is written whole or not at all. A
batch's JSON is written by who makes it, and from then on only by the process that holds its part.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from plures.core.errors import BadInput, WrongUse, disk
from plures.flows.batch_disk import Folders, InUse, Kind, Missing, names, plainly
from plures.tensors.safe import write_bytes, write_chunks

__all__ = ["Batch", "Batches", "File", "InUse", "Missing"]
FOLDER = "batches"
FINISHED = frozenset({"completed", "failed", "cancelled"})
STALE_S = 86_400.0  # what an upload that was cut short left is cleared away after a day
_FILE, _BATCH = Kind("file", "file-"), Kind("batch", "batch_")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


@dataclass(frozen=True)
class File:
    """One file; `made_ns` is when, in nanoseconds since 1970."""

    id: str
    filename: str
    purpose: str
    n_bytes: int
    made_ns: int


@dataclass(frozen=True)
class Batch:
    """One batch, with the status values and the names of `times` (in Unix seconds) that OpenAI's API has.

    `output` and `error` are the ids that its files will have: each is there once it is finished, if it holds a line.
    `errors` is what is wrong with its input: {"code", "message", "line"} each.
    """

    id: str
    tenant: str
    endpoint: str
    input: str
    window: str
    metadata: Mapping[str, str] | None
    made_ns: int
    output: str
    error: str
    status: str = "validating"
    times: Mapping[str, int] = field(default_factory=dict)
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether nothing more happens to it."""
        return self.status in FINISHED

    def now(self, status: str) -> Batch:
        """The batch with this status from now on."""
        return replace(self, status=status, times={**self.times, f"{status}_at": int(time.time())})


class Batches:
    """Every tenant's files and batches. Every method may be called from any thread, and in several processes."""

    def __init__(self, fleet: Path) -> None:
        self._folders = Folders(fleet / FOLDER)
        self._over: set[str] = set()  # batches that are finished: they need not be read again to know it

    # ---------------------------------------------------------------- files

    def put(self, tenant: str, filename: str, purpose: str, chunks: Iterable[bytes], id: str = "") -> File:
        """Keep a file; its name is only told, never used. With an `id` it takes the place of the file of this id.

        Raises: WrongUse for an empty file; DiskTrouble.
        """
        id = id or f"file-{uuid.uuid4().hex}"
        name = filename.encode("utf-8", "replace").decode().replace("\0", "")[:256]
        with plainly():
            path = self._folders.home(tenant) / id
            n_bytes = write_chunks(path, chunks)
            if not n_bytes:
                path.unlink()
                raise WrongUse("the file is empty")
            made = File(id, name, purpose, n_bytes, time.time_ns())
            self._folders.write(tenant, made)
        return made

    def file(self, tenant: str, id: str) -> File:
        """One file. Raises: Missing."""
        with plainly():
            return self._folders.one(tenant, id, _FILE, File)

    def files(self, tenant: str) -> list[File]:
        """A tenant's files, the newest first. Raises: DiskTrouble."""
        with plainly(), disk(self._folders.root / tenant, "read"):
            return self._folders.all(tenant, _FILE, File)

    def open(self, tenant: str, id: str) -> IO[bytes]:
        """The bytes of a file, which stay readable though it be deleted. Raises: Missing."""
        self.file(tenant, id)
        try:
            return self.bytes_of(tenant, id).open("rb")
        except FileNotFoundError:
            raise _FILE.missing(id) from None

    def bytes_of(self, tenant: str, id: str) -> Path:
        """Where the bytes of a file are."""
        return self._folders.root / tenant / id

    def remove(self, tenant: str, id: str) -> None:
        """Delete a file. Raises: Missing; InUse while a batch reads it."""
        with plainly():
            self.file(tenant, id)
            with self._folders.turn(tenant):
                for batch in self.batches(tenant):
                    if batch.input == id and not batch.finished:
                        raise InUse(
                            f"the batch {batch.id} reads this file; cancel it first, or wait until it has ended"
                        )
                path = self.bytes_of(tenant, id)
                for gone in (path.with_name(f"{id}.json"), path):
                    with disk(gone, "delete"):
                        gone.unlink(missing_ok=True)

    # ---------------------------------------------------------------- batches

    def make(self, tenant: str, endpoint: str, input: str, window: str, metadata: Mapping[str, str] | None) -> Batch:
        """A new batch over a file. Raises: Missing; WrongUse where the file is no input; DiskTrouble."""
        id, output, error = f"batch_{uuid.uuid4().hex}", f"file-{uuid.uuid4().hex}", f"file-{uuid.uuid4().hex}"
        self.file(tenant, input)
        with plainly(), self._folders.turn(tenant):
            if self.file(tenant, input).purpose != "batch":
                raise WrongUse(f"the file {input} is no input of a batch; upload one with the purpose 'batch'")
            made = Batch(id, tenant, endpoint, input, window, metadata, time.time_ns(), output, error)
            self._folders.write(tenant, made)
        return made

    def batch(self, tenant: str, id: str) -> Batch:
        """One batch. Raises: Missing."""
        return self._cancelling(self.kept(tenant, id))

    def kept(self, tenant: str, id: str) -> Batch:
        """One batch as it was written down: whether its end was asked for is not in it. Raises: Missing."""
        with plainly():
            return self._folders.one(tenant, id, _BATCH, Batch)

    def batches(self, tenant: str) -> list[Batch]:
        """A tenant's batches, the newest first. Raises: DiskTrouble."""
        with plainly(), disk(self._folders.root / tenant, "read"):
            return [self._cancelling(b) for b in self._folders.all(tenant, _BATCH, Batch)]

    def cancel(self, tenant: str, id: str) -> Batch:
        """Ask for a batch's end; it is cancelled once whoever runs it has seen this.

        Raises: Missing; InUse where it has ended otherwise.
        """
        batch = self.batch(tenant, id)
        if batch.status in ("completed", "failed"):
            raise InUse(f"the batch {id} cannot be cancelled: it is {batch.status}")
        if batch.status not in ("cancelling", "cancelled"):
            with plainly():
                write_bytes(self._mark(batch), str(int(time.time())).encode())
        return self.batch(tenant, id)

    def save(self, batch: Batch) -> None:
        """Write a batch down; one that is finished has no part and no mark any more. Raises: DiskTrouble."""
        with plainly():
            self._folders.write(batch.tenant, batch)
            if batch.finished:
                self._over.add(batch.id)
                for gone in (self._mark(batch), self.part(batch)):
                    with disk(gone, "delete"):
                        gone.unlink(missing_ok=True)

    def part(self, batch: Batch) -> Path:
        """Where the answers so far are."""
        return self._folders.root / batch.tenant / f"{batch.id}.part"

    def unfinished(self) -> list[Batch]:
        """Every tenant's batches that are not finished, the oldest first. Raises: OSError."""
        found = []
        for tenant in self._folders.tenants():
            for id in filter(None, map(_BATCH.id_of, names(self._folders.root / tenant))):
                if id not in self._over:
                    with suppress(BadInput, WrongUse):
                        batch = self.batch(tenant, id)
                        if batch.finished:
                            self._over.add(id)
                        else:
                            found.append(batch)
        return sorted(found, key=lambda b: (b.made_ns, b.id))

    def sweep(self) -> None:
        """Clear away what writers that were killed left, once it is old enough to be nobody's."""
        old = time.time() - STALE_S
        for tenant in self._folders.tenants():
            for name in names(self._folders.root / tenant):
                path = self._folders.root / tenant / name
                bare = _FILE.form.fullmatch(name) and not path.with_name(f"{name}.json").exists()
                if bare or _TEMPORARY.fullmatch(name):
                    with suppress(OSError):
                        if path.stat().st_mtime < old:
                            path.unlink()

    def _mark(self, batch: Batch) -> Path:
        return self._folders.root / batch.tenant / f"{batch.id}.cancel"

    def _cancelling(self, batch: Batch) -> Batch:
        """The batch as it is told: "cancelling" from when this was asked for until it is done."""
        if batch.finished:
            return batch
        try:
            since = int(self._mark(batch).read_bytes())
        except (OSError, ValueError):
            return batch
        return replace(batch, status="cancelling", times={**batch.times, "cancelling_at": since})
