"""FedSA-LoRA (Guo et al., ICLR 2025): clients of a federation share A, and keep B to themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.core.units import lora_scale
from plures.tensors.rng import Rng, smallest_int, uniform
from plures.tensors.site import Site, Tensors


@method(
    paper="arXiv:2410.01463",
    title="Selective Aggregation for Low-Rank Adaptation in Federated Learning",
    status="stable",
    when="Clients that cannot pool their rows: they average A and keep B. For one variant alone it is lora, or vera.",
)
@dataclass(frozen=True)
class Fedsa:
    """LoRA cut in two: A learns what clients have in common, B what is a client's own; only A is averaged.

        client c:      delta_c = scale * B_c A_c,  both trained; scale alpha/r (lora) or alpha/sqrt(r) (rslora)
        server:        A <- mean over c of A_c;  B_c stays
        form vera:     delta_c = diag(b_c) B0 diag(d_c) A0, where d is averaged, b stays, A0 and B0 are random, frozen

    What is averaged is the pool, what stays is the sites' own: clients that come from one start and average their
    pools hold the same pools, and the store keeps those once.

    Options:
        r: rank; 8 in the authors' configuration. vera needs hundreds.
        alpha: lora scales by alpha / r, rslora by alpha / sqrt(r), vera not at all.
        form: "lora", "rslora" or "vera".
        d_initial: with vera, the starting value of d (0.1 in PEFT, which the authors use).

    Shapes: lora and rslora: pool `A [r, into]` uniform with fan-in `into`, one for each site; own `B [out, r]` zero.
        vera: pool `A0 [r, into]`, `B0 [out, r]` frozen and `d [L, r]`, for the L sites of one shape; own `b [out]`
        zero, `at [1]` integer, the site's row of d.
    Raises: WrongUse for a rank out of range.
    Paper: arXiv:2410.01463: FedSA-LoRA, FedSA-rsLoRA, FedSA-VeRA. Which tensors stay (lora_B) is from
        github.com/Pengxin-Guo/FedSA-LoRA at fc276b5, federatedscope/glue/yamls/fedsa-lora.yaml; the adapters there are
        PEFT's, with r 8 and alpha 16.
    Departs from the paper: a classifier's head, which stays with its client there, is no part of the adapter. vera has
        one random pair for each shape of site, as `vera`. The rounds and the averaging are not the method's.
    """

    r: int = 8
    alpha: float = 16.0
    form: Literal["lora", "rslora", "vera"] = "lora"
    d_initial: float = 0.1
    frozen: ClassVar[frozenset[str]] = frozenset({"A0", "B0"})

    def __post_init__(self) -> None:
        if self.r < 1:
            raise WrongUse(f"fedsa.r must be at least 1, got {self.r}")
        if self.form not in ("lora", "rslora", "vera"):
            raise WrongUse(f"fedsa.form must be 'lora', 'rslora' or 'vera', got {self.form!r}")

    @property
    def scale(self) -> float:
        """What `B A` is multiplied by in the forms of LoRA."""
        return lora_scale(self.alpha, self.r, self.form == "rslora")

    def group(self, site: Site) -> str:
        """Each site by itself, under its name: only variants share its A. For vera, all sites of one shape."""
        return f"{site.out}x{site.into}" if self.form == "vera" else site.name.replace(".", "-")

    def pool(self, sites: Sequence[Site], rng: Rng) -> dict[str, Tensor]:
        """What a federation averages: A; or d, beside VeRA's frozen pair (Kaiming uniform, gain sqrt 2)."""
        site = sites[0]
        if self.form != "vera":
            return {"A": uniform(rng, (self.r, site.into), site.into**-0.5)}
        return {
            "A0": uniform(rng, (self.r, site.into), (6 / site.into) ** 0.5),
            "B0": uniform(rng, (site.out, self.r), (6 / self.r) ** 0.5),
            "d": torch.full((len(sites), self.r), self.d_initial),
        }

    def own(self, site: Site, pool: Tensors, rng: Rng) -> dict[str, Tensor]:
        """What stays with the client: B, or b, at zero."""
        if self.form != "vera":
            return {"B": torch.zeros(site.out, self.r)}
        return {"b": torch.zeros(site.out), "at": smallest_int(np.array([site.at]), site.depth - 1)}

    def _d(self, own: Tensors, pool: Tensors) -> Tensor:
        """This site's row of d."""
        return pool["d"][own["at"].long()].squeeze(0)

    def factors(self, own: Tensors, pool: Tensors) -> tuple[Tensor, Tensor]:
        """`B [out, r]` (scaled) and `A [r, into]`."""
        if self.form != "vera":
            return own["B"] * self.scale, pool["A"]
        return own["b"][:, None] * pool["B0"], self._d(own, pool)[:, None] * pool["A0"]

    def weight(self, W: Tensor, own: Tensors, pool: Tensors) -> Tensor:
        """`W + scale * B A`, or `W + diag(b) B0 diag(d) A0`."""
        if self.form != "vera":
            return W + self.scale * (own["B"] @ pool["A"]).to(W.dtype)
        d = torch.diag(self._d(own, pool))
        return W + (torch.diag(own["b"]) @ pool["B0"] @ d @ pool["A0"]).to(W.dtype)

    def forward(self, x: Tensor, y: Tensor, own: Tensors, pool: Tensors) -> Tensor:
        """`y + scale * B (A x)`, or `y + b * (B0 (d * (A0 x)))`."""
        if self.form != "vera":
            h = linear(x, pool["A"].to(x.dtype)) * self.scale
            return y + linear(h, own["B"].to(x.dtype)).to(y.dtype)
        h = linear(x, pool["A0"].to(x.dtype)) * self._d(own, pool).to(x.dtype)
        return y + (linear(h, pool["B0"].to(x.dtype)) * own["b"].to(x.dtype)).to(y.dtype)
