"""Who may do what with a served fleet: tenants, keys, quotas, pins, canaries and the audit log, in `serve.db`."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from plures.core.errors import WrongUse, nearest
from plures.store import audit
from plures.store.names import check_alias, check_name, check_text, parse, shown
from plures.store.serve_db import APPLICATION_ID, FILE, MIGRATIONS, Database
from plures.store.versions import now

_ID = re.compile(r"[0-9a-f]{16}", re.ASCII)
__all__ = ["APPLICATION_ID", "FILE", "MIGRATIONS", "Access", "Canary", "Key", "Tenant"]
MOST_PATTERNS, MOST_LETTERS, MOST_VERSION, MOST = 1000, 200, 999_999_999, 1 << 53


@dataclass(frozen=True)
class Tenant:
    """Whose requests they are, and what these may use; 0 is no limit.

    Options:
        variants: patterns (`acme-*`) over the names of the variants that it may see.
        base: whether it may ask the base itself.
        weight: share of the service, relative to the others that wait.
        concurrency: requests that run at once.
        rate: requests per second.
        tokens_per_minute: prompt and new tokens.
    Raises: WrongUse.
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
        if len(self.variants) > MOST_PATTERNS or any(len(p) > MOST_LETTERS for p in self.variants):
            raise WrongUse(f"variants may be {MOST_PATTERNS} patterns of {MOST_LETTERS} letters at most, like 'acme-*'")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise WrongUse(f"weight must be above 0 and finite, got {self.weight}; 1 is an equal share")
        for field in ("concurrency", "rate", "tokens_per_minute"):
            value = getattr(self, field)
            if not 0 <= value <= MOST:
                raise WrongUse(f"{field} must be 0 (no limit) or above and finite, got {value}")

    def sees(self, name: str) -> bool:
        """Whether the tenant may know of the variant `name`."""
        return any(fnmatchcase(name, pattern) for pattern in self.variants)


@dataclass(frozen=True)
class Key:
    """An API key, without its secret. `tenant` is "" for an admin key; `revoked` is when, or None while it lives."""

    id: str
    tenant: str
    kind: Literal["user", "admin"]
    note: str
    created: str
    revoked: str | None


@dataclass(frozen=True)
class Canary:
    """The `share` of the requests for `name@alias` (or the bare name, alias "") that another version answers."""

    name: str
    alias: str
    version: int
    share: float


