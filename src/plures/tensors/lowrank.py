"""Algebra of low-rank deltas `B A`, with `B [out, r]` and `A [r, into]`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors of `sum_i w_i B_i A_i` by concatenation: exact, at the sum of the ranks.

    Shapes: `B_i [out, r_i]`, `A_i [r_i, into]` -> `B [out, sum r]`, `A [sum r, into]`.
    """
    B = torch.cat([w * b for (b, _), w in zip(factors, weights, strict=True)], dim=1)
    return B, torch.cat([a for _, a in factors], dim=0)


def truncate(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best `rank`-rank factors of `B A` in Frobenius norm, by QR of both sides and an SVD of the core.

    Never forms `[out, into]`. The singular values are shared evenly: both factors get their square roots.
    """
    qb, rb = torch.linalg.qr(B.float())
    qa, ra = torch.linalg.qr(A.float().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = s[:rank].clamp_min(0).sqrt()
    return (qb @ u[:, :rank]) * root, root[:, None] * (vh[:rank] @ qa.T)
