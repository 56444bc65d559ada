"""Codes made of plain pieces: ranks, fp16 scales, and rows rounded to integers of a few bits.

Every length follows from the ranks at the head of a code, so a code that is cut or too long is seen at once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plures.core.errors import BadInput
from plures.tensors.coding import Bytes, Ints, spread, squeeze
from plures.tensors.gauge import gauged
from plures.tensors.site import Site

Array = np.ndarray[Any, Any]
ZERO = 1e-6  # singular values below this share of a site's largest are what rounding to float32 left
LARGEST = 2.0**119  # of a scale: 127 of it are a float32 yet
HEAD = struct.Struct("<BH")  # 1 and the rank of all sites; or 0, and a rank each follows


def checked(factors: Mapping[str, tuple[Tensor, Tensor]], sites: Sequence[Site]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors in float32 where their product can be other than zero, in the order of `sites`.

    Raises: BadInput for a site that is not of `sites`, one of another shape, or numbers that are not finite.
    """
    at = {s.name: s for s in sites}
    for name, (B, A) in factors.items():
        if name not in at or (B.shape[0], A.shape[1]) != (at[name].out, at[name].into):
            raise BadInput(
                f"the pack has no site {name!r} of {B.shape[0]} x {A.shape[1]}; fit it again with this variant"
            )
        if B.shape[1] != A.shape[0] or B.shape[1] > 0xFFFF:
            raise BadInput(f"at {name!r} B is of rank {B.shape[1]} and A of rank {A.shape[0]}; they must be one rank "
                           f"of at most {0xFFFF}")  # fmt: skip
        if not (B.isfinite().all() and A.isfinite().all()):
            raise BadInput(f"the factors at {name!r} have numbers that are not finite; train this variant again")
    found = {s.name: factors[s.name] for s in sites if s.name in factors}
    return {n: (B.float(), A.float()) for n, (B, A) in found.items() if B.any() and A.any()}


