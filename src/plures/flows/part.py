"""The answers of a file of requests so far, on the disk: appended one by one, found again after a kill."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from plures.core.errors import BadInput, StoreBusy, disk

Row = dict[str, Any]
"""An answer: its request's "id", an "error" where there is one, and what else its writer wants."""


class Part:
    """The file of answers so far: a head that says of what, then one answer a line; held by one process at a time.

    `done` says where in it the answer of a request is, `failed` how many answers are errors. Answers stay on the disk.
    """

    def __init__(self, path: Path, digest: str) -> None:
        """Open or begin the part of the answers to a file with this SHA-256; a torn last line is cut off.

        Raises: StoreBusy while another process has it; BadInput where it is of other requests, or damaged.
        """
        self.path, self.head, self.failed = path, dict[str, Any](), 0
        self.done: dict[str, int] = {}
        with disk(path):
            self._file: IO[bytes] = path.open("a+b")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._end = self._read()
                if self.head.setdefault("requests", digest) != digest:
                    raise BadInput(
                        f"{str(path)!r} holds answers to other requests; restore them, or remove it to begin anew"
                    )
                if not self._end:
                    self.head["variants"] = {}
                    self.write(self.head)
            except BlockingIOError as error:
                self._file.close()
                raise StoreBusy(
                    f"another process answers into {str(path)!r}; wait for it, or name another file"
                ) from error
            except BaseException:
                self._file.close()
                raise

    def _read(self) -> int:
        """Take up what is there; returns where its last whole line ends."""
        self._file.seek(0)
        end = 0
        for n, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                if n == 1:
                    self.head |= row
                elif "variants" in row:
                    self.head["variants"] |= row["variants"]
                else:
                    self._note(row, end)
            except (ValueError, TypeError, KeyError) as error:
                raise BadInput(f"{str(self.path)!r} line {n} is damaged; remove the file to begin anew") from error
            end += len(line)
        self._file.truncate(end)
        return end

    def _note(self, row: Row, at: int) -> None:
        self.done[row["id"]] = at
        self.failed += "error" in row

    def write(self, row: dict[str, Any]) -> int:
        """Append one line, in the file before this returns (a kill loses nothing that was written); returns its place.

        Raises: DiskTrouble; the part must be opened anew then.
        """
        line, at = json.dumps(row, ensure_ascii=False).encode() + b"\n", self._end
        with disk(self.path):
            self._file.write(line)
            self._file.flush()
        self._end += len(line)
        return at

    def add(self, row: Row) -> None:
        """Note an answer."""
        self._note(row, self.write(row))

    def lines(self, ids: Iterable[str]) -> Iterator[bytes]:
        """The lines of these answers."""
        with disk(self.path, "read"), self.path.open("rb") as file:
            for id in ids:
                file.seek(self.done[id])
                yield file.readline()

    def meant(self, model: str, resolve: Callable[[str], tuple[str, str]]) -> tuple[str, str]:
        """A reference and identity: to the end of the file what the name meant when it was first asked for.

        Raises: what `resolve` raises.
        """
        known: dict[str, list[str]] = self.head["variants"]
        if model not in known:
            found = list(resolve(model))
            self.write({"variants": {model: found}})
            known[model] = found
        ref, identity = known[model]
        return ref, identity

    def close(self) -> None:
        """Let another process have it. Raises: DiskTrouble where the disk was full."""
        with disk(self.path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
