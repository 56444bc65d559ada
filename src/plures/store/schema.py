"""The tables of fleet.db, as numbered scripts, and what brings a database of such scripts up to date.

`PRAGMA user_version` counts the scripts a database has been through, `PRAGMA application_id` says whose it is. A script
that has been released is never edited: the next change is the next script. serve.db has its scripts in `serve_db`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from plures.core.errors import BadInput

APPLICATION_ID = 0x506C7572  # "Plur": tells a fleet from any other SQLite file
OTHER = "is a SQLite database but not a fleet; give the folder that `plures init` made"
NEWER = "has schema {version}, this Plures knows up to {known}; update Plures to open it"

# Site tensors are small and many, so a row is small: hashes are 32 raw bytes, and what repeats (tensor names, shapes,
# the list of sites) is interned. `place` and `form` are never emptied: they hold a few names per base.
_FIRST = """
CREATE TABLE base (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    name TEXT NOT NULL, revision TEXT NOT NULL, hash TEXT NOT NULL
);
-- payload: bytes of all tensors in the file, dead ones included; n_bytes: size of the file
CREATE TABLE blob (
    id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),
    n_bytes INTEGER NOT NULL, payload INTEGER NOT NULL
);
CREATE TABLE form (
    id INTEGER PRIMARY KEY, dtype TEXT NOT NULL, shape TEXT NOT NULL, n_bytes INTEGER NOT NULL, UNIQUE (dtype, shape)
);
CREATE TABLE tensor (
    id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),
    blob INTEGER NOT NULL REFERENCES blob, slot INTEGER NOT NULL, row INTEGER NOT NULL,
    form INTEGER NOT NULL REFERENCES form
);
CREATE INDEX tensor_of_blob ON tensor (blob);
CREATE TABLE layout (id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE CHECK (length(hash) = 32), sites TEXT NOT NULL);
-- manifest: JSON without sites (in layout) and provenance (in version: equal tensors may come about in two ways)
CREATE TABLE variant (
    id INTEGER PRIMARY KEY, identity BLOB NOT NULL UNIQUE CHECK (length(identity) = 32),
    manifest TEXT NOT NULL, layout INTEGER NOT NULL REFERENCES layout,
    n_bytes INTEGER NOT NULL, created TEXT NOT NULL
);
CREATE TABLE place (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE variant_tensor (
    variant INTEGER NOT NULL REFERENCES variant ON DELETE CASCADE,
    place INTEGER NOT NULL REFERENCES place, tensor INTEGER NOT NULL REFERENCES tensor,
    PRIMARY KEY (variant, place)
) WITHOUT ROWID;
CREATE INDEX variant_of_tensor ON variant_tensor (tensor);
-- last: the highest number ever given; the row outlives its versions, so that no number is given twice.
-- NOCASE: 'Support' and 'support' would be one folder on some disks, so they cannot be two names here.
CREATE TABLE name (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE COLLATE NOCASE, last INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE version (
    id INTEGER PRIMARY KEY, name INTEGER NOT NULL REFERENCES name, number INTEGER NOT NULL,
    variant INTEGER NOT NULL REFERENCES variant, created TEXT NOT NULL, note TEXT NOT NULL, provenance TEXT NOT NULL,
    UNIQUE (name, number)
);
CREATE INDEX version_of_variant ON version (variant);
CREATE TABLE alias (
    name INTEGER NOT NULL REFERENCES name, alias TEXT NOT NULL,
    version INTEGER NOT NULL REFERENCES version ON DELETE CASCADE,
    PRIMARY KEY (name, alias)
) WITHOUT ROWID;
CREATE INDEX alias_of_version ON alias (version);
CREATE TABLE score (
    version INTEGER NOT NULL REFERENCES version ON DELETE CASCADE, dataset TEXT NOT NULL, metric TEXT NOT NULL,
    value REAL NOT NULL, detail TEXT NOT NULL, created TEXT NOT NULL,
    PRIMARY KEY (version, dataset, metric)
) WITHOUT ROWID;
-- hash without a foreign key: a parent may be removed, or live in another fleet, and is still the parent
CREATE TABLE parent (
    version INTEGER NOT NULL REFERENCES version ON DELETE CASCADE, at INTEGER NOT NULL,
    hash BLOB NOT NULL CHECK (length(hash) = 32), ref TEXT NOT NULL,
    PRIMARY KEY (version, at)
) WITHOUT ROWID;
"""

MIGRATIONS: tuple[str, ...] = (_FIRST,)


def statements(script: str) -> list[str]:
    """The statements of a script, one by one.

    `executescript` commits before it runs, so it cannot be part of the one transaction a migration needs.
    """
    found, start = [], 0
    for at, letter in enumerate(script):
        if letter == ";" and sqlite3.complete_statement(script[start : at + 1]):
            found.append(script[start : at + 1].strip())
            start = at + 1
    assert not script[start:].strip(), f"a migration ends in half a statement: {script[start:].strip()!r}"
    return found


def user_version(db: sqlite3.Connection) -> int:
    """How many migrations a database has been through."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def check_known(db: sqlite3.Connection, where: str, id: int, scripts: Sequence[str], other: str = OTHER,
                newer: str = NEWER) -> bool:  # fmt: skip
    """Whether the schema is older than `scripts`; passes where it is one that this Plures knows.

    Raises: BadInput for another application's database (`other` says so), a newer schema (`newer`), or one that never
        was.
    """
    version, known = user_version(db), len(scripts)
    if db.execute("PRAGMA application_id").fetchone()[0] != id:
        raise BadInput(f"{where!r} {other.format(version=version, known=known)}")
    if version < 1:
        raise BadInput(f"{where!r} has schema {version}, which no Plures has written; restore it from a copy")
    if version > known:
        raise BadInput(f"{where!r} {newer.format(version=version, known=known)}")
    return version < known


def migrate(db: sqlite3.Connection, scripts: Sequence[str]) -> None:
    """Bring a database to the newest schema; called inside a write transaction, which makes it all or nothing."""
    for script in scripts[user_version(db) :]:
        for statement in statements(script):
            db.execute(statement)
    db.execute(f"PRAGMA user_version = {len(scripts)}")
