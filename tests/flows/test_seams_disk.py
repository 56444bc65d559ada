"""Full disks where parts meet: exports, imports, packs and merges are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import seaming
from whole import sound, tree

import plures
from full_disk import room, trouble
from plures.bridges.adapter_folder import write_folder
from plures.core.errors import DiskTrouble, WrongUse
from plures.core.recipe import load
from plures.flows.merge import merge
from plures.flows.merge_recipe import parse
from plures.flows.pack import pack
from plures.flows.recipes import PackRecipe
from tiny import make_base


def failing(real: Any, after: int) -> tuple[Any, list[int]]:
    """The function, with a disk that is full at its n-th call and from then on; and how many calls there were."""
    calls = [0]

    def call(*args: Any, **how: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **how)

    return call, calls


def full_at_each(monkeypatch: pytest.MonkeyPatch, name: str, do: Callable[[], Any], check: Callable[[], None]) -> int:
    """Let the disk be full at the first call of `os.<name>`, the second …, until `do` ends; `check` after each.

    Returns how often it was full.
    """
    for after in range(60):
        with monkeypatch.context() as patch:
            call, calls = failing(getattr(os, name), after)
            patch.setattr(os, name, call)
            said = trouble(do)
        if not said:
            assert calls[0] <= after
            return after
        assert "the disk is full" in said and "\n" not in said
        check()
    raise AssertionError("it never ended")


@pytest.mark.parametrize("form", ["peft", "lora", "merged"])
def test_an_export_is_whole_or_not_there(
    own_fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    out, before = tmp_path / "to" / "out", sound(own_fleet)
    (tmp_path / "to").mkdir()
    with plures.Fleet(own_fleet) as fleet:
        plain = tree(fleet["mos"].export(tmp_path / "plain", form))

        def absent() -> None:
            assert tree(tmp_path / "to") == {} and not out.exists()

        sizes = sorted(p.stat().st_size for p in (tmp_path / "plain").iterdir())
        for limit in (0, sizes[0] - 1, *sizes[:-1]):
            with room(limit), pytest.raises(DiskTrouble, match="the disk is full"):
                fleet["mos"].export(out, form)
            absent()
        if form != "merged":  # its base is loaded each time
            full_at_each(monkeypatch, "fsync", lambda: fleet["mos"].export(out, form), absent)
            assert tree(out) == plain
            shutil.rmtree(out)
            assert full_at_each(monkeypatch, "rename", lambda: fleet["mos"].export(out, form), absent) == 1
        else:
            fleet["mos"].export(out, form)
        assert tree(out) == plain
        with pytest.raises(WrongUse, match="not empty"):
            fleet["mos"].export(out, form)
        (tmp_path / "mount").mkdir()
        inode = (tmp_path / "mount").stat().st_ino
        assert tree(fleet["mos"].export(tmp_path / "mount", form)) == plain
        assert (tmp_path / "mount").stat().st_ino == inode
    assert sound(own_fleet) == before


def test_an_import_that_does_not_fit_changes_nothing(
    own_fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with plures.Fleet(own_fleet) as fleet:
        other = seaming.changed(fleet["lora"].load(), 0.5)
        write_folder(other, tmp_path / "other")
        before, blobs = sound(own_fleet), tree(own_fleet / "blobs")

        def same() -> None:
            assert sound(own_fleet) == before

        def bring() -> Any:
            return fleet.bring_in(tmp_path / "other", "other")

        with room(500), pytest.raises(DiskTrouble):
            bring()
        same()
        assert tree(own_fleet / "blobs") == blobs
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(os.fsync, 0)[0])
            with pytest.raises(DiskTrouble):
                bring()
        same()
        assert bring().version.identity == other.identity()


def test_a_pack_goes_on_after_a_full_disk_to_the_same_bytes(
    own_fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(out: str) -> PackRecipe:
        said = {"fleet": str(own_fleet), "out": str(tmp_path / out), "variants": ["lora", "mos"]}
        return load(PackRecipe, said, ["pack.method=rtn"])

    def whole() -> None:
        if (tmp_path / "out.fleet" / "fleet.db").exists():
            sound(tmp_path / "out.fleet")

    pack(recipe("plain.fleet"))
    before, failed = sound(own_fleet), 0
    for limit in (0, 2000, 6000):
        with room(limit):
            said = trouble(lambda: pack(recipe("out.fleet")))
        failed += bool(said)
        assert "\n" not in said
        whole()

    failed += full_at_each(monkeypatch, "replace", lambda: pack(recipe("out.fleet")), whole)
    assert failed >= 4
    assert sound(tmp_path / "out.fleet") == sound(tmp_path / "plain.fleet") and sound(own_fleet) == before


def test_a_merge_whose_disk_fills_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [str(make_base(tmp_path / "m" / f"m{i}", seed=i)) for i in range(2)]
    said = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 0.5}} for m in models]}
    merge(parse(said), tmp_path / "plain")
    plain = {n: h for n, h in tree(tmp_path / "plain").items() if n.endswith(".safetensors")}
    (tmp_path / "to").mkdir()
    for limit in (0, 1000, 40_000):
        with room(limit), pytest.raises(DiskTrouble, match="the disk is full"):
            merge(parse(said), tmp_path / "to" / "out")
        assert list((tmp_path / "to").iterdir()) == []

    def absent() -> None:
        assert list((tmp_path / "to").iterdir()) == []

    assert full_at_each(monkeypatch, "fsync", lambda: merge(parse(said), tmp_path / "to" / "out"), absent) >= 2
    assert plain.items() <= tree(tmp_path / "to" / "out").items()
