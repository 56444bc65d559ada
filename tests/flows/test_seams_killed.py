"""Commands that are killed (kill -9) where parts meet, and begun again."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import seaming
from pyarrow import parquet
from whole import sound, tree

import plures
from forked import processes
from plures.store import Store
from plures.tensors.safe import file_hash
from tiny import sentences


class Killed:
    """A command that is killed at random changes of a folder, and begun again each time."""

    def __init__(self, argv: list[str], folder: Path, tmp_path: Path) -> None:
        self.argv, self.folder, self.count = argv, folder, tmp_path / "count"

    def run(self, kill_at: int = 0) -> int | None:
        child = processes().Process(target=seaming.killed_below, args=(self.argv, self.folder, self.count, kill_at))
        child.start()
        child.join()
        return child.exitcode

    def try_at(
        self, moments: int, clean: Callable[[], None], check: Callable[[], None], whole: Path | None = None
    ) -> None:
        """Count its changes; then kill it at so many of them, with `check`, a whole run and `check` after each.

        Where `whole` is there after a kill there is no second run.
        """
        for _ in range(2):  # the first time makes folders that stay
            clean()
            assert self.run() == 0
        total = int(self.count.read_text())
        assert total >= 4
        rng = random.Random(0)
        for at in sorted({total, *rng.sample(range(1, total), min(moments, total - 1))}):
            clean()
            assert self.run(at) == -signal.SIGKILL
            check()
            if not (whole is not None and whole.exists()):
                assert self.run() == 0
            check()


def gone(path: Path) -> Callable[[], None]:
    return lambda: shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_an_export_that_was_killed_is_made_again(own_fleet: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "to" / "out"
    argv = ["export", "mos", str(out), "--as", form, "--fleet", str(own_fleet)]
    killed, seen = Killed(argv, out.parent, tmp_path), list[dict[str, str]]()

    def check() -> None:
        if out.exists():
            seen.append(tree(out))
            assert seen[-1] == seen[0]
            assert [p.name for p in out.parent.iterdir() if not p.name.startswith(".")] == ["out"]

    killed.try_at(4 if form == "lora" else 2, gone(out.parent), check, out)
    assert len(seen) >= 3 and [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_choice_that_was_killed_is_made_again(tmp_path: Path) -> None:
    r = np.random.default_rng(0)
    (tmp_path / "pool").mkdir()
    v = pa.FixedSizeListArray.from_arrays(pa.array(r.normal(size=80 * 8)), 8)
    parquet.write_table(pa.table({"text": sentences(80), "v": v}), tmp_path / "pool" / "a.parquet")
    out = tmp_path / "to" / "chosen.jsonl"
    argv = ["select", str(tmp_path / "pool"), "-b", "9", "-o", str(out), "features=v", "neighbours=8",
            f"work={tmp_path / 'to' / 'work'}"]  # fmt: skip
    killed, seen = Killed(argv, tmp_path / "to", tmp_path), list[str]()

    def check() -> None:
        if out.exists() and Path(f"{out}.json").exists():
            seen.append(file_hash(out))
            assert seen[-1] == seen[0]

    pool = tree(tmp_path / "pool")
    killed.try_at(4, gone(tmp_path / "to"), check)
    assert len(seen) >= 4 and tree(tmp_path / "pool") == pool


def test_a_pack_that_was_killed_goes_on(own_fleet: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "to" / "packed.fleet", sound(own_fleet)
    argv = ["pack", str(own_fleet), "--out", str(out), "--method", "rtn", "variants=[lora,mos]"]
    killed, seen = Killed(argv, out.parent, tmp_path), list[dict[str, str]]()

    def check() -> None:
        if (out / "fleet.db").exists():
            seen.append(sound(out))
            assert all(found.items() <= max(seen, key=len).items() for found in seen)

    killed.try_at(4, gone(out.parent), check)
    assert len(seen[-1]) == 2 and sound(own_fleet) == before


def test_an_import_that_was_killed_is_made_again(own_fleet: Path, tmp_path: Path) -> None:
    with plures.Fleet(own_fleet) as fleet:
        fleet["mos"].export(tmp_path / "mos", "lora")
    before = sound(own_fleet)
    argv = ["import", str(tmp_path / "mos"), "--name", "again", "--alias", "prod", "--fleet", str(own_fleet)]
    killed, made = Killed(argv, own_fleet, tmp_path), set[str]()

    def clean() -> None:
        with Store.open(own_fleet) as store:
            if "again" in store.names():
                store.remove("again", all=True, force=True)
            store.gc()

    def check() -> None:
        after = sound(own_fleet)
        assert before.items() <= after.items() and len(after) - len(before) in (0, 1)
        made.update(after[ref] for ref in after if ref not in before)

    killed.try_at(4, clean, check)
    assert len(made) == 1
    with Store.open(own_fleet) as store:
        assert store.resolve("again@prod").identity in made