class Access:
    """The tenants, keys, pins, canaries and audit log of one fleet.

    May be used from several threads, and by several processes at once: a change is one transaction with its line of
    the audit log, and every look-up sees what others have changed. `by` says in the log who made a change.
    """

    def __init__(self, opened: Database) -> None:
        """For `open`, which makes one."""
        self._db = opened

    @classmethod
    def open(cls, fleet: Path | str, *, wait_s: float = 30.0) -> Self:
        """Open the access of an existing fleet; its `serve.db` is made, readable by its owner alone, where missing.

        Raises: BadInput (no fleet, a damaged or newer serve.db), StoreBusy, DiskTrouble.
        """
        return cls(Database(Path(fleet), wait_s))

    def close(self) -> None:
        """Close it; a second close does nothing."""
        self._db.close()

    def __enter__(self) -> Self:
        """The access itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @property
    def version(self) -> int:
        """A number that is another one after every change, by whichever process."""
        return self._db.stamp()

    @contextmanager
    def _change(self, action: str, by: str) -> Iterator[tuple[sqlite3.Connection, dict[str, Any]]]:
        """One transaction and its line, whose detail is filled inside; left empty, nothing changed and none is written.

        Raises: WrongUse, StoreBusy, DiskTrouble: nothing is changed then, and nothing is logged.
        """
        with self._db.write() as db:
            detail: dict[str, Any] = {}
            yield db, detail
            if detail:
                audit.add_line(db, action, by, detail)

    # ---------------------------------------------------------------- tenants

    def tenants(self) -> list[Tenant]:
        """Every tenant, by name."""
        with self._db.read() as db:
            return [_tenant(row) for row in db.execute("SELECT * FROM tenant ORDER BY name")]

    def tenant(self, name: str) -> Tenant:
        """One tenant. Raises: WrongUse, with the nearest name there is."""
        with self._db.read() as db:
            return _find_tenant(db, name)

    def put_tenant(self, tenant: Tenant, by: str) -> None:
        """Make a tenant, or set all of what it may; its keys stay.

        Raises: WrongUse where its name differs only in letter case from another's.
        """
        with self._change("tenant", by) as (db, said):
            said |= _put_tenant(db, tenant)

    def change_tenant(self, name: str, fields: Mapping[str, Any], by: str) -> Tenant:
        """Set some of what a tenant may, and leave the rest; one that is new begins with the defaults.

        Raises: WrongUse for an unknown field or a wrong value.
        """
        known = [f for f in Tenant.__dataclass_fields__ if f != "name"]
        for field in fields:
            if field not in known:
                raise WrongUse(f"a tenant has no {field!r}.{nearest(field, known)} It has {', '.join(known)}")
        with self._change("tenant", by) as (db, said):
            row = db.execute("SELECT * FROM tenant WHERE name = ?", (check_name(name, "tenant"),)).fetchone()
            tenant = replace(Tenant(name) if row is None else replace(_tenant(row), name=name), **fields)
            said |= _put_tenant(db, tenant)
        return tenant

    def remove_tenant(self, name: str, by: str, force: bool = False) -> None:
        """Remove a tenant; with `force` also where it has live keys, which are revoked.

        Raises: WrongUse where there is none, or where it has live keys.
        """
        with self._change("remove tenant", by) as (db, said):
            gone = _find_tenant(db, name)
            live = [r[0] for r in db.execute(
                "SELECT id FROM key WHERE tenant = ? AND revoked IS NULL ORDER BY created, id", (name,))]  # fmt: skip
            if live and not force:
                raise WrongUse(f"tenant {name!r} has {len(live)} live keys ({', '.join(live[:3])}"
                               f"{', …' if len(live) > 3 else ''}); revoke them first, or force it")  # fmt: skip
            db.execute("UPDATE key SET revoked = ? WHERE tenant = ? AND revoked IS NULL", (now(), name))
            db.execute("DELETE FROM tenant WHERE name = ?", (name,))
            said |= {**asdict(gone), "revoked": live}

    # ---------------------------------------------------------------- keys

    def make_key(self, tenant: str, by: str, *, admin: bool = False, note: str = "") -> tuple[Key, str]:
        """A new key and its secret, `pl-<id>-<256 random bits>`, which is returned here and never again.

        The hash is one salted SHA-256: a slow hash (bcrypt, Argon2) protects secrets that people choose, by making
        each guess dear; 2^256 guesses are dear enough, and every request would pay for the slowness.
        Raises: WrongUse for an unknown tenant; an admin key is of the tenant "".
        """
        note = audit.redact(check_text(note, "note", empty=True))
        if admin and tenant:
            raise WrongUse(f"an admin key belongs to no tenant, got {shown(tenant)}; give none, or make a user's key")
        id, random, salt = secrets.token_hex(8), secrets.token_urlsafe(32), secrets.token_bytes(16)
        key = Key(id, "" if admin else tenant, "admin" if admin else "user", note, now(), None)
        secret = f"pl-{id}-{random}"
        with self._change("make key", by) as (db, said):
            if not admin:
                _find_tenant(db, tenant)
            db.execute("INSERT INTO key VALUES (?, ?, ?, ?, ?, NULL, ?, ?)",
                       (id, key.tenant, key.kind, note, key.created, salt, _hash(salt, secret)))  # fmt: skip
            said |= {"id": id, "tenant": key.tenant, "kind": key.kind, "note": note}
        return key, secret

    def keys(self) -> list[Key]:
        """Every key ever made, oldest first; the revoked ones too."""
        with self._db.read() as db:
            rows = db.execute("SELECT id, tenant, kind, note, created, revoked FROM key ORDER BY created, id")
            return [Key(*row) for row in rows]

    def revoke(self, id: str, by: str) -> None:
        """End a key, for every process from its next request on.

        Raises: WrongUse where there is no live key of this id. The text is not repeated: it may be a secret.
        """
        with self._change("revoke key", by) as (db, said):
            row = None
            if isinstance(id, str) and _ID.fullmatch(id):
                row = db.execute("UPDATE key SET revoked = ? WHERE id = ? AND revoked IS NULL RETURNING tenant",
                                 (now(), id)).fetchone()  # fmt: skip
            if row is None:
                raise WrongUse("there is no live key of this id; give the 16 digits after 'pl-', as plures key lists")
            said |= {"id": id, "tenant": row[0]}

    def who(self, secret: str) -> Key | None:
        """The live key with this secret, or None; whatever text it is, this takes one look at the index."""
        if not isinstance(secret, str) or len(secret) > 100:
            return None
        found = audit.SECRET.fullmatch(secret)
        if found is None:
            return None
        with self._db.read() as db:
            row = db.execute(
                "SELECT id, tenant, kind, note, created, revoked, salt, hash FROM key "
                "WHERE id = ? AND revoked IS NULL",
                (found[1],),
            ).fetchone()
        if row is None or not hmac.compare_digest(_hash(row[6], secret), row[7]):
            return None
        return Key(*row[:6])

    # ---------------------------------------------------------------- pins and canaries

    def pins(self) -> list[str]:
        """The references whose variants stay in memory, in order."""
        with self._db.read() as db:
            return _pins(db)

    def pin(self, ref: str, by: str) -> None:
        """Keep what a reference means in memory. Raises: WrongUse where it is no reference."""
        parse(ref)
        with self._change("pin", by) as (db, said):
            if db.execute("INSERT INTO pin VALUES (?) ON CONFLICT DO NOTHING", (ref,)).rowcount:
                said["ref"] = ref

    def unpin(self, ref: str, by: str) -> None:
        """Take a pin away. Raises: WrongUse where there is none."""
        with self._change("unpin", by) as (db, said):
            if not db.execute("DELETE FROM pin WHERE ref = ?", (ref,)).rowcount:
                raise WrongUse(f"{shown(ref)} is not pinned.{nearest(ref, _pins(db))} Give it as it was pinned")
            said["ref"] = ref

    def canaries(self) -> list[Canary]:
        """Every canary, by name and alias."""
        with self._db.read() as db:
            return _canaries(db)

    def set_canary(self, name: str, alias: str, version: int, share: float, by: str) -> None:
        """Let a version answer a share of the requests for `name@alias`, or the bare name (alias "").

        Raises: WrongUse where the share is not in [0, 1], or the rest cannot name anything.
        """
        check_name(name)
        if alias:
            check_alias(alias)
        if not 1 <= version <= MOST_VERSION:
            raise WrongUse(f"version must be in [1, {MOST_VERSION}], got {version}")
        if not 0 <= share <= 1:
            raise WrongUse(f"share must be in [0, 1], got {share}; 0.05 is one request in twenty")
        with self._change("canary", by) as (db, said):
            db.execute("INSERT OR REPLACE INTO canary VALUES (?, ?, ?, ?)", (name, alias, version, share))
            said |= {"name": name, "alias": alias, "version": version, "share": share}

    def end_canary(self, name: str, alias: str, by: str) -> None:
        """End a canary. Raises: WrongUse where there is none."""
        with self._change("end canary", by) as (db, said):
            row = db.execute(
                "DELETE FROM canary WHERE name = ? AND alias = ? RETURNING version, share", (name, alias)
            ).fetchone()
            if row is None:
                ref = f"{check_name(name)}@{check_alias(alias)}" if alias else shown(name)
                have = [f"{c.name}@{c.alias}" if c.alias else c.name for c in _canaries(db)]
                raise WrongUse(f"{ref} has no canary.{nearest(ref, have)} Set one first, or see which there are")
            said |= {"name": name, "alias": alias, "version": row[0], "share": row[1]}

    # ---------------------------------------------------------------- the audit log

    def note(self, action: str, by: str, /, **detail: Any) -> None:
        """Write a line of one's own. Raises: WrongUse where the detail is not JSON."""
        with self._db.write() as db:
            audit.add_line(db, action, by, detail)

    def log(self, limit: int = 100, before: int | None = None, action: str = "") -> list[dict[str, Any]]:
        """The newest lines, newest first: id, at, action, by, detail; only those of one `action`, where it is given.

        `before` is the id of the line where the last page ended. Raises: WrongUse where `limit` is below 1.
        """
        with self._db.read() as db:
            return audit.lines(db, limit, before, action)


