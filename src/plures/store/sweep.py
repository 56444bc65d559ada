"""gc: free what no version names."""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import dataclass

from plures.core.errors import BadInput, WrongUse
from plures.store.blobs import Blobs, Spot, pack
from plures.store.index import Index
from plures.tensors.safe import tensor_hash


@dataclass(frozen=True)
class Sparse:
    """A blob to be rewritten: its row, and (row, hash, spot) of each tensor in it that is still named."""

    id: int
    hash: bytes
    live: tuple[tuple[int, bytes, Spot], ...]


def gc(index: Index, blobs: Blobs, dry: bool, dead_share: float) -> int:
    """Free what nothing names, and return the bytes freed of blobs/ and tmp/ (that would be, where `dry`).

    Rows go first, in a transaction that is on the disk before a file is deleted; a crash in between leaves orphans.
    Raises: StoreBusy, DiskTrouble, WrongUse.
    """
    if not 0 <= dead_share <= 1:
        raise WrongUse(f"dead_share must be in [0, 1], got {dead_share}; 0.5 rewrites blobs that are half dead")
    index.check_writable()
    with blobs.alone():  # a publisher's fresh blob, which no row names yet, must not be taken for an orphan
        with index.write(keep=not dry) as db:
            _drop_rows(db)
            sparse = _sparse(db, dead_share)
            named = {row[0] for row in db.execute("SELECT hash FROM blob")}
        before = [f for f in blobs.files() if f.ours]
        present = {f.hash for f in before}
        freed = 0
        for blob in sparse:
            new = _rewrite(index, blobs, blob, dry)
            if new is None:
                continue
            named.discard(blob.hash)
            named.add(new[0])
            freed -= 0 if new[0] in present else new[1]
        for found in before:
            if found.hash is None or found.hash not in named:
                freed += found.n_bytes
                if not dry:
                    blobs.remove(found.path)
    return freed


def _drop_rows(db: sqlite3.Connection) -> None:
    """Delete the variants without a version, then what only they named."""
    db.execute("DELETE FROM variant WHERE id NOT IN (SELECT variant FROM version)")
    db.execute("DELETE FROM tensor WHERE id NOT IN (SELECT tensor FROM variant_tensor)")
    db.execute("DELETE FROM blob WHERE id NOT IN (SELECT blob FROM tensor)")
    db.execute("DELETE FROM layout WHERE id NOT IN (SELECT layout FROM variant)")


def _sparse(db: sqlite3.Connection, dead_share: float) -> list[Sparse]:
    """The blobs of whose payload more than `dead_share` is dead."""
    rows = db.execute(
        "SELECT b.id, b.hash, b.payload, SUM(f.n_bytes) FROM blob b "
        "JOIN tensor t ON t.blob = b.id JOIN form f ON f.id = t.form GROUP BY b.id"
    ).fetchall()
    out = []
    for id, hash, payload, live_bytes in rows:
        if payload - live_bytes > dead_share * payload:
            live = db.execute("SELECT id, hash, slot, row FROM tensor WHERE blob = ?", (id,)).fetchall()
            out.append(Sparse(id, hash, tuple((tensor, h, (slot, row)) for tensor, h, slot, row in live)))
    return out


def _rewrite(index: Index, blobs: Blobs, old: Sparse, dry: bool) -> tuple[bytes, int] | None:
    """Move the live tensors of a blob into a new one: its hash and size. None where the old one is damaged.

    A damaged blob stays as it is for fsck to name: what can be saved of it is not for gc to decide.
    """
    try:
        found = blobs.read(old.hash, (spot for _, _, spot in old.live))
    except BadInput:
        return None
    if any(tensor_hash(found[spot]) != hash.hex() for _, hash, spot in old.live):
        return None
    data, spots = pack({hash: found[spot] for _, hash, spot in old.live})
    if dry:
        return hashlib.sha256(data).digest(), len(data)
    new = blobs.put(data)
    payload = sum(t.numel() * t.element_size() for t in found.values())
    with index.write() as db:
        db.execute("INSERT INTO blob (hash, n_bytes, payload) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                   (new, len(data), payload))  # fmt: skip
        id = db.execute("SELECT id FROM blob WHERE hash = ?", (new,)).fetchone()[0]
        db.executemany("UPDATE tensor SET blob = ?, slot = ?, row = ? WHERE id = ?",
                       [(id, *spots[hash], tensor) for tensor, hash, _ in old.live])  # fmt: skip
        db.execute("DELETE FROM blob WHERE id = ?", (old.id,))
    return new, len(data)
