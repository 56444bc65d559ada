"""Packing in a metric: errors count by what they do to the base, and packers see coordinates where all count alike.

At a site `y = W x`, an error `D` of the delta moves the loss by about `tr(G D C D')`, with second moments `C` of inputs
`x` and `G` of gradients by `y` (Kronecker-factored curvature, arXiv:1503.05671). Factors `B`, `A` are packed as `P' B`,
`A R`, where `P P' = G` and `R R' = C` (damped), so that what a packer takes for the error is that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from plures.core.errors import BadInput
from plures.pack import Codec, Factors, Fleet, Packer
from plures.tensors.site import Site
from plures.tensors.turn import turns
from plures.tensors.warp import Warp, weighed

LEAVES = ("metric.kept", "metric.basis", "metric.scale", "metric.sizes")


def metric(moments: Iterable[tuple[Tensor, Tensor]], rows: float) -> dict[str, Tensor]:
    """A metric, by leaf, of every site's second moments of gradients `[out, out]` and of inputs `[into, into]`.

    `rows`: how many vectors of each side will be packed in it; the more they are, the finer it is told. Moments of
    zeros, of which nothing was measured, leave a side as it is. The unit does not matter.
    """
    kept, bases, scales, sizes, seen = list[int](), list[Tensor](), list[Tensor](), list[Tensor](), list[bool]()
    for pair in moments:
        for moment in pair:
            basis, scale, size = weighed(moment.float().cpu(), rows)
            seen.append(bool(moment.any()))
            kept.append(len(scale))
            bases.append(basis.reshape(-1))
            scales.append(scale)
            sizes.append(size)
    for side in (0, 1):  # each at about 1, so that whatever the unit is, numbers are of a usual size
        mine = [at for at in range(side, len(sizes), 2) if seen[at]]
        usual = math.sqrt(sum(float(sizes[at].square().mean()) for at in mine) / max(len(mine), 1))
        for at in mine:
            sizes[at] = sizes[at] / usual
    found = torch.tensor(kept, dtype=torch.int32), torch.cat(bases), torch.cat(scales), torch.cat(sizes)
    return dict(zip(LEAVES, found, strict=True))


class Metric:
    """Factors as errors in them count, and back."""

    def __init__(self, sites: Sequence[Site], leaves: Mapping[str, Tensor]) -> None:
        """Of the leaves of `metric`. Raises: BadInput where they are not of these sites."""
        try:
            widths = [w for s in sites for w in (s.out, s.into)]
            kept = leaves["metric.kept"].tolist()
            found = list(turns(widths, kept, leaves["metric.basis"], leaves["metric.scale"]))
            sizes = torch.split(leaves["metric.sizes"], [k + 1 for k in kept])
        except (KeyError, RuntimeError, ValueError) as error:
            raise BadInput(f"the metric that the fleet shares is not of these {len(sites)} sites: {error}") from error
        if not all(bool(s.isfinite().all() and (s > 0).all()) for s in sizes):
            raise BadInput("the metric that the fleet shares has sizes that are not above 0; it is damaged")
        warps = [Warp(turn, size) for turn, size in zip(found, sizes, strict=True)]
        self._of = {s.name: (warps[2 * i], warps[2 * i + 1]) for i, s in enumerate(sites)}

    def there(self, factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
        """Factors `B [out, r]`, `A [r, into]` where all errors count alike; of sites that it lacks as they are."""
        return {n: (self._of[n][0].there(B.float().T).T, self._of[n][1].there(A.float())) if n in self._of else (B, A)
                for n, (B, A) in factors.items()}  # fmt: skip

    def back(self, factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of which `there` made these."""
        return {n: (self._of[n][0].back(B.T).T.contiguous(), self._of[n][1].back(A)) for n, (B, A) in factors.items()}


def fit(packer: Packer, fleet: Fleet, sites: Sequence[Site], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What all variants share, by leaf: the packer's, fitted in the metric of `leaves`, and those; {}: no metric."""
    if not leaves:
        return packer.fit(fleet, sites)
    to = Metric(sites, leaves)
    return packer.fit(lambda: (to.there(f) for f in fleet()), sites) | dict(leaves)


def codec(packer: Packer, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> Codec:
    """What codes and decodes, in the metric that is among what is shared, if any.

    Raises: BadInput where what is shared is not of these sites.
    """
    made = packer.codec(sites, {k: v for k, v in shared.items() if k not in LEAVES})
    return Measured(made, Metric(sites, shared)) if LEAVES[0] in shared else made


def finer(codec: Codec, packer: Packer) -> Codec:
    """The codec by another packer, one of `finer` of its own; what the fleet shares is in memory once for both."""
    made = copy(codec)
    if isinstance(made, Measured):
        made.inner = finer(made.inner, packer)
    made.of = packer
    return made


class Measured:
    """A packer's codec in the coordinates of a metric."""

    def __init__(self, inner: Codec, to: Metric) -> None:
        """Of what codes there."""
        self.of, self.inner, self.to = inner.of, inner, to

    def encode(self, factors: Factors) -> Tensor:
        """A variant's code, uint8 `[bytes]`. Raises: as the packer's."""
        return self.inner.encode(self.to.there(factors))

    def decode(self, code: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The variant of a code. Raises: BadInput for a damaged one."""
        return self.to.back(self.inner.decode(code))
