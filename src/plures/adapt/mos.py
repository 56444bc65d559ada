"""Mixture of Shards (Wang et al., ICLR 2025): low-rank factors put together from shards of shared pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.rng import Rng, draw, normal, smallest_int, uniform
from plures.tensors.site import Site, Tensors


@method(
    paper="arXiv:2410.00938",
    title="MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
    status="stable",
    when="Many small variants of one base: better than LoRA at equal parameters here; at far fewer, measure first.",
)
@dataclass(frozen=True)
class Mos:
    """Each site's A and B are concatenated from shards that it picks out of pools shared by all layers.

    All L sites of one linear type (q, k, v, o, gate, up, down) and shape share two pools of shards: A with
    e*L*l rows of into/l, B with e*L*l rows of out/l. Of these rows the first (e-p)*L*l are public and the last
    p*L*l are private, p*l to a site. Site k draws (r-p)*l public rows without replacement, appends its own p*l
    private rows, and joins every l consecutive shards along the feature axis into one of r vectors:
        A_k = [pool_A[i_1] | ... | pool_A[i_l]; ...]   [r, into],    delta_k = alpha/r * B_k A_k
    so r, l and p move no trained number: a type trains e*L*(into+out), whatever they are. Because consecutive
    shards make a vector, the gathered rows [r*l, into/l] are A_k [r, into] by a reshape.

    Options:
        r: rank of every site's factors.
        e: equivalent rank, the trained parameters as the rank of a LoRA that has as many; e*L must be whole.
        l: shards per vector; must divide into and out (vector sharding; 1 switches it off).
        p: private rank, vectors that one site owns (shard privatisation; 0 switches it off).
        alpha: the delta is scaled by alpha / r.
        subset: draw r vectors for each site; False gives every site the whole pool, rank e*L (pure sharing).
        dissociate: draw A's and B's shards independently; False pairs them (pair dissociation).
        random_scale: standard deviation of a fixed random factor N(1, std) on each rank, one vector a site;
            0 switches it off (the paper's "random scaling", a peer of subset selection and not part of MoS).

    Shapes: pool A `[e*L*l, into/l]`, B `[e*L*l, out/l]`; own `index` `[2, r*l]` integer, row 0 for A, row 1 for B;
        own `scale` `[r]` where random_scale > 0.
    Raises: WrongUse for options out of range, a width that l does not divide, or a rank larger than the pool.
    Paper: arXiv:2410.00938 section 3, equations 3 to 6; index layout and initialisation (A uniform with fan-in
        `into`, B zero) as in the authors' code, github.com/Forence1999/MoS at cafb8dd, modules/Tied_LoRA.py.
    Departs from the paper: sites of one type whose shapes differ get one pool for each shape (the paper's models
        have none); e may be a fraction. The trained count stays e * sum(into + out) over the sites.
    """

    r: int = 8
    e: float = 2
    l: int = 4
    p: int = 1
    alpha: float = 16.0
    subset: bool = True
    dissociate: bool = True
    random_scale: float = 0.0
    frozen: ClassVar[frozenset[str]] = frozenset({"scale"})

    def __post_init__(self) -> None:
        for name in ("r", "l"):
            if getattr(self, name) < 1:
                raise WrongUse(f"mos.{name} must be at least 1, got {getattr(self, name)}")
        if self.e <= 0:
            raise WrongUse(f"mos.e must be above 0, got {self.e}; 2 trains as many numbers as LoRA of rank 2")
        if not 0 <= self.p <= min(self.e, self.r):
            raise WrongUse(f"mos.p must be in [0, min(e, r)] = [0, {min(self.e, self.r):g}], got {self.p}")
        if self.p == self.e and self.r != self.p:
            raise WrongUse(f"mos.p = e = {self.p} leaves no public shards, so r must be {self.p} too, got {self.r}")
        if not self.subset and (self.p or not self.dissociate):
            raise WrongUse("mos.subset = false (pure sharing) needs p = 0 and dissociate = true: nothing is drawn")
        if self.random_scale < 0:
            raise WrongUse(f"mos.random_scale must be at least 0, got {self.random_scale}")

    def group(self, site: Site) -> str:
        """Sites of one linear type and shape share their pools."""
        return f"{site.kind.replace('.', '-')}_{site.out}x{site.into}"

    def _rows(self, depth: int) -> tuple[int, int]:
        """Public and private pool rows of a group of `depth` sites."""
        vectors = self.e * depth
        if vectors != int(vectors):
            raise WrongUse(
                f"mos.e = {self.e} times {depth} layers is {vectors:g} vectors; choose e so that e * {depth} is whole"
            )
        private = self.p * depth * self.l
        return int(vectors) * self.l - private, private

    def pool(self, sites: Sequence[Site], rng: Rng) -> dict[str, Tensor]:
        """The two pools of one type: A uniform with fan-in `into`, B zero."""
        site = sites[0]
        for width, side in ((site.into, "input"), (site.out, "output")):
            if width % self.l:
                raise WrongUse(f"mos.l = {self.l} does not divide the {side} width {width} of {site.name!r}; "
                               f"choose a divisor, for instance {_divisor(width, self.l)}")  # fmt: skip
        public, private = self._rows(len(sites))
        if self.subset and (self.r - self.p) * self.l > public:
            most = public // self.l + self.p
            raise WrongUse(
                f"mos.r = {self.r} is larger than the pool: {len(sites)} layers at e = {self.e:g}, p = {self.p} hold "
                f"{public // self.l} public vectors, so r is at most {most}; lower r or p, or raise e"
            )
        return {
            "A": uniform(rng, (public + private, site.into // self.l), site.into**-0.5),
            "B": torch.zeros(public + private, site.out // self.l),
        }

    def own(self, site: Site, pool: Tensors, rng: Rng) -> dict[str, Tensor]:
        """The site's picks in both pools: public ones in random order, then its private ones."""
        public, private = self._rows(site.depth)
        if self.subset:
            mine = public + site.at * self.p * self.l + np.arange(self.p * self.l)
            a = np.concatenate([draw(rng, public, (self.r - self.p) * self.l), mine])
            b = np.concatenate([draw(rng, public, (self.r - self.p) * self.l), mine]) if self.dissociate else a
        else:
            a = b = np.arange(public + private)
        out = {"index": smallest_int(np.stack([a, b]), public + private - 1)}
        if self.random_scale:
            out["scale"] = normal(rng, (len(a) // self.l,), self.random_scale, mean=1.0)
        return out

    def factors(self, own: Tensors, pool: Tensors) -> tuple[Tensor, Tensor]:
        """`B [out, r]` (scaled by alpha / r) and `A [r, into]` of one site, gathered; the delta is `B A`."""
        index = own["index"].int()
        A = pool["A"].index_select(0, index[0])
        B = pool["B"].index_select(0, index[1])
        rank = index.shape[1] // self.l
        A, B = A.view(rank, -1), B.view(rank, -1)
        if "scale" in own:
            A = A * own["scale"][:, None]
        return B.T * (self.alpha / rank), A

    def shards(self, own: Tensors, pool: Tensors) -> tuple[Tensor, Tensor]:
        """Which shards make one site's factors, `[2, r, l]` rows of pool A and pool B, and each rank's scale `[r]`."""
        table = own["index"].view(2, -1, self.l)
        scale = torch.full((table.shape[1],), self.alpha / table.shape[1])
        return table, scale * own["scale"] if "scale" in own else scale

    def weight(self, W: Tensor, own: Tensors, pool: Tensors) -> Tensor:
        """`W + alpha/r * B A`, with A and B written as the paper does: rows i::l joined along the features."""
        index = own["index"].long()
        a, b = pool["A"][index[0]], pool["B"][index[1]]
        A = torch.cat([a[i :: self.l] for i in range(self.l)], dim=1)
        B = torch.cat([b[i :: self.l] for i in range(self.l)], dim=1)
        if "scale" in own:
            A = own["scale"][:, None] * A
        return W + (self.alpha / A.shape[0]) * (B.T @ A).to(W.dtype)

    def forward(self, x: Tensor, y: Tensor, own: Tensors, pool: Tensors) -> Tensor:
        """`y + B (A x)` with both factors gathered: cheapest for one variant, and A, B can be cached."""
        index = own["index"].int()
        A = pool["A"].index_select(0, index[0])
        rank = index.shape[1] // self.l
        h = torch.nn.functional.linear(x, A.view(rank, -1).to(x.dtype)) * (self.alpha / rank)
        if "scale" in own:
            h = h * own["scale"].to(x.dtype)
        B = pool["B"].index_select(0, index[1])
        return y + (h @ B.view(rank, -1).to(x.dtype)).to(y.dtype)


def _divisor(width: int, near: int) -> int:
    """The divisor of `width` nearest to `near`."""
    return min((d for d in range(1, min(width, 64) + 1) if width % d == 0), key=lambda d: abs(d - near))
