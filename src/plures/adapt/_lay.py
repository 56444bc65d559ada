"""Lay a method's starting tensors over the sites of a base, or only count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plures.adapt import Method
from plures.core.errors import WrongUse
from plures.tensors.rng import rng
from plures.tensors.site import Site, grouped


@dataclass(frozen=True)
class Laid:
    """Tensors of a method over all sites: `own[site][leaf]`, `pool[group][leaf]`, and each site's group."""

    sites: tuple[Site, ...]
    group_of: Mapping[str, str]
    own: Mapping[str, Mapping[str, Tensor]]
    pool: Mapping[str, Mapping[str, Tensor]]

    def trained(self, frozen: frozenset[str]) -> int:
        """Numbers that train: floating tensors whose leaf is not `frozen`."""
        rooms = [*self.own.values(), *self.pool.values()]
        return sum(
            t.numel() for leaves in rooms for k, t in leaves.items() if t.is_floating_point() and k not in frozen
        )


def lay(method: Method, sites: Sequence[Site], seed: int) -> Laid:
    """Draw every tensor of `method` for `sites`, each from the stream of its own name.

    Under `with torch.device("meta")` nothing is drawn or allocated, so that a plan for any base costs nothing.
    Raises: WrongUse where the method reads the base's weight and there is none to read.
    """
    name = type(method).card.name  # type: ignore[attr-defined]
    blind = next((s for s in sites if s.W is None), None)
    if "W" in getattr(method, "needs", ()) and blind is not None and torch.get_default_device().type != "meta":
        raise WrongUse(f"{name} starts from the base's weight, and that of {blind.name!r} cannot be read (a quantised "
                       "base is not unpacked); use the unquantised base, or another method")  # fmt: skip
    group_of = {s.name: method.group(s) for s in sites}
    groups = grouped(sites, group_of)
    pools = {g: dict(method.pool(members, rng(seed, name, "pool", g))) if g else {} for g, members in groups.items()}
    placed = [s for members in groups.values() for s in members]
    own = {s.name: dict(method.own(s, pools[group_of[s.name]], rng(seed, name, "own", s.name))) for s in placed}
    return Laid(tuple(placed), group_of, own, {g: p for g, p in pools.items() if p})


def count_trained(method: Method, sites: Sequence[Site]) -> int:
    """How many numbers `method` would train on `sites`; allocates nothing."""
    with torch.device("meta"):
        return lay(method, sites, 0).trained(method.frozen)
