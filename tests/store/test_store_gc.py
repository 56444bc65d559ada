"""gc frees what nothing names, and only that."""

from __future__ import annotations

from pathlib import Path

import pytest
from fleet_cases import blob_files, same, tree, variant

from plures.core.errors import StoreBusy, WrongUse
from plures.store import Store


def size(path: Path) -> int:
    return sum(p.stat().st_size for d in ("blobs", "tmp") for p in (path / d).rglob("*") if p.is_file())


def test_nothing_to_free(fleet: Store) -> None:
    fleet.publish(variant(1), "a")
    before = tree(fleet.path)
    assert fleet.gc() == 0
    assert tree(fleet.path) == before


def test_frees_exactly_what_no_version_names(fleet: Store) -> None:
    fleet.publish(variant(1), "a")
    a_only = size(fleet.path)
    fleet.publish(variant(2), "b")
    fleet.publish(variant(2), "c")
    fleet.remove("b@1")
    assert fleet.gc() == 0  # c names the same variant
    fleet.remove("c@1")
    before = size(fleet.path)
    assert fleet.gc(dry=True) == before - a_only
    assert size(fleet.path) == before
    assert fleet.usage()["n_variants"] == 2  # a dry run changes no row either
    assert fleet.gc() == before - a_only
    assert size(fleet.path) == a_only
    assert fleet.usage()["n_variants"] == 1
    assert same(fleet.load("a"), variant(1))
    assert fleet.gc() == 0
    assert fleet.fsck() == fleet.fsck(quick=True)
    assert fleet.fsck().ok


def test_a_shared_tensor_outlives_its_first_owner_and_blobs_are_compacted(fleet: Store) -> None:
    fleet.publish(variant(1, pool=5), "a")  # its blob holds the pool of b too
    fleet.publish(variant(2, pool=5), "b")
    fleet.remove("a@1")
    before = tree(fleet.path)
    assert fleet.gc(dead_share=0.5) == 0  # 384 dead bytes of 2432 are less than half
    assert tree(fleet.path) == before
    want = fleet.gc(dry=True, dead_share=0.1)
    assert want > 300
    assert tree(fleet.path) == before
    held = size(fleet.path)
    assert fleet.gc(dead_share=0.1) == want == held - size(fleet.path)
    assert same(fleet.load("b"), variant(2, pool=5))
    assert fleet.fsck().problems == ()
    assert fleet.usage()["bytes"] == size(fleet.path)
    assert fleet.usage()["n_tensors"] == 7
    assert fleet.gc(dead_share=0.0) == 0
    fleet.publish(variant(1, pool=5), "a")  # what was freed can come back
    assert same(fleet.load("a"), variant(1, pool=5))


def test_orphans_are_reclaimable_and_no_problem(fleet: Store) -> None:
    fleet.publish(variant(1), "a")
    orphan = fleet.path / "blobs" / "00" / ("00" * 32 + ".safetensors")
    orphan.parent.mkdir()
    orphan.write_bytes(b"x" * 10)
    (fleet.path / "tmp" / ("1" * 32 + ".safetensors")).write_bytes(b"y" * 7)
    report = fleet.fsck()
    assert report.ok
    assert len(report.reclaimable) == 2
    assert report.reclaimable_bytes == 17
    assert fleet.gc(dry=True) == 17 == fleet.gc()
    assert not orphan.exists()
    assert fleet.fsck().reclaimable == ()
    assert same(fleet.load("a"), variant(1))


def test_foreign_files_are_named_and_left(fleet: Store, tmp_path: Path) -> None:
    fleet.publish(variant(1), "a")
    held = blob_files(fleet.path)[0]
    target = tmp_path / "elsewhere"
    target.write_text("keep")
    link = fleet.path / "blobs" / "ab" / ("ab" * 32 + ".safetensors")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    foreign = [fleet.path / "blobs" / "notes.txt", held.with_suffix(".bin"), fleet.path / "tmp" / "mine", link]
    for path in foreign[:3]:
        path.write_text("mine")
    report = fleet.fsck()
    assert len(report.problems) == 4
    assert report.reclaimable == ()
    for path in foreign:
        assert any(repr(str(path.relative_to(fleet.path))) in p for p in report.problems)
    assert fleet.gc() == 0
    assert all(p.exists() for p in foreign)
    assert target.read_text() == "keep"


def test_a_damaged_blob_is_not_rewritten(fleet: Store) -> None:
    fleet.publish(variant(1, pool=5), "a")
    fleet.publish(variant(2, pool=5), "b")
    path = max(blob_files(fleet.path), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    for i in range(len(data) - 2432, len(data), 8):  # in every tensor of the blob
        data[i] ^= 1
    path.write_bytes(data)
    fleet.remove("a@1")
    assert fleet.gc(dead_share=0.0) == 0
    assert path.read_bytes() == data
    assert any(path.stem in p for p in fleet.fsck().problems)


def test_dead_share_is_a_share(fleet: Store) -> None:
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(WrongUse, match="dead_share"):
            fleet.gc(dead_share=bad)


def test_gc_waits_for_publishers_and_publishers_for_gc(fleet: Store) -> None:
    with Store.open(fleet.path, wait_s=0.05) as other:
        with fleet._blobs.shared():
            with pytest.raises(StoreBusy, match="held by another process"):
                other.gc()
            other.publish(variant(1), "a")  # publishers do not hold each other up
        with fleet._blobs.alone():
            with pytest.raises(StoreBusy):
                other.publish(variant(2), "b")
            with pytest.raises(StoreBusy):
                other.fsck()
            assert same(other.load("a"), variant(1))  # nor does gc hold up a server
        with fleet._index.write(), pytest.raises(StoreBusy, match=r"fleet\.db"):
            other.alias("a", "prod")
        assert other.names() == ["a"]
        assert other.fsck().problems == ()
