"""Rounding to nearest: each number in a few bits, with a scale for a row or a group of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.pack import Factors, Fleet
from plures.tensors.pieces import Pieces, balanced, checked, coded, over, put_ints, put_ranks, unchanged
from plures.tensors.site import Site


@method(
    paper="none",
    title="Round to nearest with absmax scales",
    status="trial",
    when="The plain baseline: no fitting, nothing shared, quick. At 8 bits almost nothing is lost; below 4 bits klt "
    "loses less for the same bytes. The error follows from the bits and cannot be asked for.",
)
@dataclass(frozen=True)
class Rtn:
    """Rows of the factors rounded to `2**bits - 1` even levels, the largest number of each group being the last.

        x -> scale * clip(round(x / scale), -L, L)      L = 2**(bits-1) - 1, scale = max |x| of the group / L, in fp16

    Factors are free up to an invertible matrix between them. In their one form, `sqrt(s) U` and `sqrt(s) V`, both sides
    are of one size and their rows orthogonal, which costs nothing and mostly loses less. A site's scales have one
    exponent a side before them, so that they may be of any size.

    Options:
        bits: of a number, from 2 to 8.
        group: how many numbers of a row of B^T or A have one scale; 0 is a whole row.
        form: 'one' brings the factors into their one form first, 'given' leaves them as they are.

    Raises: WrongUse for options out of range.
    Paper: none is followed; it is textbook rounding.
    Departs from the paper: there is none to depart from.
    """

    bits: int = 4
    group: int = 0
    form: Literal["one", "given"] = "one"
    bounds: ClassVar[bool] = False
    free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise WrongUse(f"rtn.bits must be from 2 to 8, got {self.bits}")
        if self.group < 0:
            raise WrongUse(f"rtn.group must be at least 0, got {self.group}; 0 is a whole row")
        if self.form not in ("one", "given"):
            raise WrongUse(f"rtn.form must be 'one' or 'given', got {self.form!r}")

    def finer(self, share: float) -> Rtn | None:
        """None: the error follows from the bits."""
        return None

    def fit(self, fleet: Fleet, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Nothing is shared."""
        return {}

    def codec(self, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> Coder:
        """What codes and decodes."""
        return Coder(self, sites)


class Coder:
    """Codes variants of some sites."""

    def __init__(self, of: Rtn, sites: Sequence[Site]) -> None:
        self.of, self.sites = of, tuple(sites)

    def encode(self, factors: Factors) -> Tensor:
        """A variant's code: ranks, then of every site B^T and A, each its scales and its numbers.

        Raises: BadInput for a site that the fleet did not have, of another shape, or not finite.
        """
        given = checked(factors, self.sites)
        rows = {n: f[:2] for n, f in balanced(given).items()} if self.of.form == "one" else unchanged(given)
        parts = [put_ranks([len(rows[s.name][0]) if s.name in rows else 0 for s in self.sites])]
        parts += [put_ints(side, self.of.bits, self.of.group) for sides in rows.values() for side in sides]
        return coded(parts)

    def decode(self, code: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of a code, `B [out, r]`, `A [r, into]` at every site with something.

        Raises: BadInput for a damaged code.
        """
        pieces, out = Pieces(code), {}
        for site, r in over(self.sites, pieces.ranks(len(self.sites))):
            B, A = (pieces.ints(r, width, self.of.bits, self.of.group) for width in (site.out, site.into))
            out[site.name] = B.T.contiguous(), A
        pieces.end()
        return out