def _hash(salt: bytes, secret: str) -> bytes:
    return hashlib.sha256(salt + secret.encode("ascii")).digest()


def _tenant(row: tuple[Any, ...]) -> Tenant:
    name, variants, base, weight, concurrency, rate, tokens = row
    return Tenant(name, tuple(json.loads(variants)), bool(base), weight, concurrency, rate, tokens)


def _find_tenant(db: sqlite3.Connection, name: str) -> Tenant:
    """Raises: WrongUse, with the nearest name there is."""
    row = db.execute("SELECT * FROM tenant WHERE name = ?", (check_name(name, "tenant"),)).fetchone()
    if row is None or row[0] != name:
        have = [r[0] for r in db.execute("SELECT name FROM tenant ORDER BY name")]
        hint = nearest(name, have) or ("" if have else " There is none yet.")
        raise WrongUse(f"no tenant {shown(name)}.{hint} Make one with `plures tenant NAME --variants 'acme-*'`")
    return _tenant(row)


def _put_tenant(db: sqlite3.Connection, tenant: Tenant) -> dict[str, Any]:
    """Write a tenant's row; what the log says of it. Raises: WrongUse for another's name in other letter case."""
    row = db.execute("SELECT * FROM tenant WHERE name = ?", (tenant.name,)).fetchone()
    if row is not None and row[0] != tenant.name:
        raise WrongUse(f"tenant {tenant.name!r} differs only in letter case from {row[0]!r}; write {row[0]!r}, "
                       "or choose another name")  # fmt: skip
    said = asdict(tenant)
    db.execute("INSERT OR REPLACE INTO tenant VALUES (?, ?, ?, ?, ?, ?, ?)",
               tuple(json.dumps(v) if k == "variants" else v for k, v in said.items()))  # fmt: skip
    return said | {"before": None if row is None else asdict(_tenant(row))}


def _pins(db: sqlite3.Connection) -> list[str]:
    return [r[0] for r in db.execute("SELECT ref FROM pin ORDER BY ref")]


def _canaries(db: sqlite3.Connection) -> list[Canary]:
    return [Canary(*row) for row in db.execute("SELECT name, alias, version, share FROM canary ORDER BY name, alias")]
