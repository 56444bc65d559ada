"""Every error that Plures raises on purpose, and the exit code each one ends a command with.

    PluresError                exit 1   our own bug, if it is ever raised bare
    ├── WrongUse               exit 2   the request cannot be meant: unknown name, bad option, forbidden path
    │   └── RecipeErrors       exit 2   all that is wrong with a recipe, at once
    ├── MissingExtra           exit 3   an optional package is not installed
    ├── BadInput               exit 4   a file, row, adapter or base that is not what it should be
    │   ├── Unreachable        exit 4   a hub or host that does not answer
    │   ├── StoreBusy          exit 4   another process holds what this one needs
    │   └── DiskTrouble        exit 4   no space, no permission
    └── BarNotMet              exit 5   a promised bar was not met (`--at-least`, `doctor`, `fsck`)

0 is success; 130 is an interruption from the keyboard. A message is one line: what is wrong with the value in
quotes, what is allowed, what to do next.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class PluresError(Exception):
    """Root of the tree; `exit_code` is what a command ends with."""

    exit_code = 1


class WrongUse(PluresError, ValueError):
    """The request cannot be carried out as it was put."""

    exit_code = 2


class RecipeErrors(WrongUse):
    """All that is wrong with one recipe; `problems` holds one line for each."""

    def __init__(self, problems: list[str], source: str = "recipe") -> None:
        self.problems = problems
        lines = "; ".join(problems) if len(problems) == 1 else "".join(f"\n  {p}" for p in problems)
        super().__init__(f"{source}: {lines}" if len(problems) == 1 else f"{source}: {len(problems)} errors{lines}")


class MissingExtra(PluresError, ImportError):
    """An optional package is needed for this and is not installed."""

    exit_code = 3


class BadInput(PluresError):
    """Data or a file that is not what it should be."""

    exit_code = 4


class Unreachable(BadInput):
    """A hub or host did not answer."""


class StoreBusy(BadInput):
    """Another process holds the run or the store."""


class DiskTrouble(BadInput):
    """The disk is full (`full`), or may not be read or written here."""

    def __init__(self, message: str, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class BarNotMet(PluresError):
    """A bar that was asked for, or promised, was not met."""

    exit_code = 5


def nearest(name: object, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `allowed`, or an empty string."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def missing(package: str, extra: str, purpose: str) -> MissingExtra:
    """The error for an absent optional package."""
    return MissingExtra(f"{purpose} needs the package {package!r}: pip install 'plures[{extra}]'")


@contextmanager
def disk(path: Path | str, doing: str = "write") -> Iterator[None]:
    """Turn the operating system's errors about `path` into one-line errors of ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskTrouble(f"cannot {doing} {str(path)!r}: the disk is full; nothing was changed", True) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DiskTrouble(f"cannot {doing} {str(path)!r}: no permission") from error
        if error.errno == errno.ENOENT:
            raise BadInput(f"cannot {doing} {str(path)!r}: it does not exist") from error
        raise BadInput(f"cannot {doing} {str(path)!r}: {error.strerror or error}") from error
