"""Whole numbers as few bytes: entropy codes by the ANS coder of `constriction`, and numbers of a few bits packed.

An entropy code is as good as the tables that foretell the numbers. Tables are counts, whole numbers, so that every
machine makes the same code of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import constriction
import numpy as np

from plures.core.errors import BadInput

Ints = np.ndarray[Any, np.dtype[np.int32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Table:
    """How often each whole number from `-most` to `most` is foreseen, by its counts `[2 most + 1]`; others escape.

    What escapes costs 4 bytes more. Counts are smoothed: none is 0.
    """

    def __init__(self, counts: Ints) -> None:
        """Of counts, the first of which is of the escape."""
        if len(counts) < 2 or len(counts) % 2:
            raise BadInput(f"a table has an even number of counts, this one {len(counts)}; the pack is damaged")
        self.most = (len(counts) - 2) // 2
        share = counts.astype(np.float64) + 1 / 16
        self.model = constriction.stream.model.Categorical(share / share.sum(), perfect=False)

    def symbols(self, numbers: Ints) -> tuple[Ints, Ints]:
        """The numbers as symbols, and those that escape."""
        inside = np.abs(numbers) <= self.most
        return np.where(inside, numbers + self.most + 1, 0).astype(np.int32), numbers[~inside]

    def numbers(self, symbols: Ints, escaped: list[int]) -> Ints:
        """The numbers of symbols; what escaped is taken off the end of `escaped`, which has the next one last."""
        out = symbols - self.most - 1
        for at in np.flatnonzero(symbols == 0):
            if not escaped:
                raise BadInput("a code ends too early; it is damaged")
            out[at] = escaped.pop()
        return out.astype(np.int32)


def counted(numbers: Ints, most: int) -> Ints:
    """The counts of a `Table`: of what escapes, then of `-most` to `most`."""
    inside = np.abs(numbers) <= most
    counts = np.bincount(numbers[inside] + most, minlength=2 * most + 1)
    return np.concatenate([[int((~inside).sum())], counts]).astype(np.int32)


class Writer:
    """Runs of numbers, each with its table, into one code; read back in the same order."""

    def __init__(self) -> None:
        self._runs: list[tuple[Ints, Any]] = []
        self._escaped: list[Ints] = []

    def put(self, numbers: Ints, table: Table) -> None:
        """One run more."""
        symbols, escaped = table.symbols(numbers)
        self._runs.append((symbols, table.model))
        self._escaped.append(escaped)

    def put_plain(self, numbers: Ints, bits: int) -> None:
        """One run more, of numbers from 0 to `2**bits - 1` of which nothing is foreseen."""
        self._runs.append((numbers.astype(np.int32), _plain(bits)))

    def done(self) -> bytes:
        """The code."""
        coder = constriction.stream.stack.AnsCoder()
        for symbols, model in reversed(self._runs):
            if len(symbols):
                coder.encode_reverse(symbols, model)
        escaped = np.concatenate([*self._escaped, np.zeros(0, np.int32)]).astype("<i4")
        words = coder.get_compressed().astype("<u4")
        return bytes(_length(len(escaped)) + escaped.tobytes() + words.tobytes())


class Reader:
    """Reads what a `Writer` wrote."""

    def __init__(self, code: bytes) -> None:
        """Raises: BadInput for a damaged code."""
        n, at = _read_length(code)
        if len(code) < at + 4 * n or (len(code) - at) % 4:
            raise BadInput("a code ends too early; it is damaged")
        self._escaped = np.frombuffer(code, "<i4", n, at)[::-1].tolist()
        words = np.frombuffer(code, "<u4", offset=at + 4 * n).astype(np.uint32)
        try:
            self._coder = constriction.stream.stack.AnsCoder(words)
        except ValueError as error:
            raise BadInput("a code does not end as one does; it is damaged") from error

    def take(self, n: int, table: Table) -> Ints:
        """The next run, of `n` numbers."""
        return table.numbers(self._coder.decode(table.model, n), self._escaped) if n else np.zeros(0, np.int32)

    def take_plain(self, n: int, bits: int) -> Ints:
        """The next run, of `n` numbers of `bits` bits."""
        return np.asarray(self._coder.decode(_plain(bits), n), np.int32) if n else np.zeros(0, np.int32)

    def end(self) -> None:
        """Says that nothing may follow. Raises: BadInput where something does."""
        if self._escaped or not self._coder.is_empty():
            raise BadInput("a code goes on where it should end; it is damaged")


def _plain(bits: int) -> Any:
    return constriction.stream.model.Uniform(1 << bits)


def _length(n: int) -> bytes:
    """A whole number from 0 in as few bytes as it takes, 7 bits in each."""
    out = bytearray()
    while n >= 128:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def _read_length(code: bytes) -> tuple[int, int]:
    """A whole number written by `_length`, and where it ends."""
    n = shift = 0
    for at, byte in enumerate(code[:5]):
        n |= (byte & 127) << shift
        if byte < 128:
            return n, at + 1
        shift += 7
    raise BadInput("a code begins with no length; it is damaged")


def squeeze(numbers: Ints, bits: int) -> Bytes:
    """Whole numbers from 0 to `2**bits - 1` in `bits` bits each."""
    planes = (numbers.reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(planes.astype(np.uint8).reshape(-1))


def spread(code: Bytes, bits: int, n: int) -> Ints:
    """The `n` numbers of `squeeze`."""
    planes = np.unpackbits(code, count=n * bits).reshape(n, bits).astype(np.int32)
    return np.asarray((planes << np.arange(bits, dtype=np.int32)).sum(1), np.int32)


def tables(flat: Ints, sizes: Sequence[int]) -> list[Table]:
    """Tables whose counts stand one after the other."""
    ends = np.cumsum(sizes)
    return [Table(flat[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
