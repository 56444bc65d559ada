"""Adapters: change a linear map of the base with few trained numbers.

One file here is one method. A method is pure: `group` says which sites share a pool, `pool` and `own` draw the
starting tensors, `weight` is the definition, and any faster form must equal it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from plures.core.folder import Folder
from plures.tensors.rng import Rng
from plures.tensors.site import Site, Tensors

adapts = Folder("plures.adapt", "adapt")


@runtime_checkable
class Adapter(Protocol):
    """Floating tensors train unless `frozen` names their leaf; integer tensors are constants.

    Optional: `forward(x, y, own, pool)` returns the adapted output `[..., out]` given `y`, the base's output (it then
    works on quantised bases); `factors(own, pool)` returns `(B, A)` with `delta = B A`, so that the variant exports to
    plain LoRA without loss; `shards(own, pool)` returns `(rows [2, r, l], scale [r])` where A and B are rows of the
    pool's leaves "A" and "B" put side by side, so that the server keeps the pools and never builds the factors.
    """

    frozen: ClassVar[frozenset[str]]

    def group(self, site: Site) -> str:
        """The sites that share one pool have one name here; "" for a site that shares nothing. No dots."""
        ...

    def pool(self, sites: Sequence[Site], rng: Rng) -> dict[str, Tensor]:
        """What the sites of one group share, float32; {} if nothing. `sites` are in the order of their layers."""
        ...

    def own(self, site: Site, pool: Tensors, rng: Rng) -> dict[str, Tensor]:
        """What belongs to `site` alone, float32 or integer; the adapted map starts as the base's."""
        ...

    def weight(self, W: Tensor, own: Tensors, pool: Tensors) -> Tensor:
        """The adapted weight `[out, into]`: the definition."""
        ...
