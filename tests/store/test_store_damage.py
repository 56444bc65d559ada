"""Damage is told from health, one line, naming what is hit; the rest of the fleet goes on."""

from __future__ import annotations

import pickle
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from fleet_cases import BASE, blob_files, same, variant

from plures.core.errors import BadInput
from plures.store import Store


class Bomb:
    """Unpickling this fails the test."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, ("raise SystemError('a pickle was run')",)


def flip(at: int) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 0x10
        path.write_bytes(data)

    return harm


def fill(data: bytes) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        path.write_bytes(data)

    return harm


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


HARM: dict[str, Callable[[Path], None]] = {
    "last byte": flip(-1),
    "first tensor byte": flip(-300),
    "header length": flip(0),
    "header": flip(20),
    "cut": cut,
    "emptied": fill(b""),
    "longer": lengthen,
    "missing": Path.unlink,
    "pickle": fill(pickle.dumps(Bomb())),
    "zip": fill(b"PK\x03\x04" + b"\0" * 500),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_a_damaged_blob(fleet: Store, harm: Callable[[Path], None]) -> None:
    fleet.publish(variant(1, pool=1), "well")
    before = set(blob_files(fleet.path))
    fleet.publish(variant(2, pool=1), "hit")  # its blob holds the indices only; the pool is in the other
    (path,) = set(blob_files(fleet.path)) - before
    assert fleet.fsck().ok
    harm(path)
    with pytest.raises(BadInput) as caught:
        fleet.load("hit")
    message = str(caught.value)
    assert path.stem in message
    assert "'hit@1'" in message
    assert "\n" not in message
    assert same(fleet.load("well"), variant(1, pool=1))
    for report in (fleet.fsck(), fleet.fsck(quick=True)):
        assert len(report.problems) == 1
        assert not report.ok
        assert path.stem in report.problems[0]
        assert "'hit@1'" in report.problems[0]
        assert "\n" not in report.problems[0]
        assert "'well@1'" not in report.problems[0]
    path.unlink(missing_ok=True)  # as the message says
    assert fleet.publish(variant(2, pool=1), "hit").ref == "hit@1"
    assert same(fleet.load("hit"), variant(2, pool=1))
    assert fleet.fsck().problems == ()


def test_publishing_mends_a_blob_of_wrong_size(fleet: Store) -> None:
    fleet.publish(variant(1), "a")
    fleet.publish(variant(2), "b")
    for path in blob_files(fleet.path):
        path.write_bytes(b"short")
    for seed, name in ((2, "b"), (1, "a")):
        fleet.publish(variant(seed), name)
        assert same(fleet.load(name), variant(seed))
    fleet.gc(dead_share=0.0)
    assert fleet.fsck().problems == ()
    assert same(fleet.load("a"), variant(1))
    assert same(fleet.load("b"), variant(2))


def test_another_valid_blob_in_its_place(fleet: Store) -> None:
    """The file is sound safetensors of the right size and shapes: only the hashes tell."""
    fleet.publish(variant(1), "a")
    fleet.publish(variant(2), "b")
    fleet.publish(variant(3), "c")
    _, b, c = sorted(blob_files(fleet.path), key=lambda p: p.stat().st_mtime_ns)
    b.write_bytes(c.read_bytes())
    with pytest.raises(BadInput, match="'b@1' is damaged"):
        fleet.load("b")
    fleet.load("b", check=False)
    assert len(fleet.fsck().problems) == 1
    assert same(fleet.load("c"), variant(3))


def change(path: Path, *statements: str) -> None:
    with sqlite3.connect(path / "fleet.db") as db:
        for statement in statements:
            db.execute(statement)
    db.close()


SWAP = (  # two tensors of one form change places
    "UPDATE tensor SET row = 1 - row WHERE row < 2 AND form = "
    "(SELECT form FROM tensor GROUP BY form HAVING COUNT(*) > 1)"
)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM variant_tensor WHERE rowid_of",
        "UPDATE variant SET identity = zeroblob(32)",
        "UPDATE variant SET manifest = replace(manifest, '\"rank\":4', '\"rank\":5')",
        "UPDATE layout SET sites = replace(sites, '[\"layers.0.q\",8', '[\"layers.0.q\",9')",
        SWAP,
        "UPDATE tensor SET hash = zeroblob(32) WHERE id = 1",
        "UPDATE tensor SET slot = 77 WHERE id = 1",
        "UPDATE tensor SET row = 77 WHERE id = 1",
        "UPDATE name SET last = 0",
    ],
)
def test_a_damaged_index(fleet: Store, statement: str) -> None:
    """A row that was changed behind our back: fsck says so, and load gives nothing that was not published."""
    fleet.publish(variant(1), "a")
    assert fleet.fsck().ok
    statement = statement.replace("rowid_of", "tensor = (SELECT MIN(tensor) FROM variant_tensor)")
    change(fleet.path, "PRAGMA foreign_keys = OFF", statement)
    report = fleet.fsck()
    assert len(report.problems) >= 1
    assert all("\n" not in p for p in report.problems)
    if "last" not in statement:
        with pytest.raises(BadInput):
            fleet.load("a")


def test_fsck_proves_tensor_hashes_unless_quick(fleet: Store) -> None:
    fleet.publish(variant(1), "a")
    change(fleet.path, SWAP)
    assert len(fleet.fsck().problems) == 1
    assert fleet.fsck(quick=True).ok


def test_rows_that_refer_to_nothing(fleet: Store) -> None:
    fleet.publish(variant(1), "a")
    change(fleet.path, "PRAGMA foreign_keys = OFF", "DELETE FROM variant")
    assert any("missing 'variant'" in p for p in fleet.fsck().problems)


@pytest.mark.parametrize("data", [b"", b"this is no database, " * 400, None], ids=["empty", "text", "half"])
def test_a_database_that_is_none(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "fleet"
    with Store.create(path, BASE) as store:
        for i in range(20):
            store.publish(variant(i), "a")
    whole = (path / "fleet.db").read_bytes()
    (path / "fleet.db").write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096) if data is None else data)
    with pytest.raises(BadInput) as caught, Store.open(path) as store:
        store.names()
    assert "\n" not in str(caught.value)
    assert "fleet.db" in str(caught.value)


def test_fsck_of_a_damaged_database_is_a_report(tmp_path: Path) -> None:
    path = tmp_path / "fleet"
    with Store.create(path, BASE) as store:
        for i in range(40):
            store.publish(variant(i), "a")
    data = bytearray((path / "fleet.db").read_bytes())
    for page in range(4, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    (path / "fleet.db").write_bytes(data)
    with Store.open(path) as store:
        report = store.fsck()
        assert not report.ok
        assert report.reclaimable == ()
