"""fsck: prove that the fleet is what was published."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass

from plures.core.errors import BadInput, DiskTrouble
from plures.store.blobs import Blobs, Spot
from plures.store.index import Index
from plures.store.load import read_manifest, tensors_of
from plures.store.versions import some
from plures.tensors import safe
from plures.tensors.variant import identity_of


@dataclass(frozen=True)
class Report:
    """What fsck found. `problems` are losses, one line each; `reclaimable` are files that gc will delete."""

    problems: tuple[str, ...]
    reclaimable: tuple[str, ...]
    reclaimable_bytes: int
    n_blobs: int
    n_tensors: int
    n_variants: int
    n_versions: int

    @property
    def ok(self) -> bool:
        """Whether nothing is lost or damaged."""
        return not self.problems


@dataclass(frozen=True)
class BlobRow:
    """A blob by the index: the spot, hash, dtype and shape of each of its tensors, and the versions that use it."""

    hash: bytes
    n_bytes: int
    tensors: tuple[tuple[Spot, bytes, str, str], ...]
    users: tuple[str, ...]


def fsck(index: Index, blobs: Blobs, quick: bool) -> Report:
    """Prove every blob, tensor, variant and version; `quick` trusts a tensor whose blob has the right SHA-256.

    Raises: StoreBusy where a gc is running, DiskTrouble where the fleet may not be read.
    """
    problems: list[str] = []
    reclaimable: list[str] = []
    n_reclaimable, known = 0, False
    counts: list[int] = [0, 0, 0, 0]
    rows: list[BlobRow] = []
    with blobs.shared():
        # Files first: a version published after the listing then only has files that nobody asks the listing for.
        files = blobs.files()
        try:
            with index.read() as db:
                problems += _check_database(db)
                counts = [int(db.execute(f"SELECT COUNT(*) FROM {t}").fetchone()[0])
                          for t in ("blob", "tensor", "variant", "version")]  # fmt: skip
                problems += _check_versions(db)
                rows = _blob_rows(db)
        except DiskTrouble:
            raise
        except BadInput as error:
            problems.append(str(error))
        else:
            known = True
        for row in rows:
            problem = _check_blob(blobs, row, quick)
            if problem is not None:
                used = f"used by {some(row.users)}" if row.users else "used by no version"
                next_step = "restore that file from a copy, or delete it and publish the variant again"
                problems.append(f"blob {row.hash.hex()}: {problem}; {used}; {next_step}")
        named = {row.hash for row in rows}
        for found in files:
            where = str(found.path.relative_to(blobs.root))
            if not found.ours:
                problems.append(f"{where!r} was not put there by Plures; move it away")
            elif known and found.hash not in named:
                reclaimable.append(where)
                n_reclaimable += found.n_bytes
    return Report(tuple(problems), tuple(reclaimable), n_reclaimable, *counts)


def _check_database(db: sqlite3.Connection) -> list[str]:
    """What SQLite itself finds wrong."""
    found = [str(r[0]) for r in db.execute("PRAGMA integrity_check(10)")]
    out = [f"fleet.db is damaged: {line}; restore it from a copy" for line in found if line != "ok"]
    for table, row, parent, _ in db.execute("PRAGMA foreign_key_check"):
        missing = f"row {row} of {table!r} refers to a missing {parent!r}"
        out.append(f"fleet.db is damaged: {missing}; restore it from a copy")
    return out


def _check_versions(db: sqlite3.Connection) -> list[str]:
    """Versions whose tensors or manifest are not those of their identity, or whose number is above the name's last."""
    out = []
    for (id,) in db.execute("SELECT id FROM version ORDER BY id").fetchall():
        try:
            said, manifest, identity = read_manifest(db, id)
            hashes = {name: where[0] for name, where in tensors_of(db, id).items()}
            if identity_of(manifest, {k: h.hex() for k, h in hashes.items()}) != identity.hex():
                out.append(f"{said!r}: its tensors or its manifest are not those of its identity {identity.hex()}; "
                           "restore fleet.db from a copy, or remove the version and publish it again")  # fmt: skip
        except (TypeError, KeyError, ValueError) as error:
            out.append(f"version row {id} cannot be read ({error!r}); restore fleet.db from a copy")
    high = "SELECT n.name, v.number FROM version v JOIN name n ON n.id = v.name WHERE v.number > n.last"
    out += [f"'{name}@{number}': its number is above the last one given; restore fleet.db from a copy"
            for name, number in db.execute(high)]  # fmt: skip
    return out


def _blob_rows(db: sqlite3.Connection) -> list[BlobRow]:
    """Every blob with its tensors and users."""
    out = []
    for id, hash, n_bytes in db.execute("SELECT id, hash, n_bytes FROM blob ORDER BY id").fetchall():
        tensors = db.execute(
            "SELECT t.slot, t.row, t.hash, f.dtype, f.shape FROM tensor t JOIN form f ON f.id = t.form "
            "WHERE t.blob = ?",
            (id,),
        ).fetchall()
        users = db.execute(
            "SELECT DISTINCT n.name || '@' || v.number FROM tensor t JOIN variant_tensor r ON r.tensor = t.id "
            "JOIN version v ON v.variant = r.variant JOIN name n ON n.id = v.name WHERE t.blob = ? "
            "ORDER BY n.name, v.number",
            (id,),
        ).fetchall()
        out.append(BlobRow(hash, n_bytes, tuple(((r[0], r[1]), *r[2:]) for r in tensors), tuple(u[0] for u in users)))
    return out


def _check_blob(blobs: Blobs, row: BlobRow, quick: bool) -> str | None:
    """What is wrong with a blob, or None."""
    path = blobs.path(row.hash)
    if not path.is_file():
        return "its file is missing"
    if (size := path.stat().st_size) != row.n_bytes:
        return f"its file has {size} bytes instead of {row.n_bytes}"
    try:
        if safe.file_hash(path) != row.hash.hex():
            return "its bytes were changed: their SHA-256 is not its name"
        found = safe.header(path)
        for (slot, at), _, _, shape in row.tensors:
            stack = found.get(str(slot), {}).get("shape") or [0]
            if stack[1:] != json.loads(shape) or not at < stack[0]:
                return f"it holds no tensor {slot}[{at}] of shape {shape}"
        if quick:
            return None
        read = blobs.read(row.hash, (t[0] for t in row.tensors))
    except BadInput as error:
        return str(error)
    for spot, hash, dtype, _ in row.tensors:
        if str(read[spot].dtype) != f"torch.{dtype}" or safe.tensor_hash(read[spot]) != hash.hex():
            return f"tensor {spot[0]}[{spot[1]}] in it is not the one that the index names"
    return None
