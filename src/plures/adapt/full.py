"""Full fine-tuning of the chosen sites, as a dense delta: the ceiling that adapters are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plures.core.folder import method
from plures.tensors.rng import Rng
from plures.tensors.site import Site, Tensors


@method(
    paper="none",
    title="Full fine-tuning",
    status="stable",
    when="The ceiling in a comparison, or one variant that may cost as much as the base.",
)
@dataclass(frozen=True)
class Full:
    """Every entry of every site trains: weight = W + D.

    Options: none.

    Shapes: own `D [out, into]` zero.
    Paper: none; the delta form trains as the weight itself does, since dL/dD = dL/dW.
    Departs from the paper: embeddings and norms stay frozen; name them in `modules_to_save` to train them too.
    """

    frozen: ClassVar[frozenset[str]] = frozenset()

    def group(self, site: Site) -> str:
        """Nothing is shared."""
        return ""

    def pool(self, sites: Sequence[Site], rng: Rng) -> dict[str, Tensor]:
        """Nothing is shared."""
        return {}

    def own(self, site: Site, pool: Tensors, rng: Rng) -> dict[str, Tensor]:
        """A zero delta."""
        return {"D": torch.zeros(site.out, site.into)}

    def weight(self, W: Tensor, own: Tensors, pool: Tensors) -> Tensor:
        """`W + D`."""
        return W + own["D"].to(W.dtype)

    def forward(self, x: Tensor, y: Tensor, own: Tensors, pool: Tensors) -> Tensor:
        """`y + D x`."""
        return y + torch.nn.functional.linear(x, own["D"].to(x.dtype)).to(y.dtype)
