"""The audit log of a served fleet: one line for every change, written in the transaction of the change itself."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Mapping
from typing import Any

from plures.core.errors import WrongUse
from plures.store.content import dump
from plures.store.names import check_text
from plures.store.versions import now

SECRET = re.compile(r"pl-([0-9a-f]{16})-([A-Za-z0-9_-]{43})", re.ASCII)
"""A key as its owner holds it: its id, which is no secret, and 256 random bits in base64."""
MOST_LINES = 1 << 31


def redact(text: str) -> str:
    """`text` with the secret part of every key in it struck out: people paste keys where they do not belong."""
    return SECRET.sub(r"pl-\1-…", text)


def add_line(db: sqlite3.Connection, action: str, by: str, detail: Mapping[str, Any]) -> None:
    """Write one line.

    Raises: WrongUse where the action or `by` is no text, or the detail is not JSON.
    """
    check_text(action, "action")
    check_text(by, "by")
    try:
        text = dump(dict(detail))
    except (TypeError, ValueError) as error:
        raise WrongUse(f"the detail of {action!r} cannot be logged ({error}); give JSON") from error
    db.execute('INSERT INTO log (at, action, "by", detail) VALUES (?, ?, ?, ?)',
               (now(), action, redact(by), redact(text)))  # fmt: skip


def lines(db: sqlite3.Connection, limit: int, before: int | None, action: str) -> list[dict[str, Any]]:
    """The newest lines, newest first; `before` is the id of the line where the last page ended.

    Raises: WrongUse where `limit` is not in 1 to 2^31.
    """
    if not 1 <= limit <= MOST_LINES:
        raise WrongUse(f"limit must be in [1, {MOST_LINES}], got {limit}; page on with before=<the last id>")
    last = (1 << 62) if before is None else max(0, min(before, 1 << 62))
    only, values = ("AND action = ?", (action,)) if action else ("", ())
    rows = db.execute(
        f'SELECT id, at, action, "by", detail FROM log WHERE id < ? {only} ORDER BY id DESC LIMIT ?',
        (last, *values, limit),
    )
    return [{"id": i, "at": at, "action": a, "by": by, "detail": json.loads(d)} for i, at, a, by, d in rows]
