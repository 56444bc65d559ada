"""Versions, scores and aliases as the index holds them."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from plures.core.errors import WrongUse, nearest
from plures.store.content import dump
from plures.store.names import Ref, check_text, shown


@dataclass(frozen=True)
class Version:
    """One published version of a name.

    `identity` is the variant's, in hex; `created` is ISO-8601 in UTC; `n_bytes` counts all the variant's tensors,
    shared or not; `trained` is how many numbers were trained, where the provenance says; `parents` are `name@3` where
    the parent was of this fleet, and identities in hex otherwise.
    """

    name: str
    version: int
    identity: str
    created: str
    method: str
    options: Mapping[str, Any]
    n_bytes: int
    trained: int | None
    aliases: tuple[str, ...]
    parents: tuple[str, ...]
    note: str

    @property
    def ref(self) -> str:
        """`name@3`: this version and no other, for ever."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Score:
    """One number measured on a version; `detail` is JSON (seed, rows, settings), the fleet fills in `created`."""

    dataset: str
    metric: str
    value: float
    detail: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""


def now() -> str:
    """This moment in UTC, ISO-8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def list_names(db: sqlite3.Connection) -> list[str]:
    """Every name that has a version, in order."""
    rows = db.execute("SELECT name FROM name WHERE id IN (SELECT name FROM version) ORDER BY name")
    return [r[0] for r in rows]


def find_name(db: sqlite3.Connection, name: str) -> tuple[int, int] | None:
    """(row id, last version number) of a name, or None.

    Raises: WrongUse where the fleet has the name in other letter case.
    """
    row = db.execute("SELECT id, last, name FROM name WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    if row[2] != name:
        raise WrongUse(f"name {name!r} differs only in letter case from {row[2]!r} of this fleet; write {row[2]!r}")
    return int(row[0]), int(row[1])


def find_version(db: sqlite3.Connection, ref: Ref) -> int:
    """The row id of the version that a reference means.

    Raises: WrongUse where the fleet has no such name, version or alias, with the nearest one it has.
    """
    found = find_name(db, ref.name)
    numbers = [] if found is None else db.execute(
        "SELECT number, id FROM version WHERE name = ? ORDER BY number DESC", (found[0],)
    ).fetchall()  # fmt: skip
    if found is None or not numbers:
        names = list_names(db)
        hint = nearest(ref.name, names) or (f" It has {some(names)}." if names else " It is empty: publish one.")
        raise WrongUse(f"no variant named {ref.name!r} in this fleet.{hint}")
    if ref.alias is not None:
        aliases = dict(db.execute("SELECT alias, version FROM alias WHERE name = ?", (found[0],)).fetchall())
        if ref.alias not in aliases:
            hint = nearest(ref.alias, aliases) or (f" It has {some(aliases)}." if aliases else " It has none.")
            raise WrongUse(f"{ref.name!r} has no alias {ref.alias!r}.{hint}")
        return int(aliases[ref.alias])
    if ref.number is None:
        return int(numbers[0][1])
    ids = dict(numbers)
    if ref.number not in ids:
        gone = "was removed" if 0 < ref.number <= found[1] else "was never published"
        raise WrongUse(f"{ref.name}@{ref.number} {gone}; {ref.name!r} has version {some(map(str, sorted(ids)[::-1]))}")
    return int(ids[ref.number])


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, in quotes, and how many more there are."""
    every = [repr(n) for n in names]
    return ", ".join(every[:limit]) + (f" and {len(every) - limit} more" if len(every) > limit else "")


_SELECT = """
SELECT v.id, n.name, v.number, x.identity, v.created, x.manifest, x.n_bytes, v.provenance, v.note
FROM version v JOIN name n ON n.id = v.name JOIN variant x ON x.id = v.variant
"""
_LATEST = "v.number = (SELECT MAX(w.number) FROM version w WHERE w.name = v.name)"


def list_versions(db: sqlite3.Connection, name: int | None, every: bool) -> list[Version]:
    """The versions of one name (by row id) or of all, the latest of each or every one, by name and number."""
    parts = ([] if every else [_LATEST]) + ([] if name is None else ["v.name = ?"])
    where = f"WHERE {' AND '.join(parts)}" if parts else ""
    rows = db.execute(f"{_SELECT} {where} ORDER BY n.name, v.number", () if name is None else (name,)).fetchall()
    return _fill(db, rows, [] if name is None else [r[0] for r in rows], name is None)


def get_version(db: sqlite3.Connection, id: int) -> Version:
    """The version of a row id."""
    return _fill(db, db.execute(f"{_SELECT} WHERE v.id = ?", (id,)).fetchall(), [id], False)[0]


def _fill(db: sqlite3.Connection, rows: list[tuple[Any, ...]], ids: list[int], all: bool) -> list[Version]:
    """Versions of their rows, with aliases and parents: two queries for the whole fleet, not two per version."""
    aliases: dict[int, list[str]] = {}
    parents: dict[int, list[str]] = {}
    for id in [None] if all else ids:
        only, values = ("", ()) if id is None else ("WHERE version = ?", (id,))
        for owner, alias in db.execute(f"SELECT version, alias FROM alias {only} ORDER BY alias", values):
            aliases.setdefault(owner, []).append(alias)
        listed = f"SELECT version, hash, ref FROM parent {only} ORDER BY version, at"
        for owner, hash, ref in db.execute(listed, values):
            parents.setdefault(owner, []).append(ref or hash.hex())
    out = []
    for id, name, number, identity, created, manifest, n_bytes, provenance, note in rows:
        facts, trained = json.loads(manifest), json.loads(provenance).get("trained")
        out.append(Version(
            name, number, identity.hex(), created, facts["method"], facts["options"], n_bytes,
            trained if isinstance(trained, int) else None,
            tuple(aliases.get(id, ())), tuple(parents.get(id, ())), note,
        ))  # fmt: skip
    return out


def check_score(score: Score) -> tuple[str, str, float, str]:
    """The columns of a score.

    Raises: WrongUse where a name is empty, the value is no finite number, or the detail is not JSON.
    """
    dataset, metric = check_text(score.dataset, "dataset"), check_text(score.metric, "metric")
    try:
        value = float(score.value)
        detail = dump(dict(score.detail))
    except (TypeError, ValueError) as error:
        raise WrongUse(f"score {metric!r} on {dataset!r} cannot be stored ({error}); give a number and JSON") from error
    if not math.isfinite(value):
        raise WrongUse(f"score {metric!r} on {dataset!r} is {shown(value)}; give a finite number")
    return dataset, metric, value, detail


def put_scores(db: sqlite3.Connection, version: int, scores: Iterable[tuple[str, str, float, str]]) -> None:
    """Store scores of a version; one measured again on the same dataset and metric takes the place of the old one."""
    db.executemany(
        "INSERT INTO score VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE "
        "SET value = excluded.value, detail = excluded.detail, created = excluded.created",
        [(version, *s, now()) for s in scores],
    )


def get_scores(db: sqlite3.Connection, version: int) -> list[Score]:
    """The scores of a version, by dataset and metric."""
    rows = db.execute("SELECT dataset, metric, value, detail, created FROM score WHERE version = ?", (version,))
    return [Score(d, m, v, json.loads(detail), created) for d, m, v, detail, created in rows]


def put_alias(db: sqlite3.Connection, version: int, alias: str) -> None:
    """Point an alias at a version; it leaves the version it pointed at before."""
    db.execute(
        "INSERT INTO alias SELECT name, ?, id FROM version WHERE id = ? "
        "ON CONFLICT DO UPDATE SET version = excluded.version",
        (alias, version),
    )  # fmt: skip
