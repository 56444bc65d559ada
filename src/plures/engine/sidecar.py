"""Vectors of a pool's rows in a folder of their own: mapped, as float16 or int8, bound to the files they were made of.

    about.json      rows, width, kind, the pool's fingerprint, what made them and how others are made alike
    vectors.f16     or vectors.i8: `[rows, width]`, row after row
    scales.f32      of int8: `[rows]`; a number is scale * integer
    hnsw-*          where `plures near` was asked: an index of them (`lookup`)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from plures.choice.kmeans import unit
from plures.core.errors import BadInput, disk
from plures.engine.columns import append, nameless
from plures.tensors import safe
from plures.tensors.together import sync_folder

Array = np.ndarray[Any, Any]
Kind = Literal["f16", "int8"]
_FILE = {"f16": "vectors.f16", "int8": "vectors.i8"}


@dataclass(frozen=True)
class About:
    """What a sidecar holds, and of what.

    `model` is the sentence-transformers model, "" where n-grams are hashed; `text` the column; `turns` whether it holds
    conversations; `vectors` the SHA-256 of the vectors. Older sidecars have "" for `text` and `vectors`.
    """

    rows: int
    width: int
    kind: Kind
    pool: str
    made_by: str
    model: str = ""
    text: str = ""
    turns: bool = False
    vectors: str = ""


class Sidecar:
    """Reads a sidecar. Raises: BadInput where the folder is none, or is not whole."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with disk(self.path / "about.json", "read"):
            text = (self.path / "about.json").read_text(encoding="utf-8")
        try:
            self.about = About(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise BadInput(f"{str(self.path)!r} holds no vectors that plures embed wrote") from error
        size = self.about.rows * self.about.width * (2 if self.about.kind == "f16" else 1)
        file = self.path / _FILE[self.about.kind]
        if not file.exists() or file.stat().st_size != size:
            raise BadInput(f"{str(file)!r} is not whole: {size} bytes are expected; run plures embed again")

    @staticmethod
    def is_one(path: str) -> bool:
        """Whether `path` is a folder with vectors, not a column's name."""
        return bool(path) and (Path(path) / "about.json").exists()

    @cached_property
    def _raw(self) -> Array:
        kind = np.float16 if self.about.kind == "f16" else np.int8
        return np.memmap(self.path / _FILE[self.about.kind], kind, "r", shape=(self.about.rows, self.about.width))

    @cached_property
    def _scales(self) -> Array:
        return np.fromfile(self.path / "scales.f32", np.float32)

    @cached_property
    def identity(self) -> str:
        """The SHA-256 of the vectors, in hex."""
        return self.about.vectors or _identity(self.path, self.about.kind)

    def at(self, rows: Any) -> Array:
        """These rows as float32 of length 1."""
        raw = np.asarray(self._raw[rows], np.float32)
        return unit(raw * self._scales[rows, None] if self.about.kind == "int8" else raw)

    def features(self, folder: Path) -> Array:
        """All rows, mapped: float16 `[rows, width]`; int8 is written out as float16 in `folder` first."""
        if self.about.kind == "f16":
            return self._raw
        with disk(folder), nameless(folder) as out:
            for at in range(0, self.about.rows, 32768):
                append(out, self.at(slice(at, at + 32768)))
            return np.memmap(out, np.float16, "r", shape=(self.about.rows, self.about.width))

    def check(self, fingerprint: str, rows: int) -> None:
        """Raises: BadInput where these are vectors of another pool."""
        if (self.about.pool, self.about.rows) != (fingerprint, rows):
            raise BadInput(f"{str(self.path)!r} holds vectors of {self.about.rows} rows of another pool, or of this "
                           "one before it changed; run plures embed again")  # fmt: skip


def _identity(folder: Path, kind: Kind) -> str:
    files = [_FILE[kind], *(["scales.f32"] if kind == "int8" else [])]
    return hashlib.sha256("".join(safe.file_hash(folder / f) for f in files).encode()).hexdigest()


class Writer:
    """Writes a sidecar row by row into `<path>.part`, from which a killed run goes on; `done` puts it in place."""

    def __init__(self, path: Path, kind: Kind, pool: str, made_by: str, *, model: str = "", text: str = "",
                 turns: bool = False) -> None:  # fmt: skip
        self.path, self.part, self.kind, self.pool, self.made_by = path, Path(f"{path}.part"), kind, pool, made_by
        self.model, self.text, self.turns = model, text, turns
        with disk(self.part):
            self.part.mkdir(parents=True, exist_ok=True)
        self.mark = self.part / "mark.json"
        said: dict[str, Any] = {"rows": 0, "width": 0}
        if self.mark.exists():
            told = json.loads(self.mark.read_text())
            if (told["pool"], told["made_by"], told["kind"]) == (pool, made_by, kind):
                said = told
        self.rows, self.width = int(said["rows"]), int(said["width"])
        with disk(self.part):
            for name, size in self._sizes().items():
                with (self.part / name).open("ab") as f:
                    f.truncate(size)

    def _sizes(self) -> dict[str, int]:
        sizes = {_FILE[self.kind]: self.rows * self.width * (2 if self.kind == "f16" else 1)}
        return sizes | ({"scales.f32": 4 * self.rows} if self.kind == "int8" else {})

    def add(self, vectors: Array) -> None:
        """Append rows `[n, width]` of length 1. Raises: BadInput for another width; DiskTrouble."""
        if self.width and vectors.shape[1] != self.width:
            raise BadInput(f"vectors of {vectors.shape[1]} numbers follow vectors of {self.width}")
        self.width = vectors.shape[1]
        blocks = {_FILE[self.kind]: np.asarray(vectors, np.float16)}
        if self.kind == "int8":
            scale = np.abs(vectors).max(1) / 127
            whole = np.rint(vectors / np.where(scale > 0, scale, 1)[:, None])
            blocks = {_FILE["int8"]: whole.astype(np.int8), "scales.f32": scale.astype(np.float32)}
        with disk(self.part):
            for name, block in blocks.items():
                with (self.part / name).open("ab") as f:
                    f.write(np.ascontiguousarray(block).tobytes())
                    f.flush()
                    os.fsync(f.fileno())
        self.rows += len(vectors)
        said = {"rows": self.rows, "width": self.width, "pool": self.pool, "made_by": self.made_by, "kind": self.kind}
        safe.write_bytes(self.mark, json.dumps(said).encode())

    def done(self) -> About:
        """Put the sidecar in place, instead of one that is there. Raises: DiskTrouble; that one then stays."""
        about = About(self.rows, self.width, self.kind, self.pool, self.made_by, self.model, self.text, self.turns,
                      _identity(self.part, self.kind))  # fmt: skip
        safe.write_bytes(self.part / "about.json", (json.dumps(asdict(about)) + "\n").encode())
        with disk(self.path):
            old = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.old") if self.path.exists() else None
            if old:
                self.path.rename(old)
            try:
                self.part.rename(self.path)
                sync_folder(self.path.parent)
            except OSError:
                if self.path.exists():
                    self.path.rename(self.part)
                if old:
                    old.rename(self.path)
                raise
            (self.path / self.mark.name).unlink()
        if old:
            shutil.rmtree(old, ignore_errors=True)
        return about
