"""Loading: a version becomes a variant again, every tensor proven by its hash."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

from plures.core.errors import BadInput
from plures.store.blobs import Blobs, Spot
from plures.store.content import whole_manifest
from plures.store.index import Index
from plures.store.names import Ref
from plures.store.unpack import GROUP, METHOD, SHARED, Codecs, as_plain
from plures.store.versions import find_version
from plures.tensors.safe import tensor_hash
from plures.tensors.variant import Variant, from_flat, identity_of

if TYPE_CHECKING:
    from torch import Tensor

Where = dict[str, tuple[bytes, bytes, Spot]]  # {flat name: (tensor hash, blob hash, spot)}


def read_manifest(db: sqlite3.Connection, version: int) -> tuple[str, dict[str, Any], bytes]:
    """(`name@3`, manifest, identity) of a version by its row id."""
    name, number, manifest, sites, provenance, identity = db.execute(
        "SELECT n.name, v.number, x.manifest, l.sites, v.provenance, x.identity FROM version v "
        "JOIN name n ON n.id = v.name JOIN variant x ON x.id = v.variant JOIN layout l ON l.id = x.layout "
        "WHERE v.id = ?",
        (version,),
    ).fetchone()
    return f"{name}@{number}", whole_manifest(manifest, sites, provenance), identity


def tensors_of(db: sqlite3.Connection, version: int) -> Where:
    """Where every tensor of a version is."""
    rows = db.execute(
        "SELECT p.name, t.hash, b.hash, t.slot, t.row FROM version v JOIN variant_tensor r ON r.variant = v.variant "
        "JOIN place p ON p.id = r.place JOIN tensor t ON t.id = r.tensor JOIN blob b ON b.id = t.blob WHERE v.id = ?",
        (version,),
    )
    return {name: (hash, blob, (slot, row)) for name, hash, blob, slot, row in rows}


def load(index: Index, blobs: Blobs, ref: Ref, check: bool, codecs: Codecs | None = None) -> Variant:
    """The variant of a version; one that is packed is decoded, where `codecs` are given.

    No lock is held while files are read, so that a long gc never stops a server: where a file is gone because gc moved
    its tensors, the index now says where to, and we read again.
    Raises: WrongUse (no such version), BadInput (a blob or the index is damaged).
    """
    before: Where | None = None
    while True:
        with index.read() as db:
            id = find_version(db, ref)
            said, manifest, identity = read_manifest(db, id)
            where = tensors_of(db, id)
        if identity_of(manifest, {k: w[0].hex() for k, w in where.items()}) != identity.hex():
            raise BadInput(f"{said!r}: the index no longer matches its identity; restore fleet.db from a copy")
        try:
            if manifest["method"] == METHOD and codecs is not None:
                return _decoded(blobs, where, said, check, manifest, codecs)
            return from_flat(manifest, _read_all(blobs, where, said, check), repr(said))
        except BadInput:
            if where == before:
                raise
            before = where


def _decoded(blobs: Blobs, where: Where, said: str, check: bool, manifest: dict[str, Any], codecs: Codecs) -> Variant:
    """A packed variant as plain LoRA; what many share is read once."""
    hash = where[SHARED][0].hex() if SHARED in where else ""
    codec = codecs.find(manifest, hash)
    read = {k: w for k, w in where.items() if k != SHARED or codec is None}
    packed = from_flat(manifest, _read_all(blobs, read, said, check), repr(said))
    try:
        if codec is None:
            codec = codecs.make(manifest, hash, packed.pool[GROUP]["shared"])
        return as_plain(packed, codec)
    except (BadInput, KeyError) as error:
        raise BadInput(f"{said!r} cannot be decoded: {error}") from error


def _read_all(blobs: Blobs, where: Where, said: str, check: bool) -> dict[str, Tensor]:
    """Every tensor by its flat name; each name gets memory of its own.

    Raises: BadInput, naming the blob and the version.
    """
    by_blob: dict[bytes, list[str]] = {}
    for name, (_, blob, _) in where.items():
        by_blob.setdefault(blob, []).append(name)
    out: dict[str, Tensor] = {}
    for blob, names in by_blob.items():
        file = f"blob {blob.hex()} of {said!r}"
        next_step = "run fsck; restore that file from a copy, or delete it and publish the variant again"
        try:
            found = blobs.read(blob, (where[n][2] for n in names))
        except BadInput as error:
            raise BadInput(f"{file} cannot be read: {error}; {next_step}") from error
        proven: set[Spot] = set()
        for name in names:
            hash, _, spot = where[name]
            if check and spot not in proven and tensor_hash(found[spot]) != hash.hex():
                raise BadInput(f"{file} is damaged: tensor {name!r} is not what was published; {next_step}")
            proven.add(spot)
            # A row is a view of its stack, and two names may have one row: training one must not change the other.
            out[name] = found[spot].clone()
    return {name: out[name] for name in where}
