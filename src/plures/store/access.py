"""Who may do what with a served fleet: tenants, keys, pins, canaries and the audit log, in its `serve.db`.

Every change and its line in the log are one transaction. A key is shown once and kept as the SHA-256 of its secret: a
random secret of 256 bits cannot be guessed, so nothing slower is needed. Several processes may use the file at once.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from plures.core.errors import BadInput, WrongUse, disk, nearest
from plures.store import schema
from plures.store.index import sqlite_errors
from plures.store.names import check_alias, check_name, check_text

FILE = "serve.db"
APPLICATION_ID = 0x506C7573  # "Plus": tells it from fleet.db
_FIRST = """
CREATE TABLE tenant (
    name TEXT PRIMARY KEY, variants TEXT NOT NULL, base INTEGER NOT NULL, weight REAL NOT NULL,
    concurrency INTEGER NOT NULL, rate REAL NOT NULL, tokens_per_minute REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE key (
    id TEXT PRIMARY KEY, hash BLOB NOT NULL, tenant TEXT NOT NULL, kind TEXT NOT NULL, note TEXT NOT NULL,
    created TEXT NOT NULL, revoked TEXT
) WITHOUT ROWID;
CREATE TABLE pin (ref TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE canary (
    name TEXT NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL, share REAL NOT NULL, PRIMARY KEY (name, alias)
) WITHOUT ROWID;
CREATE TABLE log (
    id INTEGER PRIMARY KEY, at TEXT NOT NULL, action TEXT NOT NULL, by TEXT NOT NULL, detail TEXT NOT NULL
);
"""
MIGRATIONS: tuple[str, ...] = (_FIRST,)


@dataclass(frozen=True)
class Tenant:
    """Whose requests these are: which variants they may name, and how much of the server they get (0: no limit).

    Options:
        variants: patterns of variant names, as in a shell ("support", "acme-*").
        base: whether the base itself may be asked.
        weight: share of service against other tenants.
        concurrency: requests answered at once.
        rate: requests per second.
        tokens_per_minute: prompt and new tokens per minute.
    """

    name: str
    variants: tuple[str, ...] = ("*",)
    base: bool = True
    weight: float = 1.0
    concurrency: int = 0
    rate: float = 0.0
    tokens_per_minute: float = 0.0

    def __post_init__(self) -> None:
        check_name(self.name, "tenant")
        for pattern in self.variants:
            check_text(pattern, "pattern")
        if not 0 < self.weight < float("inf"):
            raise WrongUse(f"weight must be above 0 and finite, got {self.weight}")
        for what in ("concurrency", "rate", "tokens_per_minute"):
            if not 0 <= getattr(self, what) < float("inf"):
                raise WrongUse(f"{what} must be 0 (no limit) or more, and finite, got {getattr(self, what)}")

    def sees(self, name: str) -> bool:
        """Whether this tenant may name a variant (its case counts)."""
        return any(fnmatchcase(name, p) for p in self.variants)


@dataclass(frozen=True)
class Key:
    """A key without its secret. An admin key has no tenant."""

    id: str
    tenant: str
    kind: Literal["user", "admin"]
    note: str
    created: str
    revoked: str | None


@dataclass(frozen=True)
class Canary:
    """Of the requests for `name` (or `name@alias`), a `share` in [0, 1] goes to `version` instead."""

    name: str
    alias: str
    version: int
    share: float


class Access:
    """The open `serve.db` of a fleet; threads take turns."""

    def __init__(self, path: Path) -> None:
        self.path, self._turn = path, threading.RLock()
        with sqlite_errors(path):
            self._db = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _prepare(self) -> None:
        db = self._db
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        with self._write():
            mine = db.execute("PRAGMA application_id").fetchone()[0]
            done = schema.user_version(db)
            if (done and mine != APPLICATION_ID) or done > len(MIGRATIONS):
                raise BadInput(f"{str(self.path)!r} is of another program, or of a newer Plures; move it away")
            for script in MIGRATIONS[done:]:
                for statement in schema.statements(script):
                    db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    @classmethod
    def open(cls, fleet: Path | str) -> Access:
        """The access of a fleet, made where it has none yet (readable by its owner alone).

        Raises: BadInput where `fleet` is no fleet, or the file is damaged or another program's; DiskTrouble.
        """
        path = Path(fleet) / FILE
        if not (Path(fleet) / "fleet.db").exists():
            raise BadInput(f"{str(fleet)!r} is no fleet; make one with plures init")
        if not path.exists():
            with disk(path):
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        return cls(path)

    def close(self) -> None:
        """Close the file."""
        with self._turn:
            self._db.close()

    def __enter__(self) -> Access:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction, all or nothing."""
        with self._turn, sqlite_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    with suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")

    def _read(self, sql: str, *values: Any) -> list[Any]:
        with self._turn, sqlite_errors(self.path):
            return self._db.execute(sql, values).fetchall()

    @property
    def version(self) -> tuple[int, int]:
        """Numbers that change when the file does: by another process, or through this object."""
        return int(self._read("PRAGMA data_version")[0][0]), self._db.total_changes

    def tenants(self) -> list[Tenant]:
        """All tenants by name."""
        rows = self._read("SELECT * FROM tenant ORDER BY name")
        return [Tenant(n, tuple(json.loads(v)), bool(b), w, c, r, t) for n, v, b, w, c, r, t in rows]

    def tenant(self, name: str) -> Tenant:
        """One tenant. Raises: WrongUse where there is none of that name."""
        have = {t.name: t for t in self.tenants()}
        if name not in have:
            raise WrongUse(f"no tenant {name!r}.{nearest(name, have)} plures tenant {name} makes one")
        return have[name]

    def put_tenant(self, tenant: Tenant, by: str) -> None:
        """Make a tenant, or set all of what it may."""
        t = tenant
        values = (t.name, json.dumps(t.variants), t.base, t.weight, t.concurrency, t.rate, t.tokens_per_minute)
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO tenant VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            _log(db, "tenant", by, **{k: getattr(t, k) for k in Tenant.__dataclass_fields__})

    def remove_tenant(self, name: str, by: str, force: bool = False) -> None:
        """Remove a tenant; with `force` its live keys are revoked. Raises: WrongUse where it has some, or is not."""
        self.tenant(name)
        with self._write() as db:
            live = db.execute("SELECT id FROM key WHERE tenant = ? AND revoked IS NULL", (name,)).fetchall()
            if live and not force:
                raise WrongUse(f"tenant {name!r} has {len(live)} live keys; revoke them first, or force it (--force)")
            db.execute("UPDATE key SET revoked = ? WHERE tenant = ? AND revoked IS NULL", (_now(), name))
            db.execute("DELETE FROM tenant WHERE name = ?", (name,))
            _log(db, "remove tenant", by, name=name, revoked=[k for (k,) in live])

    def make_key(self, tenant: str, by: str, *, admin: bool = False, note: str = "") -> tuple[Key, str]:
        """A new key and its secret, which is not kept and cannot be shown again.

        Raises: WrongUse for an unknown tenant, or an admin key of a tenant (the administration is of the whole fleet).
        """
        if admin and tenant:
            raise WrongUse("an admin key belongs to no tenant; leave the tenant out")
        if not admin:
            self.tenant(tenant)
        check_text(note, "note", empty=True)
        key = Key(secrets.token_hex(8), tenant, "admin" if admin else "user", note, _now(), None)
        secret = secrets.token_urlsafe(32)
        with self._write() as db:
            db.execute("INSERT INTO key VALUES (?, ?, ?, ?, ?, ?, NULL)",
                       (key.id, _digest(key.id, secret), tenant, key.kind, note, key.created))  # fmt: skip
            _log(db, "make key", by, id=key.id, tenant=tenant, kind=key.kind, note=note)
        return key, f"pl-{key.id}-{secret}"

    def keys(self) -> list[Key]:
        """All keys, the oldest first, without their secrets."""
        rows = self._read("SELECT id, tenant, kind, note, created, revoked FROM key ORDER BY created, id")
        return [Key(*row) for row in rows]

    def revoke(self, id: str, by: str) -> None:
        """End a key. Raises: WrongUse where no live key has that id."""
        with self._write() as db:
            done = db.execute("UPDATE key SET revoked = ? WHERE id = ? AND revoked IS NULL", (_now(), id))
            if not done.rowcount:
                raise WrongUse(f"no live key has the id {str(id)[:40]!r}; plures key --list shows them")
            _log(db, "revoke key", by, id=id)

    def who(self, secret: str) -> Key | None:
        """The live key of a secret, or None; any text may be asked."""
        parts = secret.split("-", 2) if len(secret) < 200 and secret.isascii() else []
        if len(parts) != 3 or parts[0] != "pl":
            return None
        rows = self._read("SELECT id, tenant, kind, note, created, revoked, hash FROM key WHERE id = ?", parts[1])
        if not rows or rows[0][5] is not None or not hmac.compare_digest(rows[0][6], _digest(parts[1], parts[2])):
            return None
        return Key(*rows[0][:6])

    def pins(self) -> list[str]:
        """References whose variants stay resident."""
        return [ref for (ref,) in self._read("SELECT ref FROM pin ORDER BY ref")]

    def pin(self, ref: str, by: str) -> None:
        """Keep what `ref` means, now and later, resident."""
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO pin VALUES (?)", (ref,))
            _log(db, "pin", by, ref=ref)

    def unpin(self, ref: str, by: str) -> None:
        """Let it go again. Raises: WrongUse where it was not pinned."""
        with self._write() as db:
            if not db.execute("DELETE FROM pin WHERE ref = ?", (ref,)).rowcount:
                raise WrongUse(f"{ref!r} is not pinned.{nearest(ref, self.pins())}")
            _log(db, "unpin", by, ref=ref)

    def canaries(self) -> list[Canary]:
        """All canaries."""
        rows = self._read("SELECT name, alias, version, share FROM canary ORDER BY name, alias")
        return [Canary(*row) for row in rows]

    def set_canary(self, name: str, alias: str, version: int, share: float, by: str) -> None:
        """Send a share of the requests for a reference to another version.

        Raises: WrongUse for a share not in [0, 1].
        """
        check_name(name)
        if alias:
            check_alias(alias)
        if not 0 <= share <= 1:
            raise WrongUse(f"share must be in [0, 1], got {share}")
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO canary VALUES (?, ?, ?, ?)", (name, alias, version, share))
            _log(db, "canary", by, name=name, alias=alias, version=version, share=share)

    def end_canary(self, name: str, alias: str, by: str) -> None:
        """End a canary. Raises: WrongUse where there is none."""
        with self._write() as db:
            if not db.execute("DELETE FROM canary WHERE name = ? AND alias = ?", (name, alias)).rowcount:
                raise WrongUse(f"{f'{name}@{alias}' if alias else name!r} has no canary")
            _log(db, "end canary", by, name=name, alias=alias)

    def note(self, action: str, by: str, **detail: Any) -> None:
        """A line in the log for what was changed elsewhere."""
        with self._write() as db:
            _log(db, action, by, **detail)

    def log(self, limit: int = 100, before: int | None = None, action: str | None = None) -> list[dict[str, Any]]:
        """The log, newest first: id, at (UTC), action, by, detail; `before` an id, to read on."""
        rows = self._read(
            "SELECT id, at, action, by, detail FROM log WHERE id < ? AND (? IS NULL OR action = ?) "
            "ORDER BY id DESC LIMIT ?",
            1 << 62 if before is None else before, action, action, limit,
        )  # fmt: skip
        return [{"id": i, "at": at, "action": a, "by": by, "detail": json.loads(d)} for i, at, a, by, d in rows]


def _log(db: sqlite3.Connection, action: str, by: str, **detail: Any) -> None:
    db.execute("INSERT INTO log (at, action, by, detail) VALUES (?, ?, ?, ?)",
               (_now(), action, by, json.dumps(detail, sort_keys=True)))  # fmt: skip


def _digest(id: str, secret: str) -> bytes:
    return hashlib.sha256(f"{id}:{secret}".encode()).digest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
