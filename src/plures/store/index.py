"""fleet.db: one SQLite connection, its transactions, and SQLite's errors in our words."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from plures.core.errors import BadInput, DiskTrouble, StoreBusy, WrongUse
from plures.store import schema


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors about `path` into one-line errors of ours; what is left over is a bug and stays as it is.

    Raises: StoreBusy, DiskTrouble, BadInput.
    """
    where = repr(str(path))
    try:
        yield
    except sqlite3.Error as error:
        # The low byte is the primary code; the rest refines it (SQLITE_BUSY_SNAPSHOT and the like).
        match getattr(error, "sqlite_errorcode", 0) & 0xFF:
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                raise StoreBusy(f"{where} is held by another process ({error}); nothing changed, try again") from error
            case sqlite3.SQLITE_FULL:
                raise DiskTrouble(f"cannot write {where}: the disk is full; nothing was changed", True) from error
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_CANTOPEN:
                raise DiskTrouble(f"cannot write {where}: no permission ({error}); nothing was changed") from error
            case sqlite3.SQLITE_IOERR:
                raise DiskTrouble(f"cannot use {where}: {error}; look at the disk, nothing was changed") from error
            case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
                raise BadInput(f"{where} is damaged ({error}); restore it from a copy") from error
        raise


def connect(path: Path, wait_s: float, writable: bool = True) -> sqlite3.Connection:
    """A connection to an existing database, with the settings every one of ours has."""
    query = "mode=rw"
    if not writable:
        # A reader of a WAL database creates `-shm` beside it, which a read-only folder forbids; `immutable` needs none,
        # and is right as long as no `-wal` holds commits that the main file lacks.
        wal = path.with_name(path.name + "-wal")
        query = "mode=ro" if wal.exists() and wal.stat().st_size else "mode=ro&immutable=1"
    db = sqlite3.connect(
        f"{path.resolve().as_uri()}?{query}", uri=True, timeout=wait_s, isolation_level=None, check_same_thread=False
    )
    try:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA synchronous = FULL")  # in WAL, NORMAL could lose the last commits in a power cut
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def transaction(db: sqlite3.Connection, path: Path, begin: str, keep: bool = False) -> Iterator[sqlite3.Connection]:
    """A transaction on the database at `path`, undone at the end but for `keep`.

    Raises: StoreBusy, DiskTrouble, BadInput.
    """
    with sqlite_errors(path):
        db.execute(begin)
        try:
            yield db
            if keep:
                db.execute("COMMIT")
        finally:
            if db.in_transaction:  # SQLite has already undone it by itself after a full disk
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")


class Index:
    """The open database of a fleet. Threads take turns on one connection; a forked process opens its own."""

    def __init__(self, path: Path, wait_s: float) -> None:
        """Open an existing database, and bring an older schema up to date.

        Raises: BadInput (not a fleet, a newer schema, damaged), StoreBusy, DiskTrouble.
        """
        self.path = path
        self.writable = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
        self._pid = os.getpid()
        self._turn = threading.RLock()
        self._open = True
        with sqlite_errors(path):
            self._db = connect(path, wait_s, self.writable)
        try:
            with self.read() as db:
                old = schema.check_known(db, str(path), schema.APPLICATION_ID, schema.MIGRATIONS)
            if old:
                with self.write() as db:
                    schema.migrate(db, schema.MIGRATIONS)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; a second close does nothing."""
        with self._turn:
            if self._open:
                self._open = False
                self._db.close()

    def _check_open(self) -> None:
        if not self._open:
            raise WrongUse(f"the fleet {str(self.path.parent)!r} is closed; open it again with Store.open")
        if os.getpid() != self._pid:  # SQLite's locks do not survive a fork
            raise WrongUse(f"the fleet {str(self.path.parent)!r} was opened before a fork; open it in this process")

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One snapshot: all that is read inside belongs to the same moment.

        Raises: StoreBusy, DiskTrouble, BadInput.
        """
        with self._turn:
            self._check_open()
            with transaction(self._db, self.path, "BEGIN") as db:
                yield db

    @contextmanager
    def write(self, keep: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction, all or nothing; with `keep=False` it is undone at the end, for dry runs.

        IMMEDIATE takes the write lock at the start: what is read inside cannot change before it is written.
        Raises: StoreBusy, DiskTrouble, BadInput.
        """
        with self._turn:
            self.check_writable()
            self._check_open()
            with transaction(self._db, self.path, "BEGIN IMMEDIATE", keep) as db:
                yield db

    @property
    def data_version(self) -> tuple[int, int]:
        """Numbers that change when the database does: by another connection, and by this one."""
        with self._turn, sqlite_errors(self.path):
            if not self._open:
                raise WrongUse(f"the fleet {str(self.path.parent)!r} is closed; open it again with Store.open")
            return int(self._db.execute("PRAGMA data_version").fetchone()[0]), self._db.total_changes

    def check_writable(self) -> None:
        """Pass where this process may write the fleet.

        Raises: DiskTrouble.
        """
        if not self.writable:
            raise DiskTrouble(f"cannot write {str(self.path)!r}: no permission; the fleet was opened for reading")


def create(path: Path, id: int, scripts: Sequence[str],
           fill: Callable[[sqlite3.Connection], object] | None = None) -> None:  # fmt: skip
    """Make a new database of application `id` at `path`, whole and closed, with the tables of `scripts` and what `fill`
    puts into them.

    Raises: DiskTrouble.
    """
    with sqlite_errors(path):
        db = sqlite3.connect(path, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            db.execute(f"PRAGMA application_id = {id}")
            schema.migrate(db, scripts)
            if fill is not None:
                fill(db)
            db.execute("COMMIT")
        finally:
            db.close()
