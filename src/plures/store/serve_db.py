"""serve.db: its tables, its two connections and their transactions. What is in it: `store.access`."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plures.core.errors import BadInput, WrongUse, disk
from plures.store.blobs import Blobs
from plures.store.index import connect, create, sqlite_errors, transaction
from plures.store.schema import check_known, migrate
from plures.tensors.together import sync_folder

FILE = "serve.db"
APPLICATION_ID = 0x506C7573  # "Plus": tells it from a fleet.db, and from any other SQLite file

# Nothing here refers to fleet.db by row: a canary or a pin may outlive its version, which whoever reads it finds out.
_FIRST = """
CREATE TABLE tenant (
    name TEXT PRIMARY KEY COLLATE NOCASE, variants TEXT NOT NULL, base INTEGER NOT NULL, weight REAL NOT NULL,
    concurrency INTEGER NOT NULL, rate REAL NOT NULL, tokens_per_minute REAL NOT NULL
) WITHOUT ROWID;
-- hash: SHA-256 of salt and secret; the secret itself is nowhere
CREATE TABLE key (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('user', 'admin')),
    note TEXT NOT NULL, created TEXT NOT NULL, revoked TEXT,
    salt BLOB NOT NULL CHECK (length(salt) = 16), hash BLOB NOT NULL CHECK (length(hash) = 32)
) WITHOUT ROWID;
CREATE INDEX key_of_tenant ON key (tenant);
CREATE TABLE pin (ref TEXT PRIMARY KEY) WITHOUT ROWID;
-- alias '': the bare name
CREATE TABLE canary (
    name TEXT NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL, share REAL NOT NULL, PRIMARY KEY (name, alias)
) WITHOUT ROWID;
CREATE TABLE log (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, action TEXT NOT NULL, "by" TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE INDEX log_of_action ON log (action, id);
CREATE TRIGGER log_stays BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'the log is only added to'); END;
CREATE TRIGGER log_keeps BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'the log is only added to'); END;
"""

MIGRATIONS: tuple[str, ...] = (_FIRST,)
_STRANGE = ("is of another program, or of a newer Plures (schema {version}, this one knows up to {known}); "
            "update Plures, or move the file away")  # fmt: skip


class Database:
    """The open serve.db of a fleet: one connection that reads and one that writes, so that a request's look-up does
    not wait for a change on its way to the disk. Threads take turns on each; a forked process opens its own.
    """

    def __init__(self, fleet: Path, wait_s: float) -> None:
        """Open the serve.db of a fleet, made where it is missing; an older schema is brought up to date.

        Raises: BadInput (no fleet, another file, a newer schema), StoreBusy, DiskTrouble.
        """
        self.path = fleet / FILE
        if not (fleet / "fleet.db").is_file():
            raise BadInput(f"{str(fleet)!r} is not a fleet: it has no fleet.db; make one with `plures init`")
        if _lacking(self.path):
            _create(fleet, wait_s)
        self._pid = os.getpid()
        self._turns = (threading.RLock(), threading.RLock())
        self._open = True
        self._dbs: list[sqlite3.Connection] = []
        try:
            with sqlite_errors(self.path):
                for _ in self._turns:
                    self._dbs.append(connect(self.path, wait_s))
            with self.read() as db:
                old = check_known(db, str(self.path), APPLICATION_ID, MIGRATIONS, _STRANGE, _STRANGE)
            if old:
                with self.write() as db:
                    migrate(db, MIGRATIONS)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close both connections; a second close does nothing."""
        with self._turns[0], self._turns[1]:
            self._open = False
            while self._dbs:
                self._dbs.pop().close()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One snapshot. Raises: StoreBusy, DiskTrouble, BadInput."""
        with self._turns[0], self._within(0) as db:
            yield db

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction, all or nothing. Raises: StoreBusy, DiskTrouble, BadInput."""
        with self._turns[1], self._within(1) as db:
            yield db

    def stamp(self) -> int:
        """A number that is another one after every change, by whichever process."""
        with self.read() as db:
            return int(db.execute("PRAGMA data_version").fetchone()[0])

    @contextmanager
    def _within(self, which: int) -> Iterator[sqlite3.Connection]:
        if not self._open or os.getpid() != self._pid:  # SQLite's locks do not survive a fork
            why = "is closed" if not self._open else "was opened before a fork"
            raise WrongUse(f"the access of the fleet {str(self.path.parent)!r} {why}; open it again with Access.open")
        with transaction(self._dbs[which], self.path, ("BEGIN", "BEGIN IMMEDIATE")[which], keep=bool(which)) as db:
            yield db


def _lacking(path: Path) -> bool:
    """Whether the file is not there, or was made and never filled."""
    return not path.exists() or (path.is_file() and not path.stat().st_size)


def _create(fleet: Path, wait_s: float) -> None:
    """Make an empty serve.db, whole before it has its name, for its owner's eyes alone (0600; `-wal` inherits it).

    Raises: DiskTrouble, StoreBusy.
    """
    blobs = Blobs(fleet, wait_s)
    with blobs.alone():  # a gc would take the temporary file for a leftover; another process may be making one too
        if not _lacking(fleet / FILE):
            return
        with disk(fleet / FILE):
            blobs.tmp.mkdir(exist_ok=True)
            temporary = blobs.temporary("db")
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            os.chmod(temporary, 0o600)
        create(temporary, APPLICATION_ID, MIGRATIONS)
        with disk(fleet / FILE):
            os.replace(temporary, fleet / FILE)
            sync_folder(fleet)
