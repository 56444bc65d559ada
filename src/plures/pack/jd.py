"""Compress then Serve: a basis per site that the fleet shares, and a small matrix in it for each variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plures.core.errors import BadInput, WrongUse
from plures.core.folder import method
from plures.pack import Factors, Fleet
from plures.tensors.pieces import Pieces, checked, coded, over, put_ints, put_ranks, put_scales
from plures.tensors.rng import normal, rng
from plures.tensors.site import Site

Bases = list[Tensor]
Visit = Callable[[int, Tensor, Tensor], None]


@method(
    paper="arXiv:2407.00066",
    title="Compress then Serve: Serving Thousands of LoRA Adapters with Little Overhead (Brüel Gabrielsson et al.)",
    status="trial",
    when="For fleets whose variants lie near one subspace of a few dimensions a site: then its codes are the smallest "
    "there are. What lies outside is lost whatever the bits, and how much cannot be asked for; klt keeps it.",
)
@dataclass(frozen=True)
class Jd:
    """Every delta as `U S V^T`: `U [out, k]` and `V [into, k]` shared, `S` of the variant, `k x k` or diagonal.

        minimise sum_i w_i ||B_i A_i - U S_i V^T||_F^2

    Full: U and V have orthonormal columns and `S_i = U^T B_i A_i V`. In turns, U becomes an orthonormal basis of
    `sum_i w_i B_i (A_i V)(A_i V)^T B_i^T U`, and V likewise: a step of orthogonal iteration, at which the objective
    never grows. Both begin as sketches of the column and the row space. Diagonal: U, V and the diagonals are the
    least-squares answers to each other in turns, from random ones. Only factors are multiplied, never an `out x into`
    matrix; a fit goes over the fleet twice an iteration.

    U and V are kept as fp16, so a variant's S is fitted to these by least squares.

    Options:
        k: columns of U and V; cut to a site's smaller side where full.
        iterations: how often U and V are found anew.
        bits: of a number of S, from 2 to 8 with a scale a row, or 16 for fp16.
        full: S is a matrix; or a diagonal.
        even: w_i is 1 over the squared norm of the delta; or 1, and large deltas count for more.
        seed: of the beginning.

    Raises: WrongUse for options out of range; BadInput for a fleet of nothing but zeros.
    Paper: arXiv:2407.00066, the abstract, and the authors' code, github.com/bruel-gabrielsson/LoRALoLA at ca69954
        (full_lora_pca, diagonal_lora_pca, loraEigenvalueIteration, compute_weights); the text was not at hand.
    Departs from the paper: U is found before V in every turn (loraEigenvalueIteration changes both at once); the
        sketches as a beginning, the least squares and the bits are ours. Clusters of variants are left out.
    """

    k: int = 16
    iterations: int = 10
    bits: int = 16
    full: bool = True
    even: bool = True
    seed: int = 0
    bounds: ClassVar[bool] = False
    free: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 0xFFFF:
            raise WrongUse(f"jd.k must be from 1 to 65535, got {self.k}; 16 to 64 is usual")
        if self.iterations < 1:
            raise WrongUse(f"jd.iterations must be at least 1, got {self.iterations}")
        if not (2 <= self.bits <= 8 or self.bits == 16):
            raise WrongUse(f"jd.bits must be from 2 to 8, or 16, got {self.bits}")

    def columns(self, site: Site) -> int:
        """Columns of U and V at a site."""
        return min(self.k, site.out, site.into) if self.full else self.k

    def finer(self, share: float) -> Jd | None:
        """None: the error follows from the rank and the bits."""
        return None

    def fit(self, fleet: Fleet, sites: Sequence[Site]) -> dict[str, Tensor]:
        """U and V of all sites, fp16, one site after the other; goes over the fleet `2 iterations + 2` times.

        Raises: BadInput for a fleet of nothing but zeros.
        """
        U, V = (_full if self.full else _diagonal)(self, fleet, sites)
        return {leaf: torch.cat([x.T.reshape(-1) for x in side]).half() for leaf, side in (("U", U), ("V", V))}

    def codec(self, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> Coder:
        """What codes and decodes. Raises: BadInput where `shared` is not of these sites."""
        try:
            return Coder(self, sites, shared)
        except (KeyError, RuntimeError) as error:
            raise BadInput(f"what the fleet shares is not of these {len(sites)} sites and k: {error}") from error


class Coder:
    """Codes variants of some sites with U and V."""

    def __init__(self, of: Jd, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> None:
        self.of, self.sites = of, tuple(sites)
        columns = [of.columns(s) for s in sites]
        self.U = _columns(shared["U"], [s.out for s in sites], columns)
        self.V = _columns(shared["V"], [s.into for s in sites], columns)
        self.at = {s.name: i for i, s in enumerate(sites)}
        self._solved: dict[int, tuple[Tensor, Tensor]] = {}

    def between(self, at: int, B: Tensor, A: Tensor) -> Tensor:
        """The `S` of `B A` at a site, `[k, k]`, or its diagonal `[1, k]`, that makes `||B A - U S V^T||` least."""
        U, V = self.U[at].double(), self.V[at].double()
        if at not in self._solved:
            grams = (U.T @ U, V.T @ V) if self.of.full else ((U.T @ U) * (V.T @ V),) * 2
            self._solved[at] = _inverse(grams[0]), _inverse(grams[1])
        left, right = self._solved[at]
        if self.of.full:
            return left @ (U.T @ B.double()) @ (A.double() @ V) @ right
        return ((B.double().T @ U) * (A.double() @ V)).sum(0)[None] @ left

    def encode(self, factors: Factors) -> Tensor:
        """A variant's code: which sites it has, and S of each.

        Raises: BadInput for a site that the fleet did not have, of another shape, or not finite.
        """
        found = checked(factors, self.sites)
        parts = [put_ranks([self.of.columns(s) if s.name in found else 0 for s in self.sites])]
        for name, (B, A) in found.items():
            S = self.between(self.at[name], B, A)
            parts.append(put_scales(S.numpy().reshape(-1)) if self.of.bits == 16 else put_ints(S.float(), self.of.bits))
        return coded(parts)

    def decode(self, code: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """`B = U S [out, k]`, `A = V^T [k, into]` at every site of a code.

        Raises: BadInput for a damaged code.
        """
        pieces, out = Pieces(code), {}
        for site, k in over(self.sites, pieces.ranks(len(self.sites))):
            if k != self.of.columns(site):
                raise BadInput(f"a code has k {k} at {site.name!r} and what the fleet shares {self.of.columns(site)}; "
                               "it is damaged")  # fmt: skip
            rows = k if self.of.full else 1
            if self.of.bits == 16:
                S = torch.from_numpy(pieces.scales(rows * k)).float().reshape(rows, k)
            else:
                S = pieces.ints(rows, k, self.of.bits)
            U, V = self.U[self.at[site.name]], self.V[self.at[site.name]]
            out[site.name] = (U @ S if self.of.full else U * S).contiguous(), V.T.contiguous()
        pieces.end()
        return out


def _columns(line: Tensor, widths: Sequence[int], columns: Sequence[int]) -> Bases:
    """The bases `[width, k]` that stand in one line, float32."""
    parts = torch.split(line, [w * k for w, k in zip(widths, columns, strict=True)])
    return [x.reshape(k, -1).T.float() for x, k in zip(parts, columns, strict=True)]


# ---------------------------------------------------------------------- fitting, in float64


def _full(of: Jd, fleet: Fleet, sites: Sequence[Site]) -> tuple[Bases, Bases]:
    U, V = (_turn(of, fleet, sites, side, x, None) for side, x in enumerate(_random(of, sites)))
    for _ in range(of.iterations):
        U = _turn(of, fleet, sites, 0, U, V)
        V = _turn(of, fleet, sites, 1, V, U)
    return U, V


def _turn(of: Jd, fleet: Fleet, sites: Sequence[Site], side: int, ours: Bases, other: Bases | None) -> Bases:
    """Bases of a side from those before and from those of the other side; None for all of its space."""
    out = _zeros(ours)

    def visit(i: int, B: Tensor, A: Tensor) -> None:
        X, Y = (A.T, B.T) if side else (B, A)  # the delta is X Y, or its transpose
        between = Y if other is None else Y @ other[i]
        out[i] += X @ (between @ (between.T @ (X.T @ ours[i])))

    _go(of, fleet, sites, visit)
    return [torch.linalg.qr(x).Q for x in out]


def _diagonal(of: Jd, fleet: Fleet, sites: Sequence[Site]) -> tuple[Bases, Bases]:
    U, V = _random(of, sites)
    for _ in range(of.iterations):
        U = _least_squares(of, fleet, sites, 0, U, V)
        V = _least_squares(of, fleet, sites, 1, V, U)
    return U, V


def _least_squares(of: Jd, fleet: Fleet, sites: Sequence[Site], side: int, ours: Bases, other: Bases) -> Bases:
    """A side of every site, with columns of length 1, from the other side and the diagonals that both sides give."""
    sums, diagonals = _zeros(ours), [torch.zeros(of.k, of.k, dtype=torch.float64) for _ in sites]
    grams = [x.T @ x for x in other]
    solved = [_inverse((x.T @ x) * g) for x, g in zip(ours, grams, strict=True)]

    def visit(i: int, B: Tensor, A: Tensor) -> None:
        X, Y = (A.T, B.T) if side else (B, A)
        between = Y @ other[i]
        s = solved[i] @ ((X.T @ ours[i]) * between).sum(0)
        diagonals[i] += s[:, None] * s
        sums[i] += X @ between * s

    _go(of, fleet, sites, visit)
    out = [x @ _inverse(d * g) for x, d, g in zip(sums, diagonals, grams, strict=True)]
    return [x / x.norm(dim=0).clamp_min(1e-30) for x in out]  # what a column was larger by, the diagonals take up


def _go(of: Jd, fleet: Fleet, sites: Sequence[Site], visit: Visit) -> None:
    """Shows every delta of the fleet to `visit`, with its weight in B. Raises: BadInput where all are zero."""
    at = {s.name: i for i, s in enumerate(sites)}
    seen = False
    for factors in fleet():
        for name, B, A in _weighed(of, factors, sites):
            visit(at[name], B, A)
            seen = True
    if not seen:
        raise BadInput("all variants of the fleet are zero: there is nothing to pack")


def _weighed(of: Jd, factors: Factors, sites: Sequence[Site]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, (B, A) in checked(factors, sites).items():
        B, A = B.double(), A.double()
        norm = ((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt()
        if norm > 0:
            yield name, B / norm if of.even else B, A


def _random(of: Jd, sites: Sequence[Site]) -> tuple[Bases, Bases]:
    def drawn(site: Site, leaf: str, width: int) -> Tensor:
        return normal(rng(of.seed, "jd", leaf, site.name), (width, of.columns(site))).double()

    return [drawn(s, "U", s.out) for s in sites], [drawn(s, "V", s.into) for s in sites]


def _zeros(like: Bases) -> Bases:
    return [torch.zeros_like(x) for x in like]


def _inverse(gram: Tensor) -> Tensor:
    """The inverse of a symmetric matrix, or what stands for it where columns depend on each other."""
    inverse: Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=1e-10)
    return inverse
