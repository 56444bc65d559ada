"""A folder for each tenant, with small records in it, each a JSON file that is written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from plures.core.errors import BadInput, DiskTrouble, StoreBusy, WrongUse, disk
from plures.store.names import check_name, shown
from plures.tensors.safe import write_bytes
from plures.tensors.together import sync_folder


class Missing(WrongUse):
    """No such file or batch, or none of this tenant's: the two are told in the same words."""


class InUse(StoreBusy):
    """It cannot be done while a batch runs, or any more."""


class Record(Protocol):
    """A frozen dataclass with an id of its own."""

    @property
    def id(self) -> str: ...

    @property
    def made_ns(self) -> int: ...


Kept = TypeVar("Kept", bound=Record)


class Kind:
    """One kind of records: what it is called, and what its ids look like."""

    def __init__(self, name: str, start: str) -> None:
        self.name = name
        self.form = re.compile(re.escape(start) + r"[0-9a-f]{32}")

    def missing(self, id: str) -> Missing:
        """The error for an id that names nothing here."""
        return Missing(f"no {self.name} {shown(id)} here")

    def id_of(self, name: str) -> str:
        """The id of the record in a file of this name; "" where it is another file."""
        id = name.removesuffix(".json")
        return id if id != name and self.form.fullmatch(id) else ""


class Folders:
    """Every tenant's folder. Every method may be called from any thread, and in several processes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def tenants(self) -> list[str]:
        """Those that have a folder."""
        return [name for name in names(self.root) if (self.root / name).is_dir()]

    def home(self, tenant: str) -> Path:
        """A tenant's folder, made for its owner's eyes alone. Raises: WrongUse for no name of a tenant; DiskTrouble."""
        path = self.root / check_name(tenant, "tenant")
        if not path.is_dir():
            with disk(path):
                self.root.mkdir(mode=0o700, exist_ok=True)
                path.mkdir(mode=0o700, exist_ok=True)
                sync_folder(self.root)
        return path

    @contextmanager
    def turn(self, tenant: str) -> Iterator[None]:
        """One at a time, of all threads and processes."""
        path = self.home(tenant) / "lock"
        with disk(path, "lock"):
            file = path.open("ab")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def write(self, tenant: str, record: Any) -> None:
        """Keep a record. Raises: DiskTrouble."""
        write_bytes(self.home(tenant) / f"{record.id}.json", json.dumps(asdict(record)).encode())

    def one(self, tenant: str, id: str, kind: Kind, make: type[Kept]) -> Kept:
        """A record. Raises: Missing; BadInput where it cannot be read."""
        if not kind.form.fullmatch(id):
            raise kind.missing(id)
        path = self.root / check_name(tenant, "tenant") / f"{id}.json"
        try:
            said = path.read_bytes()
        except FileNotFoundError:
            raise kind.missing(id) from None
        except OSError as error:
            raise BadInput(f"cannot read {str(path)!r}: {error}") from error
        try:
            made: Kept = make(**json.loads(said))
        except (ValueError, TypeError) as error:
            raise BadInput(f"{str(path)!r} is damaged; remove it") from error
        return made

    def all(self, tenant: str, kind: Kind, make: type[Kept]) -> list[Kept]:
        """The records that can be read, the newest first; one may be deleted meanwhile."""
        found = []
        for id in filter(None, map(kind.id_of, names(self.root / check_name(tenant, "tenant")))):
            with suppress(BadInput, Missing):
                found.append(self.one(tenant, id, kind, make))
        return sorted(found, key=lambda one: (one.made_ns, one.id), reverse=True)


@contextmanager
def plainly() -> Iterator[None]:
    """The disk's errors as callers may hear them: no path of this machine is in them."""
    try:
        yield
    except InUse:
        raise
    except BadInput as error:
        full = isinstance(error, DiskTrouble) and error.full
        why = "is full" if full else "cannot be used"
        raise DiskTrouble(f"the disk of the server {why}; nothing was changed", full) from error


def names(folder: Path) -> list[str]:
    """What is in a folder; nothing where there is none."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
