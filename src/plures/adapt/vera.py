"""VeRA (Kopiczko et al., ICLR 2024): frozen random factors shared by all sites, two trained vectors a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.rng import Rng, uniform
from plures.tensors.site import Site, Tensors


@method(
    paper="arXiv:2310.11454",
    title="VeRA: Vector-based Random Matrix Adaptation",
    status="stable",
    when="The smallest variants (r + out numbers a site), for tasks near the base; needs a large r and learning rate.",
)
@dataclass(frozen=True)
class Vera:
    """One pair of frozen random matrices for all sites of a shape, scaled by two trained vectors at each site.

        delta = diag(b) B diag(d) A

    Options:
        r: rank of the shared matrices; 256 and 1024 in the paper.
        d_initial: starting value of every entry of d; 0.1 in the paper and in PEFT.

    Shapes: pool `A [r, into]`, `B [out, r]` Kaiming uniform, frozen; own `d [r]`, `b [out]` zero.
    Raises: WrongUse for a rank out of range.
    Paper: arXiv:2310.11454 section 3.1, equation 2; initialisation of section 3.3 (Kaiming, gain sqrt 2 of a = 0).
    Departs from the paper: one pair for each shape of site (the paper's sites all have one shape).
    """

    r: int = 256
    d_initial: float = 0.1
    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    def __post_init__(self) -> None:
        if self.r < 1:
            raise WrongUse(f"vera.r must be at least 1, got {self.r}")

    def group(self, site: Site) -> str:
        """All sites of one shape share the random pair."""
        return f"{site.out}x{site.into}"

    def pool(self, sites: Sequence[Site], rng: Rng) -> dict[str, Tensor]:
        """The frozen pair: uniform in +-sqrt(6 / fan-in), fan-in `into` for A and r for B."""
        site = sites[0]
        return {
            "A": uniform(rng, (self.r, site.into), (6 / site.into) ** 0.5),
            "B": uniform(rng, (site.out, self.r), (6 / self.r) ** 0.5),
        }

    def own(self, site: Site, pool: Tensors, rng: Rng) -> dict[str, Tensor]:
        """d at `d_initial`, b at zero."""
        return {"d": torch.full((self.r,), self.d_initial), "b": torch.zeros(site.out)}

    def factors(self, own: Tensors, pool: Tensors) -> tuple[Tensor, Tensor]:
        """`diag(b) B [out, r]` and `diag(d) A [r, into]`."""
        return own["b"][:, None] * pool["B"], own["d"][:, None] * pool["A"]

    def weight(self, W: Tensor, own: Tensors, pool: Tensors) -> Tensor:
        """`W + diag(b) B diag(d) A`."""
        return W + (torch.diag(own["b"]) @ pool["B"] @ torch.diag(own["d"]) @ pool["A"]).to(W.dtype)

    def forward(self, x: Tensor, y: Tensor, own: Tensors, pool: Tensors) -> Tensor:
        """`y + b * (B (d * (A x)))`."""
        h = torch.nn.functional.linear(x, pool["A"].to(x.dtype)) * own["d"].to(x.dtype)
        return y + (torch.nn.functional.linear(h, pool["B"].to(x.dtype)) * own["b"].to(x.dtype)).to(y.dtype)
