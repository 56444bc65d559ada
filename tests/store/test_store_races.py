"""Publishers, readers and gc at the same time, in several processes and at the worst moment."""

from __future__ import annotations

from typing import Any

import pytest
from fleet_cases import (
    BASE,
    publish_and_remove,
    publish_ten,
    same,
    sweep_until,
    variant,
)

from forked import processes
from plures.core.errors import StoreBusy
from plures.store import Store, load, publish
from plures.store.blobs import Blobs


def test_two_processes_publish_at_once(fleet: Store) -> None:
    context = processes()
    start = context.Barrier(2)
    children = [context.Process(target=publish_ten, args=(fleet.path, who, start)) for who in (1, 2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [c.exitcode for c in children] == [0, 0]
    found = fleet.versions("both", all=True)
    assert [v.version for v in found] == list(range(1, 21))
    assert {v.identity for v in found} == {variant(100 * who + i).identity() for who in (1, 2) for i in range(10)}
    for version in fleet.versions(all=True):
        assert fleet.load(version.ref).identity() == version.identity
    assert len(fleet.versions(all=True)) == 30  # each 'same-i' has one version: the second came to the latest
    assert fleet.usage()["n_tensors"] == 20 * 6 + 10 * 6 + 10
    assert fleet.fsck().problems == ()
    fleet.gc(dead_share=0.0)
    assert fleet.fsck().reclaimable == ()
    assert same(fleet.load("same-3"), variant(5003, pool=3))


def test_gc_races_with_publishers(fleet: Store) -> None:
    context = processes()
    start, done = context.Barrier(3), context.Event()
    sweeper = context.Process(target=sweep_until, args=(fleet.path, done, start))
    children = [context.Process(target=publish_and_remove, args=(fleet.path, who, 25, start)) for who in (1, 2)]
    for child in (sweeper, *children):
        child.start()
    for child in children:
        child.join()
    done.set()
    sweeper.join()
    assert [c.exitcode for c in (sweeper, *children)] == [0, 0, 0]
    assert fleet.fsck().problems == ()
    found = fleet.versions(all=True)
    assert len(found) == 50
    assert {v.name for v in found} == {f"kept-{w}-{i}" for w in (1, 2) for i in (0, 1)}
    for version in found:
        assert fleet.load(version.ref).identity() == version.identity


def test_gc_cannot_come_between_a_blob_and_its_row(fleet: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put, tried = Blobs.put, []

    def put_then_gc(self: Blobs, data: bytes) -> bytes:
        hash = put(self, data)
        with Store.open(fleet.path, wait_s=0.05) as other, pytest.raises(StoreBusy):
            tried.append(1)
            other.gc(dead_share=0.0)
        return hash

    monkeypatch.setattr(Blobs, "put", put_then_gc)
    fleet.publish(variant(1), "a")
    assert tried
    assert same(fleet.load("a"), variant(1))
    assert fleet.fsck().problems == ()


def test_gc_cannot_take_what_a_publisher_found(fleet: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.publish(variant(1), "a")
    fleet.remove("a@1")  # its tensors are stored, and nothing names them
    look, tried = publish._store_new, []

    def look_then_gc(*args: Any) -> Any:
        found = look(*args)
        assert found is None
        with Store.open(fleet.path, wait_s=0.05) as other, pytest.raises(StoreBusy):
            tried.append(1)
            other.gc()
        return found

    monkeypatch.setattr(publish, "_store_new", look_then_gc)
    fleet.publish(variant(1), "b")
    assert tried
    assert same(fleet.load("b"), variant(1))
    assert fleet.fsck().problems == ()


def test_where_locks_do_not_hold_a_publish_fails_whole(fleet: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network disks ignore flock: then a tensor can vanish, and the transaction must notice."""
    fleet.publish(variant(1), "a")
    fleet.remove("a@1")
    look = publish._store_new

    def look_then_lose(*args: Any) -> Any:
        found = look(*args)
        with fleet._index.write() as db:
            db.execute("DELETE FROM variant")
            db.execute("DELETE FROM tensor")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(publish, "_store_new", look_then_lose)
        with pytest.raises(StoreBusy, match="publish again"):
            fleet.publish(variant(1), "b")
    assert fleet.names() == []
    assert fleet.fsck().problems == ()
    fleet.publish(variant(1), "b")
    assert same(fleet.load("b"), variant(1))


def test_the_same_tensors_published_in_between(fleet: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two found the same tensors new; the second to commit refers to the first one's, and its own copies are dead."""
    put = Blobs.put
    with Store.open(fleet.path) as other:

        def put_after_other(self: Blobs, data: bytes) -> bytes:
            monkeypatch.setattr(Blobs, "put", put)
            other.publish(variant(1, pool=4), "first")
            return put(self, data)

        monkeypatch.setattr(Blobs, "put", put_after_other)
        fleet.publish(variant(2, pool=4), "second")
    assert fleet.usage()["n_tensors"] == 13
    assert fleet.fsck().problems == ()
    before = fleet.usage()["bytes"]
    freed = fleet.gc(dead_share=0.5)
    assert freed > 2000
    assert fleet.usage()["bytes"] == before - freed
    assert same(fleet.load("first"), variant(1, pool=4))
    assert same(fleet.load("second"), variant(2, pool=4))


def test_a_reader_follows_what_gc_moves(fleet: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.publish(variant(1, pool=5), "a")
    fleet.publish(variant(2, pool=5), "b")
    fleet.remove("a@1")
    read = load._read_all

    def gc_then_read(*args: Any) -> Any:
        monkeypatch.setattr(load, "_read_all", read)
        with Store.open(fleet.path) as other:
            assert other.gc(dead_share=0.0) > 0
        return read(*args)

    monkeypatch.setattr(load, "_read_all", gc_then_read)
    assert same(fleet.load("b"), variant(2, pool=5))


def test_gc_is_not_starved(fleet: Store) -> None:
    """While gc waits for the publisher inside, the next publisher waits at the gate."""
    import fcntl
    import os

    gate = os.open(fleet.path / "gate", os.O_RDWR)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        with Store.open(fleet.path, wait_s=0.05) as other, pytest.raises(StoreBusy):
            other.publish(variant(1), "a")
    finally:
        os.close(gate)
    assert fleet.base == BASE
    assert fleet.publish(variant(1), "a")
