"""The one form of a low-rank delta: `B A = U diag(s) V` with orthonormal `U`, `V`, for many sites at once.

Factors are free up to any invertible `r x r` matrix between them; this form is not (but for signs, which are fixed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Gauged:
    """Sites of one shape: `U [sites, r, out]`, `s [sites, r]` from the largest, `V [sites, r, into]`; rows are unit."""

    names: tuple[str, ...]
    U: Tensor
    s: Tensor
    V: Tensor


def gauged(factors: Mapping[str, tuple[Tensor, Tensor]]) -> list[Gauged]:
    """`factors`, `B [out, r]` and `A [r, into]` by site, in the one form; the rank is cut to what a site can have."""
    out = []
    for names, B, A in _stacked(factors):
        qb, rb = torch.linalg.qr(B)
        qa, ra = torch.linalg.qr(A.mT)
        u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
        U, V = (qb @ u).mT, vh @ qa.mT
        largest = V.abs().argmax(-1, keepdim=True)
        sign = torch.where(V.gather(-1, largest) < 0, -1.0, 1.0)
        out.append(Gauged(names, U * sign, s, V * sign))
    return out


def singular_values(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The singular values of `B A` of every site, `[r]` from the largest."""
    out: dict[str, Tensor] = {}
    for names, B, A in _stacked(factors):
        rb, ra = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.mT, mode="r").R
        out |= dict(zip(names, torch.linalg.svdvals(rb @ ra.mT), strict=True))
    return out


def difference(
    one: Mapping[str, tuple[Tensor, Tensor]], other: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of `one - other`; a site that only one of them has counts as 0 in the other."""
    out = {}
    for name in {**one, **other}:
        parts = [(room[name][0] * sign, room[name][1]) for room, sign in ((one, 1), (other, -1)) if name in room]
        out[name] = torch.cat([B for B, _ in parts], 1), torch.cat([A for _, A in parts], 0)
    return out


def missed(X: Array, Y: Array, near_X: Array, near_Y: Array) -> tuple[Array, Array, Array]:
    """Of `D = X' Y` and `N = near_X' near_Y`: `|D - N|^2`, `<D - N, N>` and `|N|^2`, float64 `[sites]`.

    Shapes: X `[sites, r, out]`, Y `[sites, r, into]` with orthonormal rows. D - N is `(X - near_X)' Y + near_X' (Y -
    near_Y)`, sums of terms as small as what is off, so that nothing cancels in float32.
    """
    x, y = X - near_X, Y - near_Y

    def inner(a: Array, b: Array, c: Array, d: Array) -> Array:
        left, right = (np.matmul(p, q.transpose(0, 2, 1)).astype(np.float64) for p, q in ((a, c), (b, d)))
        return np.asarray((left * right).sum((1, 2)))

    off = np.square(x, dtype=np.float64).sum((1, 2)) + 2 * inner(x, Y, near_X, y) + inner(near_X, y, near_X, y)
    along = inner(x, Y, near_X, near_Y) + inner(near_X, y, near_X, near_Y)
    return off, along, inner(near_X, near_Y, near_X, near_Y)


def _stacked(factors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[tuple[tuple[str, ...], Tensor, Tensor]]:
    groups: dict[tuple[int, int, int], list[str]] = {}
    for name, (B, A) in factors.items():
        groups.setdefault((*B.shape, A.shape[1]), []).append(name)
    for names in groups.values():
        found: Sequence[tuple[Tensor, Tensor]] = [factors[n] for n in names]
        yield tuple(names), torch.stack([B for B, _ in found]).float(), torch.stack([A for _, A in found]).float()
