"""The fleet on disk: a folder with `fleet.db`, `blobs/` and `tmp/`."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from plures.core.errors import BadInput, WrongUse, disk
from plures.store import check, index, load, publish, schema, sweep, versions
from plures.store.blobs import Blobs
from plures.store.by_identity import load_identity
from plures.store.names import check_alias, check_name, check_text, parse, shown
from plures.store.unpack import Codecs
from plures.store.versions import Score, Version
from plures.tensors.together import sync_folder
from plures.tensors.variant import BaseRef, Variant

_DATABASE = "fleet.db"
_UNFINISHED = re.compile(r"[0-9a-f]{32}\.db(-wal|-shm|-journal)?")


class Store:
    """One base and all its published variants; equal tensors are stored once, whoever owns them.

    A store may be used from several threads, which take turns at the index and read blobs side by side; a forked
    process opens its own. The folder must be on a disk of this machine: SQLite's WAL does not work over a network.
    A folder that may not be written is opened for reading, as it stands at that moment.
    """

    def __init__(self, path: Path, base: BaseRef, opened: index.Index, blobs: Blobs) -> None:
        """For `create` and `open`, which make one."""
        self.path = path
        self.base = base
        self._index = opened
        self._blobs = blobs
        self._codecs = Codecs()

    @classmethod
    def create(cls, path: Path | str, base: BaseRef, *, wait_s: float = 30.0) -> Self:
        """Make an empty fleet of `base` in a new or empty folder, and open it.

        `fleet.db` is made whole in tmp/ and renamed, so a folder with a `fleet.db` is a fleet, and a creation that was
        cut short can be repeated.
        Raises: WrongUse (a fleet, or other files, are there; the base has no hash), DiskTrouble, StoreBusy.
        """
        path = Path(path)
        check_text(base.name, "base name")
        check_text(base.revision, "base revision", empty=True)
        check_text(base.hash, "base hash")  # without it, adapters of another base could not be told
        blobs = Blobs(path, wait_s)
        _check_free(path)
        with disk(path):
            path.mkdir(parents=True, exist_ok=True)
        with blobs.alone():
            _check_free(path)
            with disk(path):
                blobs.folder.mkdir(exist_ok=True)
                blobs.tmp.mkdir(exist_ok=True)
                temporary = blobs.temporary("db")
                index.create(temporary, schema.APPLICATION_ID, schema.MIGRATIONS, lambda db: db.execute(
                    "INSERT INTO base VALUES (1, ?, ?, ?)", (base.name, base.revision, base.hash)))  # fmt: skip
                os.replace(temporary, path / _DATABASE)
                sync_folder(path)
                sync_folder(path.parent)
        return cls.open(path, wait_s=wait_s)

    @classmethod
    def open(cls, path: Path | str, *, wait_s: float = 30.0) -> Self:
        """Open a fleet; `wait_s` is how long to wait for another process before StoreBusy.

        Raises: BadInput (not a fleet, a damaged one, or one of a newer Plures), StoreBusy, DiskTrouble.
        """
        path, there = Path(path), False
        with disk(path, "read"), suppress(FileNotFoundError, NotADirectoryError):
            there = stat.S_ISREG(os.stat(path / _DATABASE).st_mode)
        if not there:
            kind = "is not a fleet: it has no fleet.db" if path.is_dir() else "is not a folder"
            raise BadInput(f"{str(path)!r} {kind}; make one with `plures init`")
        opened = index.Index(path / _DATABASE, wait_s)
        try:
            with opened.read() as db:
                row = db.execute("SELECT name, revision, hash FROM base").fetchone()
            if row is None:
                raise BadInput(f"{str(path)!r} is damaged: its fleet.db names no base; restore it from a copy")
        except BaseException:
            opened.close()
            raise
        return cls(path, BaseRef(*row), opened, Blobs(path, wait_s))

    def close(self) -> None:
        """Close the fleet; a second close does nothing."""
        self._index.close()

    def __enter__(self) -> Self:
        """The store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the fleet."""
        self.close()

    def move_base(self, base: BaseRef) -> None:
        """Note where the base is now; a fleet that may not be written has it there for this object alone.

        Raises: BadInput where it is another base, by its hash; WrongUse, StoreBusy, DiskTrouble.
        """
        if base.hash != self.base.hash:
            raise BadInput(f"{str(self.path)!r} is a fleet of {self.base.name!r}, not of {base.name!r}: other weights")
        if base == self.base:
            return
        check_text(base.name, "base name")
        check_text(base.revision, "base revision", empty=True)
        if self._index.writable:
            with self._index.write() as db:
                db.execute("UPDATE base SET name = ?, revision = ?", (base.name, base.revision))
        self.base = base

    def publish(
        self,
        variant: Variant,
        name: str,
        *,
        aliases: Sequence[str] = (),
        note: str = "",
        scores: Sequence[Score] = (),
        parents: Sequence[str] = (),
    ) -> Version:
        """Store a variant as the next version of `name`, and return that version.

        Idempotent: where the latest version already is this very variant (equal identity), that version is returned
        with its own note, provenance and parents; aliases and scores are still set. `parents` are references into
        this fleet, or identities. All or nothing, whatever happens.
        Raises: BadInput (another base, a variant that contradicts itself), WrongUse (a name, alias, score or parent
        that cannot be), StoreBusy, DiskTrouble.
        """
        request = publish.check_request(name, aliases, note, scores, parents)
        publish.check_base(variant, self.base)
        return publish.publish(self._index, self._blobs, variant, request)

    def names(self) -> list[str]:
        """Every name that has a version, in order."""
        with self._index.read() as db:
            return versions.list_names(db)

    def versions(self, name: str | None = None, all: bool = False) -> list[Version]:
        """The latest version of each name (of `name`, where given); with `all`, every version, oldest first.

        Raises: WrongUse where there is no such name.
        """
        ref = None if name is None else parse(check_name(name))
        with self._index.read() as db:
            id = None
            if ref is not None:
                versions.find_version(db, ref)  # the error for an unknown name, with the nearest one
                found = versions.find_name(db, ref.name)
                assert found is not None
                id = found[0]
            return versions.list_versions(db, id, all)

    def resolve(self, ref: str) -> Version:
        """The version that `name` (the latest), `name@3` or `name@alias` means.

        Raises: WrongUse where there is none, with the nearest name.
        """
        parsed = parse(ref)
        with self._index.read() as db:
            return versions.get_version(db, versions.find_version(db, parsed))

    def load(self, ref: str, *, check: bool = True, packed: bool = False) -> Variant:
        """The variant of a version, with that version's provenance; `check=False` skips hashing its tensors.

        One that is stored packed comes as the plain LoRA that it stands for; with `packed` as it is stored.

        Raises: WrongUse where there is no such version, BadInput where a blob is damaged, naming both.
        """
        return load.load(self._index, self._blobs, parse(ref), check, None if packed else self._codecs)

    def load_identity(self, identity: str) -> Variant:
        """A variant by its identity in hex, whatever names point at it; one that is stored packed as plain LoRA.

        Raises: WrongUse where no version is that variant, BadInput where a blob is damaged.
        """
        return load_identity(self._index, self._blobs, identity, self._codecs)

    @property
    def writable(self) -> bool:
        """Whether this process may write the fleet."""
        return self._index.writable

    @property
    def data_version(self) -> tuple[int, int]:
        """Numbers that change when the fleet does: by another process, or through this object."""
        return self._index.data_version

    def manifest(self, ref: str) -> dict[str, Any]:
        """The manifest of a version, as `Variant.manifest` gives it; no tensor is read.

        Raises: WrongUse.
        """
        parsed = parse(ref)
        with self._index.read() as db:
            return load.read_manifest(db, versions.find_version(db, parsed))[1]

    def alias(self, ref: str, alias: str) -> Version:
        """Point an alias at a version, taking it from the version it pointed at before; the version is returned.

        Raises: WrongUse, StoreBusy, DiskTrouble.
        """
        parsed, alias = parse(ref), check_alias(alias)
        with self._index.write() as db:
            id = versions.find_version(db, parsed)
            versions.put_alias(db, id, alias)
            return versions.get_version(db, id)

    def unalias(self, name: str, alias: str) -> None:
        """Delete an alias; the version stays.

        Raises: WrongUse where there is no such name or alias.
        """
        ref = parse(f"{check_name(name)}@{check_alias(alias)}")
        with self._index.write() as db:
            id = versions.find_version(db, ref)
            db.execute("DELETE FROM alias WHERE version = ? AND alias = ?", (id, alias))

    def remove(self, ref: str, *, all: bool = False, force: bool = False) -> list[str]:
        """Remove a version, or with `all` every version of a name; returns their references. `gc` frees the bytes.

        Its scores and aliases go with it; its number is not given again.
        Raises: WrongUse where there is none, where a bare name is given without `all`, or where an alias points at
        one of them and `force` is not set.
        """
        parsed = parse(ref)
        bare = parsed.number is None and parsed.alias is None
        if all and not bare:
            raise WrongUse(f"{ref!r} is one version and --all means every one; give {parsed.name!r}, or no --all")
        with self._index.write() as db:
            one = versions.find_version(db, parsed)
            if bare and not all:
                said = versions.get_version(db, one).ref
                raise WrongUse(f"{ref!r} says no version; give {said!r} for the latest, or --all for every one")
            same = "SELECT id FROM version WHERE name = (SELECT name FROM version WHERE id = ?) ORDER BY number"
            ids = [r[0] for r in db.execute(same, (one,))] if all else [one]
            gone = [versions.get_version(db, id) for id in ids]
            held = [f"{v.name}@{a}" for v in gone for a in v.aliases]
            if held and not force:
                raise WrongUse(f"{ref!r} has the alias {versions.some(held)}; move it first, or force it (--force)")
            db.executemany("DELETE FROM version WHERE id = ?", [(id,) for id in ids])
        return [v.ref for v in gone]

    def score(self, ref: str, dataset: str, metric: str, value: float, **detail: Any) -> None:
        """Note a number measured on a version; the same metric on the same dataset takes the old one's place.

        Raises: WrongUse where there is no such version, or the value is not finite.
        """
        parsed, columns = parse(ref), versions.check_score(Score(dataset, metric, value, detail))
        with self._index.write() as db:
            versions.put_scores(db, versions.find_version(db, parsed), [columns])

    def scores(self, ref: str) -> list[Score]:
        """The scores of a version, by dataset and metric.

        Raises: WrongUse.
        """
        parsed = parse(ref)
        with self._index.read() as db:
            return versions.get_scores(db, versions.find_version(db, parsed))

    def lineage(self, ref: str) -> dict[str, Any]:
        """Where a version came from: ref, identity, base, recipe, seed, data fingerprint and parents.

        A parent is {"ref", "identity", "present"}: whether a version of this fleet still is that variant.
        Raises: WrongUse.
        """
        parsed = parse(ref)
        with self._index.read() as db:
            id = versions.find_version(db, parsed)
            said, manifest, identity = load.read_manifest(db, id)
            rows = db.execute(
                "SELECT ref, hash, EXISTS (SELECT 1 FROM variant x JOIN version v ON v.variant = x.id "
                "WHERE x.identity = hash) FROM parent WHERE version = ? ORDER BY at",
                (id,),
            ).fetchall()
        provenance = manifest["provenance"]
        return {
            "ref": said,
            "identity": identity.hex(),
            "base": manifest["base"],
            "recipe": provenance.get("recipe"),
            "seed": provenance.get("seed"),
            "data": provenance.get("data"),
            "parents": [{"ref": r or None, "identity": h.hex(), "present": bool(here)} for r, h, here in rows],
        }

    def usage(self) -> dict[str, int]:
        """Bytes and counts: `bytes` of all blob files, `unshared_bytes` had every version its own tensors.

        `index_bytes` is the size of fleet.db and its log, the price of the bookkeeping.
        """
        with self._index.read() as db:
            row = db.execute(
                "SELECT (SELECT COALESCE(SUM(n_bytes), 0) FROM blob), (SELECT COUNT(*) FROM blob), "
                "(SELECT COALESCE(SUM(x.n_bytes), 0) FROM version v JOIN variant x ON x.id = v.variant), "
                "(SELECT COUNT(*) FROM tensor), (SELECT COUNT(*) FROM variant), (SELECT COUNT(*) FROM version)"
            ).fetchone()
        with disk(self.path, "read"):
            files = [p for p in (self.path / _DATABASE, self.path / f"{_DATABASE}-wal") if p.exists()]
            index_bytes = sum(p.stat().st_size for p in files)
        keys = ("bytes", "n_blobs", "unshared_bytes", "n_tensors", "n_variants", "n_versions")
        return {**dict(zip(keys, map(int, row), strict=True)), "index_bytes": index_bytes}

    def gc(self, *, dry: bool = False, dead_share: float = 0.5) -> int:
        """Free what no version names; returns the bytes freed, or with `dry` those that would be.

        Blobs of which more than `dead_share` is dead are rewritten with what lives in them. Publishers wait for it.
        Raises: StoreBusy, DiskTrouble, WrongUse.
        """
        return sweep.gc(self._index, self._blobs, dry, dead_share)

    def fsck(self, *, quick: bool = False) -> check.Report:
        """Prove blobs, tensors, identities and the index; `quick` does not hash single tensors again.

        Raises: StoreBusy while a gc runs, DiskTrouble.
        """
        return check.fsck(self._index, self._blobs, quick)


def _check_free(path: Path) -> None:
    """Pass where a fleet may be made at `path`: nothing there, or what a creation that was cut short leaves.

    Raises: WrongUse.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise WrongUse(f"{shown(str(path))} is a file; give a new or empty folder for the fleet")
    with disk(path, "list"):
        if (path / _DATABASE).exists():
            raise WrongUse(f"{shown(str(path))} already is a fleet; open it, or give another folder")
        found = {p.name for p in path.iterdir() if p.name not in ("gate", "lock")}
        for name, leftover in (("blobs", None), ("tmp", _UNFINISHED)):
            folder = path / name
            if folder.is_dir() and all(leftover and leftover.fullmatch(p.name) for p in folder.iterdir()):
                found.discard(name)
    if found:
        raise WrongUse(f"{shown(str(path))} is not empty ({versions.some(sorted(found))}); give a new or empty folder")
