"""Faults where parts meet: fleets that move, many processes and users at once, full disks, kills, other schemas.

What one part does alone is tried in its own tests: training in test_kill and test_train, choosing in test_select_disk
and test_select_cells, merging in test_merge_flow, the store in test_store_crash and test_store_races.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import seaming
from killing import processes
from pyarrow import parquet
from seaming import NOBODY

import plures
from full_disk import room, trouble
from plures.bridges.adapter_folder import write_folder
from plures.cli.app import main
from plures.core.errors import BadInput, DiskTrouble, WrongUse
from plures.core.recipe import load
from plures.flows.merge import merge
from plures.flows.merge_recipe import parse
from plures.flows.pack import pack
from plures.flows.recipes import PackRecipe
from plures.store import Store, schema, serve_db
from plures.store.access import Access
from plures.tensors.safe import file_hash
from tiny import make_base, sentences

ROOT = os.getuid() == 0
# SHA-256 of the first script of store/schema.py, and of store/serve_db.py
FIRST_FLEET = "b774bdabb537852ffc7496650f2d66b868b1bf71c55d450d3ac58a7f9de643b9"
FIRST_SERVE = "d23f749cd89b904db3f53124ce0749b30a428ca64b8b22b57294521b5732f929"


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


# ---------------------------------------------------------------- a fleet that moves


def test_a_copied_fleet_says_where_its_base_should_be_and_is_told(
    own_fleet: Path, base_folder: Path, text_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sound(own_fleet)
    assert command("score", "mos", text_rows, "--fleet", own_fleet) == 0
    scored = capsys.readouterr().out
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(base_folder, first)
    with plures.Fleet(own_fleet, base=str(first)) as fleet:
        assert Path(fleet.store.base.name) == first
    first.rename(second)
    away = tmp_path / "far" / "away.fleet"
    shutil.copytree(own_fleet, away)
    shutil.rmtree(own_fleet)
    assert command("list", "--fleet", away) == 0 and command("fsck", "--fleet", away) == 0
    assert command("show", "mos", "--fleet", away) == 0
    capsys.readouterr()
    for said in (("score", "mos", text_rows), ("generate", "mos", "--prompt", "The"),
                 ("export", "mos", tmp_path / "m", "--as", "merged")):  # fmt: skip
        assert command(*said, "--fleet", away) == 4
        told = capsys.readouterr().err
        assert repr(str(first)) in told and "plures init FLEET --base ITS-NEW-FOLDER" in told and told.count("\n") == 1
    assert not (tmp_path / "m").exists()
    assert command("init", away, "--base", second) == 0
    assert f"its base is {second} from now on" in capsys.readouterr().out
    assert command("score", "mos", text_rows, "--fleet", away) == 0
    assert capsys.readouterr().out == scored
    assert command("generate", "mos", "base", "--prompt", "The", "--max-tokens", "4", "--fleet", away) == 0
    with Store.open(away) as store:
        store.publish(seaming.changed(store.load("lora"), 0.5), "lora")
    assert sound(away).items() > before.items()


def test_a_base_of_other_weights_does_not_take_its_place(
    own_fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store.open(own_fleet) as store:
        was = store.base
    other = make_base(tmp_path / "other", seed=5)
    assert command("init", own_fleet, "--base", other) == 2
    assert "already is a fleet" in capsys.readouterr().err
    assert command("init", own_fleet, "--base", was.name) == 2
    with pytest.raises(BadInput, match=r"is a fleet of .* not of"):
        plures.Fleet(own_fleet, base=str(other))
    with Store.open(own_fleet) as store:
        assert store.base == was


# ---------------------------------------------------------------- many at once


def test_two_publish_one_reads_and_one_sweeps(own_fleet: Path, tmp_path: Path) -> None:
    before, context = sound(own_fleet), processes()
    start, done = context.Barrier(4), context.Event()
    publishers = [context.Process(target=seaming.publish_many, args=(own_fleet, who, 12, start)) for who in (1, 2)]
    reader = context.Process(target=seaming.read_until, args=(own_fleet, done, start, tmp_path / "read"))
    sweeper = context.Process(target=seaming.sweep_until, args=(own_fleet, done, start))
    everyone = [*publishers, reader, sweeper]
    for child in everyone:
        child.start()
    for child in publishers:
        child.join()
    done.set()
    for child in everyone:
        child.join()
    assert [c.exitcode for c in everyone] == [0, 0, 0, 0]
    assert int((tmp_path / "read").read_text()) > 0
    after = sound(own_fleet)
    assert before.items() <= after.items()
    with Store.open(own_fleet) as store:
        shared = store.versions("shared", all=True)
        assert sorted(v.note for v in shared) == sorted(f"{who}-{i}" for who in (1, 2) for i in range(12))
        assert [v.version for v in shared] == list(range(1, 25))
        like = store.load("lora")
        for v in shared:
            who, i = map(int, v.note.split("-"))
            assert v.identity == seaming.changed(like, 1 + who + i / 100).identity()
        assert [len(store.versions(f"own-{who}", all=True)) for who in (1, 2)] == [6, 6]
        store.gc(dead_share=0.0)
        assert store.fsck().reclaimable == ()


# ---------------------------------------------------------------- users


@pytest.fixture
def common(own_fleet: Path) -> Iterator[Path]:
    """The fleet where every user may come, and its modes are those of umask 022."""
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)
        path = Path(shutil.copytree(own_fleet, Path(scratch) / "acme.fleet"))
        for p in (path, *path.rglob("*")):
            p.chmod(0o755 if p.is_dir() else 0o644)
        yield path


def as_user(do: Callable[[Path], str], path: Path, user: int = NOBODY, umask: int = 0o22) -> str:
    context = processes()
    said = context.SimpleQueue()
    child = context.Process(target=seaming.as_user, args=(user, umask, do, path, said))
    child.start()
    child.join()
    return str(said.get())


@pytest.mark.skipif(not ROOT, reason="only root can be two users")
def test_what_a_careful_user_publishes_others_read_as_the_fleet_s_own_modes_say(common: Path) -> None:
    names = as_user(seaming.loads_all, common)
    assert names == "full@1 lora@1 mos@1 vera@1"
    assert as_user(seaming.publishes, common, user=0, umask=0o77) == "more@1"
    assert as_user(seaming.loads_all, common) == "full@1 lora@1 more@1 mos@1 vera@1"
    blobs = [p for p in (common / "blobs").rglob("*") if p.is_file()]
    assert {p.stat().st_mode & 0o777 for p in blobs} == {0o644}
    assert "DiskTrouble: cannot write" in as_user(seaming.publishes, common)
    assert "opened for reading" in as_user(seaming.sweeps, common)
    for p in (common, *common.rglob("*")):  # a fleet that all may write
        p.chmod(p.stat().st_mode | 0o22)
    common.chmod(0o777)
    assert as_user(seaming.publishes, common) == "more@2"
    assert as_user(seaming.sweeps, common).isdigit()
    assert "more@2" in sound(common)


@pytest.mark.skipif(not ROOT, reason="only root can be two users")
def test_a_fleet_of_a_user_s_own_is_told_as_such(common: Path) -> None:
    common.chmod(0o700)
    said = as_user(seaming.loads_all, common)
    assert said.startswith("DiskTrouble: cannot read") and "no permission" in said and "\n" not in said
    common.chmod(0o755)
    (common / "blobs").chmod(0o700)
    said = as_user(seaming.loads_all, common)
    assert said.startswith("DiskTrouble: ") and "no permission" in said


@pytest.mark.skipif(not ROOT, reason="only root can be two users")
def test_a_reader_sees_what_a_killed_writer_had_said(common: Path) -> None:
    child = processes().Process(target=seaming.dies_open, args=(common,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and (common / "fleet.db-wal").stat().st_size
    assert "late@1" in as_user(seaming.loads_all, common)
    assert "late@1" in sound(common)


def test_a_fleet_that_may_not_be_written_answers_and_says_what_it_cannot(
    own_fleet: Path, text_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before, real, name = tree(own_fleet), os.access, own_fleet.name
    monkeypatch.setattr(os, "access", lambda p, mode: real(p, mode) and not (mode == os.W_OK and name in str(p)))
    works = [("list",), ("show", "mos"), ("fsck",), ("score", "mos", text_rows), ("export", "mos", tmp_path / "out"),
             ("generate", "mos", "--prompt", "The", "--max-tokens", "2")]  # fmt: skip
    for said in works:
        assert command(*said, "--fleet", own_fleet) == 0, said
    capsys.readouterr()
    cannot = [("alias", "mos", "prod"), ("rm", "mos@1"), ("gc",), ("import", tmp_path / "out", "--name", "new")]
    for said in cannot:
        assert command(*said, "--fleet", own_fleet) == 4, said
        told = capsys.readouterr().err
        assert "no permission; the fleet was opened for reading" in told and told.count("\n") == 1
    assert tree(own_fleet) == before


# ---------------------------------------------------------------- schemas


def test_the_first_schema_is_as_it_was_released() -> None:
    """A fleet of 0.1.0 opens with what was then; another script must be a second one, and this one stays."""
    assert hashlib.sha256(schema.MIGRATIONS[0].encode()).hexdigest() == FIRST_FLEET
    assert hashlib.sha256(serve_db.MIGRATIONS[0].encode()).hexdigest() == FIRST_SERVE


@pytest.mark.parametrize(("version", "why"), [(99, "update Plures to open it"), (0, "which no Plures has written"),
                                              (-1, "which no Plures has written")])  # fmt: skip
def test_a_schema_that_is_not_known_is_one_line_and_left_alone(
    own_fleet: Path, capsys: pytest.CaptureFixture[str], version: int, why: str
) -> None:
    Access.open(own_fleet).close()
    for name in ("fleet.db", "serve.db"):
        db = sqlite3.connect(own_fleet / name)
        db.execute(f"PRAGMA user_version = {version}")
        db.close()
    before = tree(own_fleet)
    for said in (("list",), ("show", "mos"), ("gc",), ("generate", "mos", "--prompt", "x")):
        assert command(*said, "--fleet", own_fleet) == 4
        told = capsys.readouterr().err
        assert f"has schema {version}" in told and why in told and told.count("\n") == 1
    with pytest.raises(BadInput, match=f"schema {version}"):
        Access.open(own_fleet)
    assert tree(own_fleet) == before


# ---------------------------------------------------------------- full disks


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
        if not said:  # a folder's fsync may fail: some disks cannot do it
            assert name == "fsync" or calls[0] <= after
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


# ---------------------------------------------------------------- kill -9


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
