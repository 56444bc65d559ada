"""Real text that is on every machine: the Python standard library's own sources.

The base is trained on the whole library except the tenants' packages and their tests; each tenant is one
package whose text is unlike the rest. Documents (files, or subjects of the language reference) are split whole,
by a hash of their name, and a held-out line that also stands in the tenant's training text is dropped, so that
what is scored was not read in training.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import io
import os
import re
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TENANTS: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio/",),
    "email": ("email/",),
    "topics": (),  # pydoc_data.topics: the prose of the language reference, one document a subject
    "unittest": ("unittest/",),
    "web": ("http/", "html/", "urllib/", "wsgiref/"),
    "xml": ("xml/", "xmlrpc/"),
    "desktop": ("tkinter/", "idlelib/", "turtledemo/"),  # absent from some distributions of Python
    "headers": (),  # the C headers of the interpreter, absent where no development files are installed
    "bytecode": (),  # what `python -m dis` prints of the email and xml packages: nothing like it is in the base
    "unicode": (),  # the Unicode character database: number, category and name, one document a block
}
KEPT_OUT = re.compile(
    r"(^|/)(test_)?(asyncio|email|pydoc_data|unittest|http|html|urllib|wsgiref|xml|xmlrpc|tkinter|idlelib|turtledemo"
    r"|encodings|site-packages|dist-packages|__pycache__|idle_test|urlparse|docxmlrpc|tk|idle|tcl|ttk)"
)
"""Paths that the base never reads: the tenants, their tests, `encodings` (tables of repeated lines)."""
TABLES = ("html/entities.py",)
BYTECODE_CHARACTERS = 12_000  # of one file; a disassembly is ten times as long as its source
SHORT_LINE = 15  # characters; shorter lines (`return x`, `else:`) are no sign of a leak
SPLITS = {"train": 0.70, "valid": 0.12, "test": 0.18}


@dataclass(frozen=True)
class Document:
    """One file or one subject, whole."""

    name: str
    text: str


def library() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _read(paths: Iterator[Path], root: Path) -> list[Document]:
    out = []
    for path in sorted(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # deliberately broken sources of the library's own tests
        if text.strip():
            out.append(Document(path.relative_to(root).as_posix(), text))
    return out


def base_documents() -> list[Document]:
    """Every source of the library that no tenant owns."""
    root = library()
    paths = (Path(folder) / f for folder, _, files in os.walk(root) for f in files if f.endswith(".py"))
    return _read((p for p in paths if not KEPT_OUT.search(p.relative_to(root).as_posix())), root)


def _headers() -> list[Document]:
    include = Path(sysconfig.get_paths()["include"])
    return _read(include.rglob("*.h"), include)


def _bytecode() -> list[Document]:
    out = []
    for doc in documents("email") + documents("xml"):
        text = io.StringIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a SyntaxWarning of the library's own source is not ours to show
            dis.dis(compile(doc.text, doc.name, "exec"), file=text)
        plain = re.sub(r" at 0x[0-9a-f]+", "", text.getvalue())  # addresses and orders differ from run to run
        plain = re.sub(r"(?<=frozenset\()\{.+?\}(?=\))", _ordered, plain)
        out.append(Document(doc.name, plain[:BYTECODE_CHARACTERS].rpartition("\n")[0] + "\n"))
    return out


def _ordered(found: re.Match[str]) -> str:
    """A set as Python prints it, its elements in the order of what is printed of each."""
    try:
        return "{" + ", ".join(sorted(map(repr, ast.literal_eval(found[0])))) + "}"
    except (SyntaxError, ValueError):  # a text in it has the end of a set
        return found[0]


def _unicode() -> list[Document]:
    out = []
    for block in range(0, 0x3000, 256):
        named = ((c, unicodedata.name(chr(c), "")) for c in range(block, block + 256))
        lines = [f"U+{c:04X} {unicodedata.category(chr(c))} {name}\n" for c, name in named if name]
        if lines:
            out.append(Document(f"unicode/{block:05x}", "".join(lines)))
    return out


_MADE = {"headers": _headers, "bytecode": _bytecode, "unicode": _unicode}


def documents(tenant: str) -> list[Document]:
    """All documents of one tenant; empty where this Python does not ship the package."""
    if tenant == "topics":
        from pydoc_data.topics import topics  # the same text that `help('assert')` prints

        return [Document(f"topics/{name}", text) for name, text in sorted(topics.items())]
    if tenant in _MADE:
        return _MADE[tenant]()
    root = library()
    found = (p for prefix in TENANTS[tenant] for p in (root / prefix).rglob("*.py"))
    keep = (p for p in found if "/test" not in (n := p.relative_to(root).as_posix()) and "idle_test" not in n)
    return [d for d in _read(keep, root) if d.name not in TABLES]


def tenants() -> list[str]:
    """The tenants that this Python can supply, in a fixed order."""
    return [name for name in TENANTS if sum(len(d.text) for d in documents(name)) > 100_000]


def split(docs: list[Document]) -> dict[str, list[Document]]:
    """`docs` cut into train, valid and test by whole document.

    Documents are ordered by a hash of their name and dealt to the split that is furthest below its share of the
    characters, so the cut does not depend on the order of files and is stable when one document changes. A
    document that alone would overfill a held-out split goes to train.
    """
    total = sum(len(d.text) for d in docs) or 1
    got = dict.fromkeys(SPLITS, 0)
    out: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for doc in sorted(docs, key=lambda d: hashlib.sha256(d.name.encode()).digest()):
        share = len(doc.text) / total
        room = {n: 1 - (got[n] / total + share) / SPLITS[n] for n in SPLITS if n == "train" or share < SPLITS[n]}
        name = max(room, key=lambda n: room[n])
        out[name].append(doc)
        got[name] += len(doc.text)
    return out


def without_lines(docs: list[Document], seen: set[str]) -> list[Document]:
    """`docs` without the lines that stand in `seen` (compared stripped; short lines stay)."""
    out = []
    for doc in docs:
        lines = doc.text.splitlines(keepends=True)
        kept = [line for line in lines if len(line.strip()) <= SHORT_LINE or line.strip() not in seen]
        if any(len(line.strip()) > SHORT_LINE for line in kept):
            out.append(Document(doc.name, "".join(kept)))
    return out


def long_lines(docs: list[Document]) -> set[str]:
    """The stripped lines of `docs` longer than `SHORT_LINE` characters."""
    return {s for d in docs for line in d.text.splitlines() if len(s := line.strip()) > SHORT_LINE}


@dataclass(frozen=True)
class Tenant:
    """One tenant's rows, ready to be written as JSONL.

    `repeated_share` is the share of held-out lines that stood in the training text and were dropped.
    """

    name: str
    train: list[Document]
    valid: list[Document]
    test: list[Document]
    repeated_share: float


def tenant(name: str) -> Tenant:
    """The tenant's splits, with no held-out line (over 15 characters) that also occurs in its training text."""
    parts = split(documents(name))
    seen = long_lines(parts["train"])
    lines = [
        s
        for part in ("valid", "test")
        for d in parts[part]
        for line in d.text.splitlines()
        if len(s := line.strip()) > SHORT_LINE
    ]
    repeated = sum(line in seen for line in lines) / max(1, len(lines))
    valid = without_lines(parts["valid"], seen)
    test = without_lines(parts["test"], seen | long_lines(valid))
    return Tenant(name, parts["train"], valid, test, repeated)


def python_version() -> str:
    return ".".join(map(str, sys.version_info[:3]))
