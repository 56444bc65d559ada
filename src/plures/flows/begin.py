"""Begin a fleet, or note where the base of one is that was moved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from plures.core.errors import WrongUse
from plures.engine.model import reference
from plures.store import Store
from plures.tensors.variant import BaseRef


@dataclass(frozen=True)
class Begun:
    """The fleet's base; `was` is what it was called before, of a fleet that was there; None of a new one."""

    base: BaseRef
    was: BaseRef | None = None


def begin(path: str | Path, base: str, revision: str = "") -> Begun:
    """Make an empty fleet of `base`, a folder or hub id, in a new or empty folder.

    A fleet that is there, of the same weights under another name or place, notes where they are now.
    Raises: WrongUse where the folder is a fleet already, or has other files; BadInput for what is no base;
        Unreachable; DiskTrouble; StoreBusy.
    """
    ref = reference(base, revision)
    if (Path(path) / "fleet.db").exists():
        with Store.open(path) as store:
            was = store.base
            if was.hash == ref.hash and was != ref:
                store.move_base(ref)
                return Begun(ref, was)
            if was.hash != ref.hash:
                raise WrongUse(f"{str(path)!r} already is a fleet, of the base {was.name!r}, whose weights are others "
                               f"than those of {base!r}; give another folder")  # fmt: skip
    Store.create(path, ref).close()
    return Begun(ref)
