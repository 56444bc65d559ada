"""Low-rank deltas of one site as small cores between bases they share, so that mixing them never grows their rank.

With `L [out, p]` and `R [into, q]`, orthonormal bases of all their columns and rows, each delta is `L C R^T`. Sums of
deltas are sums of cores, and the SVD of a core is that of its delta; `[out, into]` is never formed. All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """The bases of a site: `left [out, p]` and `right [into, q]`, with orthonormal columns, float64."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """The most that a delta between these bases can have."""
        return min(self.left.shape[1], self.right.shape[1])

    def factors(self, core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The best `rank`-rank factors `B [out, rank]`, `A [rank, into]` of a delta, float32; zeros where it has less.

        The singular values are shared evenly, as in `lowrank.truncate`.
        """
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        kept = min(rank, len(S))
        root = S[:kept].sqrt()
        B = self.left.new_zeros(self.left.shape[0], rank)
        A = self.right.new_zeros(rank, self.right.shape[0])
        B[:, :kept] = self.left @ (U[:, :kept] * root)
        A[:kept] = (root[:, None] * Vh[:kept]) @ self.right.T
        return B.float(), A.float()


def framed(factors: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Frame, list[Tensor]]:
    """The bases of several deltas of a site, given by their factors, and each one's core; None is a delta of zero.

    Shapes: `B_i [out, r_i]`, `A_i [r_i, into]` -> cores `[p, q]`, with p and q at most the sum of the ranks.
    """
    there = [f for f in factors if f is not None]
    left, onto = torch.linalg.qr(torch.cat([B.double() for B, _ in there], 1))
    right, over = torch.linalg.qr(torch.cat([A.double() for _, A in there]).T)
    cores, at = [], 0
    for f in factors:
        r = 0 if f is None else f[1].shape[0]
        cores.append(onto[:, at : at + r] @ over[:, at : at + r].T)
        at += r
    return Frame(left, right), cores


def crossed(cores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_i w_i C_i / sum_i w_i`."""
    total = sum(weights)
    out = torch.zeros_like(cores[0])
    for core, weight in zip(cores, weights, strict=True):
        out += weight / total * core
    return out


def mutated(core: Tensor, along: Tensor, shares: Tensor) -> Tensor:
    """`core` with more of what `along` does: `C + U diag(share_k s_k) V^T`, by the SVD `U diag(s) V^T` of `along`.

    Shapes: both cores `[p, q]`, `shares [min(p, q)]`.
    """
    U, S, Vh = torch.linalg.svd(along, full_matrices=False)
    more: Tensor = (U * (shares.to(S) * S)) @ Vh
    return core + more
