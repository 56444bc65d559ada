"""LoRA (Hu et al. 2022): the low-rank adapter that everything else is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.core.units import lora_scale
from plures.tensors.rng import Rng, uniform
from plures.tensors.site import Site, Tensors


@method(
    paper="arXiv:2106.09685",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    status="stable",
    when="The safe choice: every server loads it. Costs r * (into + out) numbers a site.",
)
@dataclass(frozen=True)
class Lora:
    """Each site gets two small factors of its own: delta = alpha/r * B A.

    Options:
        r: rank of the factors.
        alpha: the delta is scaled by alpha / r.
        rslora: scale by alpha / sqrt(r) instead (rank-stabilised LoRA, arXiv:2312.03732).

    Shapes: own `A [r, into]` uniform with fan-in `into`, `B [out, r]` zero.
    Raises: WrongUse for a rank or scale out of range.
    Paper: arXiv:2106.09685 section 4.1, with the initialisation of the authors' code and PEFT (A Kaiming uniform).
    Departs from the paper: A is Kaiming uniform, as in all implementations; the text says Gaussian.
    """

    r: int = 8
    alpha: float = 16.0
    rslora: bool = False
    frozen: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.r < 1:
            raise WrongUse(f"lora.r must be at least 1, got {self.r}")

    @property
    def scale(self) -> float:
        """What `B A` is multiplied by."""
        return lora_scale(self.alpha, self.r, self.rslora)

    def group(self, site: Site) -> str:
        """Nothing is shared."""
        return ""

    def pool(self, sites: Sequence[Site], rng: Rng) -> dict[str, Tensor]:
        """Nothing is shared."""
        return {}

    def own(self, site: Site, pool: Tensors, rng: Rng) -> dict[str, Tensor]:
        """A uniform in +-1/sqrt(into), B zero."""
        return {"A": uniform(rng, (self.r, site.into), site.into**-0.5), "B": torch.zeros(site.out, self.r)}

    def factors(self, own: Tensors, pool: Tensors) -> tuple[Tensor, Tensor]:
        """`B [out, r]` (scaled) and `A [r, into]`."""
        return own["B"] * self.scale, own["A"]

    def weight(self, W: Tensor, own: Tensors, pool: Tensors) -> Tensor:
        """`W + alpha/r * B A`."""
        return W + self.scale * (own["B"] @ own["A"]).to(W.dtype)

    def forward(self, x: Tensor, y: Tensor, own: Tensors, pool: Tensors) -> Tensor:
        """`y + alpha/r * B (A x)`, never forming the delta."""
        h = torch.nn.functional.linear(x, own["A"].to(x.dtype)) * self.scale
        return y + torch.nn.functional.linear(h, own["B"].to(x.dtype)).to(y.dtype)
