"""Migrations, and databases that are not ours."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from fleet_cases import BASE, same, variant

from plures.core.errors import BadInput
from plures.store import Store, schema


def old_fleet(path: Path) -> None:
    with Store.create(path, BASE) as store:
        store.publish(variant(1), "a", note="old")


def pragma(path: Path, name: str) -> int:
    db = sqlite3.connect(path / "fleet.db")
    try:
        return int(db.execute(f"PRAGMA {name}").fetchone()[0])
    finally:
        db.close()


NEWER = """
-- a column; and a trigger, whose body holds semicolons
ALTER TABLE version ADD COLUMN colour TEXT NOT NULL DEFAULT 'grey';
CREATE TRIGGER t AFTER INSERT ON alias BEGIN UPDATE version SET colour = 'a;b'; UPDATE version SET colour = 'red'; END;
"""


def test_an_older_schema_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_fleet(tmp_path / "f")
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, NEWER, "UPDATE version SET note = note || '!';"))
    for _ in range(2):  # the second time there is nothing to do
        with Store.open(tmp_path / "f") as store:
            assert store.resolve("a").note == "old!"
            assert same(store.load("a"), variant(1))
    with Store.open(tmp_path / "f") as store:
        store.alias("a", "x")
        with store._index.read() as db:
            assert db.execute("SELECT colour FROM version").fetchone() == ("red",)
    assert pragma(tmp_path / "f", "user_version") == len(schema.MIGRATIONS)


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_fleet(tmp_path / "f")
    known = schema.MIGRATIONS
    failing = ("UPDATE version SET note = 'lost';", "INSERT INTO nowhere VALUES (1);")
    monkeypatch.setattr(schema, "MIGRATIONS", (*known, *failing))
    with pytest.raises(sqlite3.OperationalError):  # our own bug, so not dressed up
        Store.open(tmp_path / "f")
    monkeypatch.setattr(schema, "MIGRATIONS", known)
    with Store.open(tmp_path / "f") as store:
        assert store.resolve("a").note == "old"


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    old_fleet(tmp_path / "f")
    db = sqlite3.connect(tmp_path / "f" / "fleet.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(BadInput, match=r"has schema 99, this Plures knows up to \d+; update Plures"):
        Store.open(tmp_path / "f")


def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    db = sqlite3.connect(tmp_path / "f" / "fleet.db")
    db.execute("CREATE TABLE t (x)")
    db.close()
    with pytest.raises(BadInput, match="not a fleet"):
        Store.open(tmp_path / "f")


def test_settings(fleet: Store) -> None:
    with fleet._index.read() as db:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        found = {k: db.execute(f"PRAGMA {k}").fetchone()[0] for k in names}
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}