def balanced(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The one form by site, its singular values shared out evenly: `sqrt(s) U [r, out]`, `sqrt(s) V [r, into]`, `s`.

    The rank is that of the product: what is zero but for rounding is left out.
    """
    out = {}
    for g in gauged(factors):
        for name, U, s, V in zip(g.names, g.U, g.s, g.V, strict=True):
            r = int((s > ZERO * s[0]).sum()) if len(s) else 0
            root = s[:r, None].sqrt()
            out[name] = root * U[:r], root * V[:r], s[:r]
    return {n: out[n] for n in factors}


def unchanged(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The rows `B^T [r, out]` and `A [r, into]` by site."""
    return {n: (B.T.contiguous(), A.contiguous()) for n, (B, A) in factors.items()}


def put_ranks(ranks: Sequence[int]) -> bytes:
    """The ranks of all sites, 0 for a site with nothing, as the head of a code."""
    if len(set(ranks)) <= 1:
        return HEAD.pack(1, ranks[0] if ranks else 0)
    return HEAD.pack(0, 0) + np.array(ranks, "<u2").tobytes()


def put_scales(scales: Array) -> bytes:
    """Numbers as fp16, after the exponent in one byte that brings the largest below 2**15.

    Raises: BadInput for numbers from 2**119.
    """
    top = float(np.abs(scales).max(initial=0))
    if not top < LARGEST:
        raise BadInput(f"a variant has numbers as large as '{top:.3g}'; bring its factors below 1e35")
    e = int(np.clip(np.frexp(top)[1] - 15, -128, 127)) if top > 0 else 0
    halves = np.ldexp(scales.astype(np.float64), -e).astype("<f2")
    return struct.pack("<b", e) + halves.tobytes()


def put_ints(rows: Tensor, bits: int, group: int = 0) -> bytes:
    """Rows `[r, width]` to the nearest of `2**bits - 1` even levels, `group` numbers (0: a row) to a scale.

    The levels are `-(2**(bits-1) - 1)` to `2**(bits-1) - 1` times the scale, and the largest number of a group is the
    last level.
    """
    x = rows.float().numpy().astype(np.float64)
    levels = (1 << (bits - 1)) - 1
    starts = np.arange(0, x.shape[1], group or x.shape[1])
    head = put_scales(np.maximum.reduceat(np.abs(x), starts, axis=1).reshape(-1) / levels)
    scales = _scales(np.frombuffer(head, np.uint8)).reshape(len(x), len(starts))
    wide = np.repeat(scales, np.diff([*starts, x.shape[1]]), axis=1)
    numbers = np.clip(np.rint(x / np.where(wide > 0, wide, np.inf)), -levels, levels)
    return head + squeeze((numbers + levels).astype(np.int32), bits).tobytes()


def put_plain(numbers: Ints, bits: int) -> bytes:
    """Whole numbers from 0 to `2**bits - 1`."""
    return squeeze(numbers, bits).tobytes()


def coded(parts: Sequence[bytes]) -> Tensor:
    """The code, uint8 `[bytes]`."""
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


class Pieces:
    """Reads a code's pieces in the order they were put; every method raises BadInput for a damaged code."""

    def __init__(self, code: Tensor) -> None:
        """Of a code, uint8 `[bytes]`."""
        if code.dtype != torch.uint8 or code.dim() != 1:
            raise BadInput(f"a code is bytes in one line, this one {code.dtype} of shape {list(code.shape)}")
        self._data, self._at = code.numpy(), 0

    def take(self, n: int) -> Bytes:
        """The next `n` bytes."""
        if n > len(self._data) - self._at:
            raise BadInput(f"a code of {len(self._data)} bytes ends too early; it is damaged")
        self._at += n
        return self._data[self._at - n : self._at]

    def ranks(self, sites: int) -> list[int]:
        """The ranks of that many sites."""
        same, rank = HEAD.unpack(self.take(HEAD.size).tobytes())
        if same > 1 or (not same and rank):
            raise BadInput("a code does not begin as one does; it is damaged")
        if same:
            return [rank] * sites
        return [int(r) for r in np.frombuffer(self.take(2 * sites).tobytes(), "<u2")]

    def scales(self, n: int) -> Array:
        """`n` numbers of `put_scales`, float64."""
        return _scales(self.take(1 + 2 * n))

    def ints(self, rows: int, width: int, bits: int, group: int = 0) -> Tensor:
        """Rows `[rows, width]` of `put_ints`, float32."""
        starts = np.arange(0, width, group or width)
        scales = self.scales(rows * len(starts)).reshape(rows, len(starts))
        wide = np.repeat(scales, np.diff([*starts, width]), axis=1)
        numbers = self.plain(rows * width, bits).reshape(rows, width) - ((1 << (bits - 1)) - 1)
        return torch.from_numpy((numbers * wide).astype(np.float32))

    def plain(self, n: int, bits: int) -> Ints:
        """`n` numbers of `put_plain`."""
        return spread(self.take(-(-n * bits // 8)), bits, n)

    def end(self) -> None:
        """Says that nothing may follow."""
        if self._at != len(self._data):
            raise BadInput(f"a code has {len(self._data) - self._at} bytes too many; it is damaged")


def _scales(data: Bytes) -> Array:
    """The numbers of `put_scales`, float64."""
    halves = np.frombuffer(data[1:].tobytes(), "<f2").astype(np.float64)
    (e,) = struct.unpack("<b", data[:1].tobytes())
    if not np.isfinite(halves).all() or np.ldexp(np.abs(halves).max(initial=0), e) > 2 * LARGEST:
        raise BadInput("a code has a scale that is no number; it is damaged")
    return np.asarray(np.ldexp(halves, e))


def over(sites: Sequence[Site], ranks: Sequence[int]) -> Iterator[tuple[Site, int]]:
    """The sites with something, and their ranks."""
    return ((s, r) for s, r in zip(sites, ranks, strict=True) if r)
