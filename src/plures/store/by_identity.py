"""Loading a variant by what it is, whatever names point at it."""

from __future__ import annotations

from plures.core.errors import WrongUse
from plures.store import load
from plures.store.blobs import Blobs
from plures.store.index import Index
from plures.store.names import Ref, is_identity, shown
from plures.store.unpack import Codecs
from plures.tensors.variant import Variant


def load_identity(index: Index, blobs: Blobs, identity: str, codecs: Codecs | None = None) -> Variant:
    """The variant of an identity, every tensor proven; one that is packed is decoded, where `codecs` are given.

    Raises: WrongUse where no version of the fleet has it; BadInput where a blob or the index is damaged.
    """
    before = None
    while True:
        with index.read() as db:
            row = db.execute(
                "SELECT n.name, v.number FROM variant x JOIN version v ON v.variant = x.id "
                "JOIN name n ON n.id = v.name WHERE x.identity = ? ORDER BY v.id LIMIT 1",
                (bytes.fromhex(identity) if is_identity(identity) else b"",),
            ).fetchone()
        if row is None:
            raise WrongUse(f"no version of this fleet is the variant {shown(identity[:12])}")
        try:
            return load.load(index, blobs, Ref(row[0], number=row[1]), check=True, codecs=codecs)
        except WrongUse:  # removed since we looked; another version may still be this variant
            if row == before:
                raise
            before = row
