"""A pool of rows as they come: what is wanted, near-copies of it, others' text, and noise."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from plures.demo import corpus

PIECE = 500  # characters of a row, about
TARGET = 40  # rows that say what is wanted
STRANGERS = ("headers", "bytecode", "unicode", "web")  # whose text stands between
KINDS = ("on target", "copy", "noise", "off target")
Row = dict[str, str]


def pieces(text: str) -> list[str]:
    """The text in pieces of about `PIECE` characters, cut between lines."""
    out, now = [], ""
    for line in text.splitlines(keepends=True):
        now += line
        if len(now) >= PIECE:
            out.append(now)
            now = ""
    return [*out, now] if len(now) > PIECE // 2 else out


def spoilt(seed: int = 0) -> tuple[list[Row], list[Row]]:
    """The pool's rows, `{"kind", "text"}`, and those of the target, `{"text"}`.

    Prose of Python's help in pieces; near-copies of a quarter of them, a word in twenty changed; noise, a tenth, pieces
    with their words' letters shuffled; and as many rows of other tenants, of those that this Python has, as all these.
    """
    r = random.Random(seed)
    good = [p for d in corpus.tenant("topics").train for p in pieces(d.text)]
    strangers = [t for t in STRANGERS if t in corpus.tenants()]
    others = [p for t in strangers for d in corpus.tenant(t).train for p in pieces(d.text)]
    copies = []
    for text in r.sample(good, len(good) // 4):
        words = text.split(" ")
        copies.append(" ".join(r.choice(words) if r.random() < 0.05 else w for w in words))
    noise = [" ".join("".join(r.sample(w, len(w))) for w in text.split(" ")) for text in
             r.choices(good, k=(2 * len(good) + len(copies)) // 9)]  # fmt: skip
    rows = [*(("on target", t) for t in good), *(("copy", t) for t in copies), *(("noise", t) for t in noise)]
    rows += [("off target", t) for t in r.sample(others, len(rows))]
    r.shuffle(rows)
    valid = [p for d in corpus.tenant("topics").valid for p in pieces(d.text)]
    return [{"kind": k, "text": t} for k, t in rows], [{"text": t} for t in valid[:TARGET]]


def write(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def kinds(path: Path) -> dict[str, int]:
    """How many rows of each kind a JSONL file has."""
    found = Counter(json.loads(line)["kind"] for line in path.read_text(encoding="utf-8").splitlines())
    return {kind: found[kind] for kind in KINDS}
