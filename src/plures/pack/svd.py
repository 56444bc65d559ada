"""Truncated singular value decomposition, what is left being rounded to nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.pack import Factors, Fleet
from plures.tensors.pieces import Pieces, balanced, checked, coded, over, put_ints, put_ranks
from plures.tensors.site import Site


@method(
    paper="none",
    title="Low-rank approximation (Eckart and Young 1936, doi:10.1007/BF02288367), then rounding",
    status="trial",
    when="For variants whose rank was chosen too high, and where what serves them gains by a lower one. Where singular "
    "values fall slowly, as in most trained variants, rounding alone is smaller at the same error.",
)
@dataclass(frozen=True)
class Svd:
    """The largest singular values of every delta with their vectors, rounded in the form `sqrt(s) U`, `sqrt(s) V`.

        ||delta - kept||^2 = sum of s^2 over what is left out <= error^2 ||delta||^2     over all sites of a variant

    With `rank` 0 the smallest singular values of a variant are left out, over all its sites together, as long as the
    equation holds: no choice keeps fewer. Rounding adds to this error (6 bits: about 0.03).

    Options:
        rank: the rank of every site; 0 is as few as `error` allows.
        error: the relative error of leaving out, where `rank` is 0; from 0 and below 1.
        bits: of a number, from 2 to 8.

    Raises: WrongUse for options out of range.
    Paper: none on adapters is followed; it is as in textbooks.
    Departs from the paper: there is none to depart from.
    """

    rank: int = 0
    error: float = 0.1
    bits: int = 6
    bounds: ClassVar[bool] = False
    free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise WrongUse(f"svd.rank must be at least 0, got {self.rank}; 0 is as few as svd.error allows")
        if not 0 <= self.error < 1:
            raise WrongUse(f"svd.error must be from 0 and below 1, got {self.error}")
        if not 2 <= self.bits <= 8:
            raise WrongUse(f"svd.bits must be from 2 to 8, got {self.bits}")

    def finer(self, share: float) -> Svd | None:
        """With `share` of the error; None where the rank decides."""
        return None if self.rank else replace(self, error=share * self.error)

    def fit(self, fleet: Fleet, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Nothing is shared."""
        return {}

    def codec(self, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> Coder:
        """What codes and decodes."""
        return Coder(self, sites)


class Coder:
    """Codes variants of some sites."""

    def __init__(self, of: Svd, sites: Sequence[Site]) -> None:
        self.of, self.sites = of, tuple(sites)

    def ranks(self, values: Mapping[str, Tensor]) -> dict[str, int]:
        """How many singular values `[r]`, from the largest, are kept of every site."""
        if self.of.rank:
            return {n: min(self.of.rank, len(s)) for n, s in values.items()}
        if not values:
            return {}
        line = torch.cat([s.double() for s in values.values()])
        sizes, order = line.square().sort(stable=True)
        out = order[: int((sizes.cumsum(0) <= self.of.error**2 * sizes.sum()).sum())]
        kept = torch.ones(len(line), dtype=torch.bool)
        kept[out] = False
        ends = torch.split(kept, [len(s) for s in values.values()])
        return {n: int(k.sum()) for n, k in zip(values, ends, strict=True)}

    def encode(self, factors: Factors) -> Tensor:
        """A variant's code: ranks, then of every site both sides, each its scales and its numbers.

        Raises: BadInput for a site that the fleet did not have, of another shape, or not finite.
        """
        found = balanced(checked(factors, self.sites))
        ranks = self.ranks({n: s for n, (_, _, s) in found.items()})
        parts = [put_ranks([ranks.get(s.name, 0) for s in self.sites])]
        parts += [put_ints(side[: ranks[n]], self.of.bits) for n, f in found.items() if ranks[n] for side in f[:2]]
        return coded(parts)

    def decode(self, code: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of a code, `B [out, r]`, `A [r, into]` at every site with something.

        Raises: BadInput for a damaged code.
        """
        pieces, out = Pieces(code), {}
        for site, r in over(self.sites, pieces.ranks(len(self.sites))):
            B, A = (pieces.ints(r, width, self.of.bits) for width in (site.out, site.into))
            out[site.name] = B.T.contiguous(), A
        pieces.end()
        return out
