"""Bases that pay: what a fleet's vectors have in common, and how much of it is worth its bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plures.core.errors import BadInput
from plures.tensors.gauge import Gauged, gauged
from plures.tensors.site import Site
from plures.tensors.turn import narrowed

Array = np.ndarray[Any, Any]
Fleet = Callable[[], Iterable[Mapping[str, tuple[Tensor, Tensor]]]]
MOST_MOMENTS = 1 << 30  # bytes of second moments that are summed in one pass over the fleet
FIRST = 5  # a row of strength 1 has a singular value this many quarter octaves below the step
MOST_STRENGTH = 120


def octaves(share: float | Array) -> Any:
    """Quarter octaves of the root of a share of the energy, from -80 to 0."""
    return np.clip(np.round(2 * np.log2(np.maximum(share, 1e-12))), -80, 0).astype(np.int16)


def norm(forms: Sequence[Gauged]) -> float:
    """The Frobenius norm of a delta, over all sites."""
    return math.sqrt(sum(float(g.s.double().square().sum()) for g in forms))


def sampled(fleet: Fleet, sites: Sequence[Site], most: int) -> tuple[list[list[Gauged]], list[float], Array]:
    """The first `most` variants in the one form, the norms of all, and of every site the size of its relative norms."""
    sample, norms = list[list[Gauged]](), list[float]()
    sizes, at = np.zeros(len(sites)), {s.name: i for i, s in enumerate(sites)}
    for factors in fleet():
        forms = gauged(factors)
        norms.append(norm(forms))
        if norms[-1] > 0:
            for g in forms:
                sizes[[at[n] for n in g.names]] += g.s.square().sum(1).numpy() / norms[-1] ** 2
            if len(sample) < most:
                sample.append(forms)
    if not sample:
        raise BadInput("all variants of the fleet are zero: there is nothing to pack")
    return sample, norms, np.sqrt(sizes)


def moments(fleet: Fleet, sites: Sequence[Site], norms: Sequence[float]) -> Iterator[Tensor]:
    """Of every site the second moments of `s U` and of `s V` over the fleet, each variant at norm 1."""
    for some in passes(sites):
        sums = {s.name: [torch.zeros(s.out, s.out), torch.zeros(s.into, s.into)] for s in some}
        for factors, norm in zip(fleet(), norms, strict=True):
            for g in gauged({n: f for n, f in factors.items() if n in sums}) if norm > 0 else []:
                for name, *rows in zip(g.names, g.U * g.s[..., None], g.V * g.s[..., None], strict=True):
                    for total, x in zip(sums[name], rows, strict=True):
                        total.addmm_(x.T, x, alpha=norm**-2)
        for s in some:
            yield from sums.pop(s.name)


def passes(sites: Sequence[Site]) -> Iterator[Sequence[Site]]:
    """The sites in runs whose second moments, of both sides in float32, take about `MOST_MOMENTS` bytes at most."""
    start = 0
    while start < len(sites):
        end, n_bytes = start, 0
        while end < len(sites) and (end == start or n_bytes < MOST_MOMENTS):
            n_bytes += 4 * (sites[end].out ** 2 + sites[end].into ** 2)
            end += 1
        yield sites[start:end]
        start = end


@cache
def bits_by_size() -> tuple[Array, Array]:
    """Bits of a rounded Gaussian number by the quarter octaves of its deviation over the step, from -40 on."""
    at = np.arange(-40, 4 * MOST_STRENGTH)
    out = np.empty(len(at))
    for i, c in enumerate(at):
        sigma = 2.0 ** (c / 4)
        if sigma > 16:
            out[i] = math.log2(sigma * math.sqrt(2 * math.pi * math.e))
            continue
        p = cells(sigma, math.ceil(8 * sigma) + 1)
        p = p[p > 0]
        out[i] = -(p * np.log2(p)).sum()
    return at, out


def cells(sigma: float, most: int) -> Array:
    """How likely a Gaussian number is rounded to each of `-most` to `most`."""
    edges = np.array([math.erf(e / sigma / math.sqrt(2)) for e in np.arange(-most - 0.5, most + 1)])
    return np.diff(edges) / 2


def choose(moment: Tensor, strengths: Array, times: float) -> tuple[Tensor, Tensor, Tensor]:
    """The basis of a side, int8 `[k, width]`, its scales, and the octaves of `k` shares of energy and of the rest's.

    `strengths` are those of the sample's rows and each stands for `times` rows of the fleet.
    """
    width = len(moment)
    values, vectors = torch.linalg.eigh(moment)
    share = values.flip(0).clamp_min(0).double().numpy()
    share = share / max(share.sum(), 1e-30)
    many = np.bincount(strengths[strengths > 0], minlength=MOST_STRENGTH + 1) * times
    c = np.flatnonzero(many)
    at, bits = bits_by_size()

    def price(shares: Array) -> Array:
        """Bits that one coordinate of such a share costs all rows."""
        found = np.interp((c[:, None] - FIRST) + 2 * np.log2(np.maximum(shares, 1e-12)), at, bits)
        return np.asarray(many[c] @ found)

    before = np.concatenate([[0.0], np.cumsum(price(share))])
    left = np.maximum(1 - np.concatenate([[0.0], np.cumsum(share)]), 0)
    rest = left / np.maximum(width - np.arange(width + 1), 1)
    cost = before + np.arange(width + 1) * (8 * width + 16) + (width - np.arange(width + 1)) * price(rest)
    k = int(np.argmin(cost))
    whole, scale = narrowed(vectors.flip(1).T[:k])
    spread = octaves(np.concatenate([share[:k], rest[k : k + 1]]))
    return whole, scale, torch.from_numpy(spread.astype(np.int8))
