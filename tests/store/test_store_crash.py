"""kill -9, a full disk, a disk that may not be written: the old state or the new one, never half."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from fleet_cases import BASE, die_at, publish_until_killed, same, tree, variant

from forked import processes
from plures.core.errors import BadInput, DiskTrouble, PluresError
from plures.store import Store


def check_all(path: Path) -> list[str]:
    """Assert that the fleet is sound, and return what it holds."""
    with Store.open(path) as store:
        assert store.fsck().problems == ()
        found = store.versions(all=True)
        for version in found:
            assert store.load(version.ref).identity() == version.identity
        return [v.ref for v in found]


def test_killed_at_random_moments(tmp_path: Path) -> None:
    path = tmp_path / "fleet"
    Store.create(path, BASE).close()
    rng, context = random.Random(0), processes()
    published = 0
    for round in range(20):
        started = context.Event()
        child = context.Process(target=publish_until_killed, args=(path, 1000 * round, started))
        child.start()
        assert started.wait(60)
        child.join(rng.uniform(0, 0.12))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        published = len(check_all(path))
        with Store.open(path) as store:
            store.publish(variant(1000 * round + 1, pool=1), "again")
            assert same(store.load("again"), variant(1000 * round + 1, pool=1))
            if round % 5 == 4:
                store.gc()
                assert store.fsck().reclaimable == ()
    assert published > 20  # the children got something done before they died


@pytest.mark.parametrize("what", ["publish", "gc"])
def test_killed_at_every_step(tmp_path: Path, what: str) -> None:
    template, context = tmp_path / "template", processes()
    with Store.create(template, BASE) as store:
        store.publish(variant(1), "old")
        store.publish(variant(2), "steps", aliases=["prod"])
        if what == "gc":  # leave it something to delete and something to compact
            store.publish(variant(3, pool=3), "dead")
            store.publish(variant(4, pool=3), "half")
            store.remove("dead", all=True)
        held = [v.ref for v in store.versions(all=True)]
        unswept = store.usage()["bytes"]
    seen: list[str] = []
    for step in range(1, 100):
        path = tmp_path / str(step)
        shutil.copytree(template, path)
        child = context.Process(target=die_at, args=(step, path, what, 9))
        child.start()
        child.join()
        found = check_all(path)
        with Store.open(path) as store:
            if what == "gc":
                assert found == held
                seen.append("new" if store.usage()["bytes"] < unswept else "old")
            else:
                seen.append("new" if "steps@2" in found else "old")
                assert found == (held if seen[-1] == "old" else [*held, "steps@2"])
                assert store.resolve("steps@prod").ref == found[-1]  # the alias moves in the same step
            store.publish(variant(9), "steps", aliases=["prod"])
            assert store.resolve("steps@prod").ref == "steps@2"
            assert same(store.load("steps@2"), variant(9))
            store.gc(dead_share=0.0)
            report = store.fsck()
            assert report.ok
            assert report.reclaimable == ()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert child.exitcode == 0
    assert seen[-1] == "new"
    assert seen.count("old") >= 8
    assert seen == sorted(seen, reverse=True)  # old, old, ..., new: there is one moment at which it becomes new


def test_the_bytes_are_on_the_disk_before_their_name_and_the_name_before_the_row(
    fleet: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill keeps the page cache, a power cut does not: the order of the calls is what there is to test."""
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(fd: int) -> None:
        seen.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).relative_to(fleet.path)}")
        fsync(fd)

    def record_replace(a: Any, b: Any) -> None:
        seen.append(f"rename {Path(a).relative_to(fleet.path)} {Path(b).relative_to(fleet.path)}")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    writing = ("BEGIN I", "COMMIT", "INSERT")
    fleet._index._db.set_trace_callback(lambda s: seen.append(s) if s.startswith(writing) else None)
    fleet.publish(variant(1), "a")
    (blob,) = tree(fleet.path)
    begin = seen.index("BEGIN IMMEDIATE")
    temporary = seen[0].removeprefix("fsync ")
    assert temporary.startswith("tmp/")
    folder = str(Path(blob).parent)
    assert seen[:begin] == [f"fsync {temporary}", f"rename {temporary} {blob}", f"fsync {folder}", "fsync blobs"]
    assert seen[-1] == "COMMIT"
    assert seen.count("COMMIT") == 1
    assert all(s.startswith("INSERT") for s in seen[begin + 1 : -1])


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_under_the_blob(fleet: Store, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    fleet.publish(variant(1), "a")
    before, listed = tree(fleet.path), fleet.versions(all=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(DiskTrouble, match="the disk is full; nothing was changed"):
            fleet.publish(variant(2), "a")
    assert tree(fleet.path) == before
    assert fleet.versions(all=True) == listed
    assert fleet.publish(variant(2), "a").version == 2
    assert fleet.fsck().reclaimable == ()


def test_a_full_disk_under_the_index(fleet: Store) -> None:
    fleet.publish(variant(1), "a")
    listed = fleet.versions(all=True)
    fleet._index._db.execute("PRAGMA max_page_count = 1")  # SQLite lowers it to the pages there are
    with pytest.raises(DiskTrouble, match="the disk is full; nothing was changed"):
        for i in range(50):
            fleet.publish(variant(2 + i), "a", note="x" * 5000)
            listed = fleet.versions(all=True)
    assert fleet.versions(all=True) == listed
    assert fleet.fsck().ok
    fleet._index._db.execute("PRAGMA max_page_count = 100000")
    fleet.gc()
    assert fleet.fsck().reclaimable == ()
    assert fleet.publish(variant(99), "a")


def out_of_space(path: Path) -> None:
    """Publish under a limit of file size: the exit status says which of our errors came."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Store.open(path) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        try:
            store.publish(variant(2, pool=2), "a")
        except PluresError as error:
            os._exit(error.exit_code)
    os._exit(77)


def test_a_write_that_is_cut_short(fleet: Store) -> None:
    fleet.publish(variant(1), "a")
    before = tree(fleet.path)
    child = processes().Process(target=out_of_space, args=(fleet.path,))
    child.start()
    child.join()
    assert child.exitcode == BadInput.exit_code
    assert tree(fleet.path) == before
    assert [v.ref for v in fleet.versions(all=True)] == ["a@1"]
    assert fleet.fsck().ok


def test_a_folder_that_may_not_be_written(fleet: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.publish(variant(1), "a")
    path = fleet.path
    fleet.close()
    before = sorted(p.name for p in path.iterdir())
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: real(p, mode) and mode != os.W_OK)
    with Store.open(path) as store:
        assert same(store.load("a"), variant(1))
        assert store.fsck().problems == ()
        assert sorted(p.name for p in path.iterdir()) == before  # not even SQLite's own files
        for call in (
            lambda: store.publish(variant(2), "a"),
            lambda: store.alias("a", "prod"),
            lambda: store.remove("a@1"),
            lambda: store.score("a", "d", "m", 1.0),
            lambda: store.gc(),
        ):
            with pytest.raises(DiskTrouble, match="no permission"):
                call()
        assert [v.ref for v in store.versions(all=True)] == ["a@1"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_files_that_may_not_be_written(fleet: Store, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fleet.publish(variant(1), "a")

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(DiskTrouble, match="no permission"):
            fleet.publish(variant(2), "a")
    fleet._index._db.execute("PRAGMA query_only = ON")
    with pytest.raises(DiskTrouble, match="no permission"):
        fleet.alias("a", "prod")
    fleet._index._db.execute("PRAGMA query_only = OFF")
    assert fleet.resolve("a").aliases == ()
    assert fleet.fsck().problems == ()


def test_create_that_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(DiskTrouble):
            Store.create(tmp_path / "f", BASE)
    with pytest.raises(BadInput, match="not a fleet"):
        Store.open(tmp_path / "f")
    with Store.create(tmp_path / "f", BASE) as store:
        store.gc()
        assert tree(store.path) == {}


def test_a_fork_opens_its_own(fleet: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(PluresError, match="before a fork"):
            fleet.names()
    assert fleet.names() == []
