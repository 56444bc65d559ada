"""Shards by number: rows cut into shards, each the sum of codewords that the fleet shares (residual k-means)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from plures.core.errors import BadInput, WrongUse
from plures.core.folder import method
from plures.pack import Factors, Fleet
from plures.tensors.pieces import Array, Pieces, balanced, checked, coded, over, put_plain, put_ranks, put_scales
from plures.tensors.rng import Rng, rng
from plures.tensors.site import Site

MOST = 1 << 15  # shards, at most, that codewords are fitted to
BLOCK = 1 << 13  # shards in one product
TURNS = 12  # of k-means
Kind = tuple[str, int, int]  # the linear's type, 0 for B and 1 for A, the row's width


@method(
    paper="none",
    title="Residual vector quantisation (Juang and Gray 1982) on shards as those of MoS (arXiv:2410.00938)",
    status="trial",
    when="To compare a pool of shards with integers, or for variants that repeat shards. On two trained fleets it lost "
    "a little less than rtn of the same bytes (benchmarks/pack_measure.py), besides codebooks and a slow fit; klt is "
    "smaller than both. Wide rows need more shards: a shard has one number a stage whatever its width.",
)
@dataclass(frozen=True)
class Rvq:
    """Each row of `sqrt(s) U`, `sqrt(s) V` is its scale times shards, each the sum of one codeword of every stage.

        row = scale * [sum_j C_j[n_1j], ..., sum_j C_j[n_lj]]       C_j [codewords, width / shards], n the numbers kept

    Stage j is k-means on what the stages before it left of rows brought to a mean square of 1. There is a codebook for
    each type of linear and side, as a pool of MoS is; it is fp16 and shared. A shard takes the nearest codeword of each
    stage in turn, then the row its best scale (least squares, fp16). A row whose width is no multiple of `shards` is
    filled up with zeros. Codewords are fitted to at most 32768 shards, evenly out of the whole fleet.

    Options:
        shards: pieces of a row.
        codewords: in a stage, from 2 to 65536.
        stages: how many codewords are summed.
        seed: of the beginning of k-means.

    Raises: WrongUse for options out of range; BadInput for a fleet of nothing but zeros.
    Paper: none is followed; residual quantisation is as in textbooks.
    Departs from the paper: of MoS (arXiv:2410.00938), whose shards are trained and not fitted, it has only the form.
    """

    shards: int = 16
    codewords: int = 256
    stages: int = 4
    seed: int = 0
    bounds: ClassVar[bool] = False
    free: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for key in ("shards", "stages"):
            if getattr(self, key) < 1:
                raise WrongUse(f"rvq.{key} must be at least 1, got {getattr(self, key)}")
        if not 2 <= self.codewords <= 1 << 16:
            raise WrongUse(f"rvq.codewords must be from 2 to 65536, got {self.codewords}; 256 is a byte each")

    def finer(self, share: float) -> Rvq | None:
        """None: the error follows from the codewords."""
        return None

    def fit(self, fleet: Fleet, sites: Sequence[Site]) -> dict[str, Tensor]:
        """The codebooks of all kinds; goes over the fleet twice.

        Raises: BadInput for a fleet of nothing but zeros.
        """
        kinds = _kinds(sites)
        many = dict.fromkeys(kinds, 0)
        for kind, rows in _rows(fleet, sites):
            many[kind] += len(rows) * self.shards
        if not any(many.values()):
            raise BadInput("all variants of the fleet are zero: there is nothing to pack")
        kept: dict[Kind, list[Tensor]] = {kind: [] for kind in kinds}
        seen = dict.fromkeys(kinds, 0)
        for kind, rows in _rows(fleet, sites):
            every = -(-many[kind] // MOST)
            shards = _cut(rows / _size(rows), self.shards)
            kept[kind].append(shards[-seen[kind] % every :: every])
            seen[kind] += len(shards)
        books = [self._book(kind, torch.cat(kept[kind]) if kept[kind] else None) for kind in kinds]
        return {"codewords": torch.cat(books).half()}

    def _book(self, kind: Kind, shards: Tensor | None) -> Tensor:
        """The codewords of all stages in one line."""
        out = torch.zeros(self.stages, self.codewords, -(-kind[2] // self.shards))
        for j in range(self.stages if shards is not None else 0):
            assert shards is not None
            out[j] = lloyd(shards, self.codewords, rng(self.seed, "rvq", *kind, j)).half().float()
            shards = shards - out[j][nearest(shards, out[j])[0]]
        return out.reshape(-1)

    def codec(self, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> Coder:
        """What codes and decodes. Raises: BadInput where `shared` is not of these sites."""
        try:
            return Coder(self, sites, shared)
        except (KeyError, RuntimeError) as error:
            raise BadInput(f"what the fleet shares is not of these {len(sites)} sites and options: {error}") from error


class Coder:
    """Codes variants of some sites with the fleet's codewords."""

    def __init__(self, of: Rvq, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> None:
        self.of, self.sites = of, tuple(sites)
        self.bits = math.ceil(math.log2(of.codewords))
        kinds = _kinds(sites)
        shapes = [(of.stages, of.codewords, -(-width // of.shards)) for _, _, width in kinds]
        lines = torch.split(shared["codewords"], [math.prod(s) for s in shapes])
        self.books = {kind: x.reshape(s).float() for kind, x, s in zip(kinds, lines, shapes, strict=True)}
        if not all(x.isfinite().all() for x in self.books.values()):
            raise RuntimeError("a codeword is no number")

    def encode(self, factors: Factors) -> Tensor:
        """A variant's code: ranks, then of every site and side the scales and the numbers of codewords.

        Raises: BadInput for a site that the fleet did not have, of another shape, or not finite.
        """
        found = balanced(checked(factors, self.sites))
        parts = [put_ranks([len(found[s.name][0]) if s.name in found else 0 for s in self.sites])]
        for site in self.sites:
            for side in (0, 1) if site.name in found else ():
                rows = found[site.name][side]
                numbers, like = self._numbers(_cut(rows / _size(rows), self.of.shards), self.books[_kind(site, side)])
                like = like.reshape(len(rows), -1)[:, : rows.shape[1]].double()
                scale = (like * rows).sum(1) / like.square().sum(1).clamp_min(1e-30)
                parts += [put_scales(scale.numpy()), put_plain(numbers, self.bits)]
        return coded(parts)

    def _numbers(self, shards: Tensor, book: Tensor) -> tuple[Array, Tensor]:
        """The codewords' numbers `[shards, stages]`, and what they sum to."""
        left, numbers = shards, []
        for stage in book:
            at = nearest(left, stage)[0]
            left = left - stage[at]
            numbers.append(at)
        found = torch.stack(numbers, 1)
        return found.numpy().astype(np.int32), _summed(found, book)

    def decode(self, code: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of a code, `B [out, r]`, `A [r, into]` at every site with something.

        Raises: BadInput for a damaged code.
        """
        pieces, out = Pieces(code), {}
        for site, r in over(self.sites, pieces.ranks(len(self.sites))):
            sides = []
            for side, width in enumerate((site.out, site.into)):
                scale = torch.from_numpy(pieces.scales(r))
                numbers = pieces.plain(r * self.of.shards * self.of.stages, self.bits)
                if numbers.max(initial=0) >= self.of.codewords:
                    raise BadInput(f"a code has codeword {numbers.max()} of {self.of.codewords}; it is damaged")
                found = torch.from_numpy(numbers.astype(np.int64)).reshape(-1, self.of.stages)
                like = _summed(found, self.books[_kind(site, side)]).reshape(r, -1)[:, :width]
                sides.append((like * scale[:, None]).float())
            out[site.name] = sides[0].T.contiguous(), sides[1].contiguous()
        pieces.end()
        return out


def lloyd(rows: Tensor, k: int, r: Rng) -> Tensor:
    """Centroids `[k, d]` of `rows [n, d]` by k-means from rows drawn far apart (k-means++).

    An empty one begins anew at the row that is worst off.
    """
    centroids = _apart(rows, k, r)
    for _ in range(TURNS):
        at, short = nearest(rows, centroids)
        many = torch.bincount(at, minlength=k)
        total = torch.zeros(k, rows.shape[1], dtype=torch.float64).index_add_(0, at, rows.double())
        centroids = (total / many.clamp_min(1)[:, None]).float()
        empty = (many == 0).nonzero()[:, 0][: len(rows)]
        centroids[empty] = rows[short.argsort(descending=True, stable=True)[: len(empty)]]
    return centroids


def _apart(rows: Tensor, k: int, r: Rng) -> Tensor:
    """`k` rows, each drawn in proportion to its squared distance to the nearest of those before it."""
    chosen = [int(r.integers(len(rows)))]
    short = (rows - rows[chosen[0]]).square().sum(1)
    while len(chosen) < k:
        ends = short.double().cumsum(0)
        at = int(torch.searchsorted(ends, r.random() * float(ends[-1]), right=True))
        chosen.append(min(at, len(rows) - 1))
        short = torch.minimum(short, (rows - rows[chosen[-1]]).square().sum(1))
    return rows[chosen].clone()


def nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every row, int64 `[n]`, and the squared distance to it."""
    half = centroids.square().sum(1) / 2
    found = [(half - block @ centroids.T).min(1) for block in torch.split(rows, BLOCK)]
    at = torch.cat([f.indices for f in found])
    return at, (2 * torch.cat([f.values for f in found]) + rows.square().sum(1)).clamp_min(0)


def _summed(numbers: Tensor, book: Tensor) -> Tensor:
    """The shards `[n, d]` of codewords' numbers `[n, stages]`."""
    out = torch.zeros(len(numbers), book.shape[2])
    for j, stage in enumerate(book):
        out += stage[numbers[:, j]]
    return out


def _kind(site: Site, side: int) -> Kind:
    return site.kind, side, (site.out, site.into)[side]


def _kinds(sites: Sequence[Site]) -> list[Kind]:
    return sorted({_kind(s, side) for s in sites for side in (0, 1)})


def _rows(fleet: Fleet, sites: Sequence[Site]) -> Iterator[tuple[Kind, Tensor]]:
    at = {s.name: s for s in sites}
    for factors in fleet():
        for name, sides in balanced(checked(factors, sites)).items():
            for side in (0, 1):
                if len(sides[side]):
                    yield _kind(at[name], side), sides[side]


def _size(rows: Tensor) -> Tensor:
    """The root mean square of each row, `[r, 1]`."""
    return rows.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)


def _cut(rows: Tensor, shards: int) -> Tensor:
    """Rows `[r, width]` as shards `[r shards, width / shards]`."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % shards)).reshape(len(rows) * shards, -1)
