"""Whether a fleet or a folder is whole, and what a command ends with."""

from __future__ import annotations

from pathlib import Path

import pytest

from plures.cli.app import main
from plures.store import Store
from plures.tensors.safe import file_hash


def command(*said: object) -> int:
    """The exit code of `plures …`."""
    with pytest.raises(SystemExit) as done:
        main([str(s) for s in said])
    return int(done.value.code or 0)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder and what is in it, hidden ones too."""
    return {str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def sound(path: Path) -> dict[str, str]:
    """The versions of a fleet by identity, each loaded; the fleet has no problem."""
    with Store.open(path) as store:
        assert store.fsck().problems == ()
        found = {v.ref: v.identity for v in store.versions(all=True)}
        for ref, identity in found.items():
            assert store.load(ref, packed=True).identity() == identity
    return found
