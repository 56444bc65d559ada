"""A site: one linear map of the base that may be changed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "Mapping[str, Tensor]"


@dataclass(frozen=True)
class Site:
    """One linear map `y = W x` of the base, with its place among the sites that share a pool with it.

    `W` is `[out, into]`, dequantised, and None while planning. `at` of `depth` is the site's position among the
    sites of its group, in the order of their layers.
    """

    name: str
    out: int
    into: int
    W: Tensor | None = None
    at: int = 0
    depth: int = 1

    @property
    def kind(self) -> str:
        """The linear's type, its path without layer numbers: `layers.3.mlp.up_proj` -> `layers.mlp.up_proj`."""
        return ".".join(part for part in self.name.split(".") if not part.isdigit())


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which layer 2 comes before layer 10."""
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name) if p)


def grouped(sites: Sequence[Site], group_of: Mapping[str, str]) -> dict[str, list[Site]]:
    """The sites by group, each group in the order of its layers and each site told its place in it."""
    groups: dict[str, list[Site]] = {}
    for site in sorted(sites, key=lambda s: natural(s.name)):
        groups.setdefault(group_of[site.name], []).append(site)
    return {g: [replace(s, at=i, depth=len(members)) for i, s in enumerate(members)] for g, members in groups.items()}
