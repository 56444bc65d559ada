"""Faults where parts meet: fleets that move, many processes and users at once, other schemas.

Full disks are in test_seams_disk, kills in test_seams_killed. What one part does alone is tried in its own tests:
training in test_kill, test_train and test_train_faults, choosing in test_select_disk and test_select_cells, merging in
test_merge_flow, the store in test_store_crash and test_store_races.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import seaming
from seaming import NOBODY
from whole import command, sound, tree

import plures
from forked import processes
from plures.core.errors import BadInput
from plures.store import Store, schema, serve_db
from plures.store.access import Access
from tiny import make_base

ROOT = os.getuid() == 0
# SHA-256 of the first script of store/schema.py, and of store/serve_db.py
FIRST_FLEET = "b774bdabb537852ffc7496650f2d66b868b1bf71c55d450d3ac58a7f9de643b9"
FIRST_SERVE = "d23f749cd89b904db3f53124ce0749b30a428ca64b8b22b57294521b5732f929"


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
    said = capsys.readouterr().err
    assert f"already is a fleet, of the base {was.name!r}" in said and str(other) in said
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
