"""Publishing: a variant becomes a version, in one blob and one transaction."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plures.core.errors import BadInput, StoreBusy
from plures.store.blobs import Blobs, Spot, pack
from plures.store.content import Content, dump, take_apart
from plures.store.index import Index
from plures.store.names import check_alias, check_name, check_text, is_identity, parse
from plures.store.versions import (
    Score,
    Version,
    check_score,
    find_name,
    find_version,
    get_version,
    now,
    put_alias,
    put_scores,
)
from plures.tensors.variant import BaseRef, Variant

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Request:
    """All that was asked for beside the variant, checked before anything is read or written."""

    name: str
    aliases: tuple[str, ...]
    note: str
    scores: tuple[tuple[str, str, float, str], ...]
    parents: tuple[str, ...]


@dataclass(frozen=True)
class Fresh:
    """The new blob: its hash and size, the spot of each tensor in it, and which of them replace a damaged copy."""

    hash: bytes
    n_bytes: int
    payload: int
    spots: dict[bytes, Spot]
    mended: frozenset[bytes]


def check_request(
    name: str, aliases: Sequence[str], note: str, scores: Sequence[Score], parents: Sequence[str]
) -> Request:
    """The request, checked.

    Raises: WrongUse.
    """
    for parent in parents:
        if not (isinstance(parent, str) and is_identity(parent)):
            parse(parent)
    return Request(
        check_name(name),
        tuple(check_alias(a) for a in aliases),
        check_text(note, "note", empty=True),
        tuple(check_score(s) for s in scores),
        tuple(parents),
    )


def check_base(variant: Variant, base: BaseRef) -> None:
    """Pass where the variant was made for the fleet's base.

    Raises: BadInput, naming both bases.
    """
    if variant.base.hash != base.hash:
        raise BadInput(
            f"adapter of another base: it was made for {_said(variant.base)}, this fleet is of {_said(base)}; "
            "publish it to a fleet of its own base"
        )


def _said(base: BaseRef) -> str:
    revision = f"@{base.revision}" if base.revision else ""
    return f"'{base.name}{revision}' (hash {base.hash[:12] or 'none'})"


def publish(index: Index, blobs: Blobs, variant: Variant, request: Request) -> Version:
    """Store a variant under a name, and return its version.

    Raises: BadInput, WrongUse, StoreBusy, DiskTrouble: the fleet is as before then, but for an orphan file perhaps.
    """
    index.check_writable()
    content = take_apart(variant)
    with index.read() as db:  # what is wrong with the request is told before a byte is written for it
        find_name(db, request.name)
        for parent in request.parents:
            _parent(db, parent)
    with blobs.shared():  # to the commit: see Blobs
        fresh = _store_new(index, blobs, content)
        with index.write() as db:
            if fresh is not None:
                _name_tensors(db, content, fresh)
            variant_id = _variant_row(db, content)
            version_id = _version_row(db, variant_id, content, request)
            for alias in request.aliases:
                put_alias(db, version_id, alias)
            put_scores(db, version_id, request.scores)
            return get_version(db, version_id)


def _store_new(index: Index, blobs: Blobs, content: Content) -> Fresh | None:
    """Put the tensors that the fleet lacks into one new blob; None where it lacks none.

    A tensor whose blob is gone or has lost bytes counts as lacking, so that publishing again mends a fleet.
    """
    new: dict[bytes, Tensor] = {}
    mended: set[bytes] = set()
    whole: dict[bytes, bool] = {}
    with index.read() as db:
        for hash, t in content.tensors.items():
            row = db.execute(
                "SELECT b.hash, b.n_bytes FROM tensor t JOIN blob b ON b.id = t.blob WHERE t.hash = ?", (hash,)
            ).fetchone()
            if row is None:
                new[hash] = t
                continue
            if row[0] not in whole:
                whole[row[0]] = blobs.is_whole(row[0], row[1])
            if not whole[row[0]]:
                new[hash] = t
                mended.add(hash)
    if not new:
        return None
    data, spots = pack(new)
    payload = sum(t.numel() * t.element_size() for t in new.values())
    return Fresh(blobs.put(data), len(data), payload, spots, frozenset(mended))


def _name_tensors(db: sqlite3.Connection, content: Content, fresh: Fresh) -> None:
    """Name the new blob and its tensors; those that another publisher stored meanwhile stay where it put them."""
    wanted = [
        h
        for h in fresh.spots
        if h in fresh.mended or db.execute("SELECT 1 FROM tensor WHERE hash = ?", (h,)).fetchone() is None
    ]
    if not wanted:
        return  # the other publisher had them all: our blob is an orphan, unless it is the very same one
    db.execute(
        "INSERT INTO blob (hash, n_bytes, payload) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        (fresh.hash, fresh.n_bytes, fresh.payload),
    )
    blob = db.execute("SELECT id FROM blob WHERE hash = ?", (fresh.hash,)).fetchone()[0]
    rows = []
    for hash in wanted:
        t = content.tensors[hash]
        form = (str(t.dtype).removeprefix("torch."), dump(list(t.shape)), t.numel() * t.element_size())
        db.execute("INSERT INTO form (dtype, shape, n_bytes) VALUES (?, ?, ?) ON CONFLICT DO NOTHING", form)
        form_id = db.execute("SELECT id FROM form WHERE dtype = ? AND shape = ?", form[:2]).fetchone()[0]
        rows.append((hash, blob, *fresh.spots[hash], form_id))
    db.executemany(
        "INSERT INTO tensor (hash, blob, slot, row, form) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (hash) DO UPDATE SET blob = excluded.blob, slot = excluded.slot, row = excluded.row",
        rows,
    )


def _variant_row(db: sqlite3.Connection, content: Content) -> int:
    """The row id of the variant, made with its tensors where the fleet has no variant of this identity."""
    row = db.execute("SELECT id FROM variant WHERE identity = ?", (content.identity,)).fetchone()
    if row is not None:
        return int(row[0])
    layout = hashlib.sha256(content.sites.encode()).digest()
    db.execute("INSERT INTO layout (hash, sites) VALUES (?, ?) ON CONFLICT DO NOTHING", (layout, content.sites))
    made = db.execute(
        "INSERT INTO variant (identity, manifest, layout, n_bytes, created) "
        "SELECT ?, ?, id, ?, ? FROM layout WHERE hash = ?",
        (content.identity, content.manifest, content.n_bytes, now(), layout),
    ).lastrowid
    assert made is not None
    db.executemany("INSERT INTO place (name) VALUES (?) ON CONFLICT DO NOTHING", [(key,) for key in content.hashes])
    linked = db.executemany(
        "INSERT INTO variant_tensor SELECT ?, p.id, t.id FROM place p, tensor t WHERE p.name = ? AND t.hash = ?",
        [(made, key, hash) for key, hash in content.hashes.items()],
    ).rowcount
    if content.hashes and linked != len(content.hashes):
        # Cannot be while we hold the lock, unless this disk ignores locks: then a gc took a tensor we had counted on.
        raise StoreBusy("a gc ran during this publish, on a disk that ignores flock; nothing changed, publish again")
    return made


def _version_row(db: sqlite3.Connection, variant: int, content: Content, request: Request) -> int:
    """The row id of the version: the latest one where it is this very variant, else a new one."""
    found = find_name(db, request.name)
    if found is None:
        db.execute("INSERT INTO name (name) VALUES (?)", (request.name,))
        found = find_name(db, request.name)
        assert found is not None
    name, last = found
    latest = db.execute(
        "SELECT id, variant FROM version WHERE name = ? ORDER BY number DESC LIMIT 1", (name,)
    ).fetchone()
    if latest is not None and latest[1] == variant:
        return int(latest[0])
    parents = [_parent(db, p) for p in request.parents]
    db.execute("UPDATE name SET last = ? WHERE id = ?", (last + 1, name))
    made = db.execute(
        "INSERT INTO version (name, number, variant, created, note, provenance) VALUES (?, ?, ?, ?, ?, ?)",
        (name, last + 1, variant, now(), request.note, content.provenance),
    ).lastrowid
    assert made is not None
    db.executemany("INSERT INTO parent VALUES (?, ?, ?, ?)", [(made, at, *p) for at, p in enumerate(parents)])
    return made


def _parent(db: sqlite3.Connection, parent: str) -> tuple[bytes, str]:
    """(identity, `name@3` or "") of a parent; an identity may be of another fleet."""
    if is_identity(parent):
        return bytes.fromhex(parent), ""
    version = get_version(db, find_version(db, parse(parent)))
    return bytes.fromhex(version.identity), version.ref
