"""The shard bank: variants in memory as the server reads them, MoS as pools and index tables, LoRA as it is.

A method without factors is kept as its tensors and computed by its own `forward` or `act`, each row by itself.

A variant is first packed: one run of float32 for every distinct tensor, one run of int16 for its index tables, and for
every site nine numbers that say where its parts lie. Making it resident copies those runs into the bank's arena; a run
that several variants have (a shared pool) is there once. Nothing is padded: rank, shards per vector and which sites
are adapted are each variant's own.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plures.adapt import adapts
from plures.engine.ask import Unavailable
from plures.engine.kernels import FIELDS, MOST_RANKS
from plures.tensors.safe import tensor_hash
from plures.tensors.variant import Variant

Floats = np.ndarray[Any, np.dtype[np.float32]]
Shorts = np.ndarray[Any, np.dtype[np.int16]]
_MOST_ROWS = 2**15  # an index is an int16


@dataclass(frozen=True)
class Place:
    """Where a site stands in the native model: its layer, its projection group, and its place in that group."""

    layer: int
    group: int
    at: int


@dataclass(frozen=True)
class Site:
    """One packed site: keys of its runs for A, B and scale, offsets in the index run, and r, l, into/l, out/l.

    A method whose factors are shards and a low-rank rest beside them has two, of `part` 0 and 1.
    """

    place: Place
    a: str
    b: str
    scale: str
    ia: int
    ib: int
    r: int
    l: int
    w: int
    wo: int
    part: int = 0


PARTS = 2


@dataclass(frozen=True)
class Whole:
    """A site that its method computes: the output `[n, out]` from what goes in `[n, into]` and the base's output."""

    place: Place
    run: Callable[..., Tensor]
    own: Mapping[str, Tensor]
    pool: Mapping[str, Tensor]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.run(x, y, self.own, self.pool)


@dataclass(frozen=True)
class Packed:
    """A variant ready to be copied into a bank: float runs by key, one index run, and its sites.

    `whole` are the sites of a method without factors, computed by the method itself; `whole_bytes` their tensors.
    """

    identity: str
    runs: Mapping[str, Floats]
    index: Shorts
    sites: tuple[Site, ...]
    whole: tuple[Whole, ...] = ()
    whole_bytes: int = 0

    @property
    def n_bytes(self) -> int:
        """Bytes that it takes in an arena that shares nothing with others."""
        return sum(r.nbytes for r in self.runs.values()) + self.index.nbytes + self.whole_bytes

    def whole_on(self, device: torch.device) -> Packed:
        """The same with what is kept whole on a device, where a tensor that several sites have is there once."""
        moved: dict[int, Tensor] = {}

        def sent(room: Mapping[str, Tensor]) -> dict[str, Tensor]:
            for t in room.values():
                if id(t) not in moved:
                    moved[id(t)] = t.to(device)
            return {k: moved[id(t)] for k, t in room.items()}

        return replace(self, whole=tuple(replace(s, own=sent(s.own), pool=sent(s.pool)) for s in self.whole))


def _run(t: Tensor) -> Floats:
    return np.ascontiguousarray(t.detach().to(torch.float32).cpu().numpy()).reshape(-1)


def pack(variant: Variant, places: Mapping[str, Place], identity: str = "") -> Packed:
    """`variant` as the bank takes it.

    A method that says which `shards` its factors are made of (MoS) stays in that form; any other low-rank one goes in
    as its factors, with every row its own shard; one without factors is computed by its `act` or `forward`.

    Raises: Unavailable for a method that has none of these, whole parameters (`modules_to_save`), or a site that the
        native model has no place for.
    """
    said = f"variant {identity[:12] or variant.provenance.get('name', '')} ({variant.method})"
    method: Any = adapts.make(variant.method, **variant.options)
    if variant.extra:
        raise Unavailable(f"{said} retrained whole parameters ({', '.join(sorted(variant.extra)[:3])}); "
                          "export it merged and serve that as a base of its own")  # fmt: skip
    for site in variant.sites:
        if site.name not in places:
            raise Unavailable(f"{said} adapts {site.name!r}, which the server does not adapt; export it merged")
    if not hasattr(method, "factors"):
        return _whole(variant, method, places, identity, said)
    runs: dict[str, Floats] = {}
    index: list[Shorts] = []
    n_index, longest, sites = 0, 0, []
    for site in variant.sites:
        place = places[site.name]
        own, pool = variant.own[site.name], variant.pool.get(variant.group_of[site.name], {})
        if hasattr(method, "shards") and max(map(len, (pool["A"], pool["B"]))) <= _MOST_ROWS:
            table, scale = method.shards(own, pool)
            _, r, l = table.shape
            a, b = (f"pool/{variant.group_of[site.name]}/{leaf}" for leaf in "AB")
            for key, t in ((a, pool["A"]), (b, pool["B"])):
                if key not in runs:
                    runs[key] = _run(t)
            index.append(table.to(torch.int16).numpy().reshape(-1))
            runs[s := f"scale/{site.name}"] = _run(scale)  # equal ones are one run in the end
            sites.append(Site(place, a, b, s, n_index, n_index + r * l, r, l, site.into // l, site.out // l))
            n_index += table.numel()
            low, part = method.rest(own, pool) if hasattr(method, "rest") else None, 1
        else:
            low, part = method.factors(own, pool), 0
        if low is not None:
            B, A = low
            longest = max(longest, r := A.shape[0])
            a, b, s = f"{site.name}/A", f"{site.name}/B", f"ones/{r}"
            runs[a], runs[b] = _run(A), _run(B.T)
            runs.setdefault(s, _run(torch.ones(r)))
            sites.append(Site(place, a, b, s, -1, -1, r, 1, site.into, site.out, part))
        if max(found.r for found in sites) > MOST_RANKS:
            raise Unavailable(f"{said} has rank {r} at {site.name!r}; at most {MOST_RANKS} is served")
    keyed = {key: f"{tensor_hash(torch.from_numpy(run))}" for key, run in runs.items()}
    named = tuple(
        replace(s, a=keyed[s.a], b=keyed[s.b], scale=keyed[s.scale], ia=n_index if s.ia < 0 else s.ia,
                ib=n_index if s.ib < 0 else s.ib) for s in sites
    )  # fmt: skip
    whole = np.concatenate([*index, np.arange(longest, dtype=np.int16)]).astype(np.int16)
    return Packed(identity or variant.identity(), {keyed[k]: run for k, run in runs.items()}, whole, named)


def _whole(variant: Variant, method: Any, places: Mapping[str, Place], identity: str, said: str) -> Packed:
    """A variant whose sites are computed by the method itself."""
    run = getattr(method, "act", None) or getattr(method, "forward", None)
    if run is None:
        raise Unavailable(f"{said} reads the base's weight: export it merged and serve that as a base of its own")

    def floats(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: t.float() if t.is_floating_point() else t for k, t in leaves.items()}

    pools = {group: floats(leaves) for group, leaves in variant.pool.items()}
    rooms = [floats(variant.own[s.name]) for s in variant.sites]
    whole = tuple(
        Whole(places[s.name], run, own, pools.get(variant.group_of[s.name], {}))
        for s, own in zip(variant.sites, rooms, strict=True)
    )
    n = sum(t.nbytes for leaves in (*rooms, *pools.values()) for t in leaves.values())
    return Packed(identity or variant.identity(), {}, np.zeros(0, np.int16), (), whole, n)


class Room:
    """First-fit allocation of runs in a line of `size` cells; neighbours that are freed join."""

    def __init__(self, size: int) -> None:
        self.size, self.free = size, [(0, size)]

    def take(self, n: int) -> int | None:
        """The offset of `n` cells, or None where no gap is that long."""
        for i, (at, length) in enumerate(self.free):
            if length >= n:
                if length == n:
                    self.free.pop(i)
                else:
                    self.free[i] = (at + n, length - n)
                return at
        return None

    def give(self, at: int, n: int) -> None:
        """Free `n` cells at `at`."""
        insort(self.free, (at, n))
        joined: list[tuple[int, int]] = []
        for a, length in self.free:
            if joined and joined[-1][0] + joined[-1][1] == a:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((a, length))
        self.free = joined

    @property
    def used(self) -> int:
        """Cells that are taken."""
        return self.size - sum(n for _, n in self.free)


@dataclass
class _Kept:
    at: int
    size: int
    users: int


class Bank:
    """The resident variants, each in a slot, over one arena of floats and one of indices.

    `shape` has, for every projection group, the number of its sites; `sites[layer][group]` is what `add_adapters`
    reads, `[slots, PARTS * sites, FIELDS]`: the first part of all sites, then the second. `budget_bytes` bounds the
    floats; memory is touched only as it is used. `arena` is where floats are kept, by default an array of the host's;
    another must have its `size`, `itemsize` and `nbytes` and take runs by slices.
    """

    def __init__(self, layers: int, shape: Sequence[int], slots: int, budget_bytes: int, arena: Any = None) -> None:
        self.arena: Any = np.empty(max(1, budget_bytes // 4), np.float32) if arena is None else arena
        self.index: Shorts = np.zeros(1 << 16, np.int16)
        self.sites = [[np.zeros((slots, PARTS * n, FIELDS), np.int64) for n in shape] for _ in range(layers)]
        self.slots: dict[str, int] = {}
        self._floats, self._shorts = Room(self.arena.size), Room(self.index.size)
        self._runs: dict[str, _Kept] = {}
        self._held: dict[str, tuple[Packed, int]] = {}
        self._empty = list(range(slots - 1, -1, -1))
        self._whole: dict[tuple[int, int], dict[int, list[Whole]]] = {}
        self._whole_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the arenas in use, and of what is kept whole."""
        return int(self.arena.itemsize) * self._floats.used + 2 * self._shorts.used + self._whole_bytes

    def whole(self, layer: int, group: int) -> Mapping[int, Sequence[Whole]]:
        """By slot, the sites of one group that their method computes."""
        return self._whole.get((layer, group), {})

    @property
    def empty(self) -> int:
        """Slots that hold nothing."""
        return len(self._empty)

    def put(self, packed: Packed) -> int | None:
        """Make a variant resident; returns its slot, or None where there is no slot or no room for it now."""
        if packed.identity in self.slots:
            return self.slots[packed.identity]
        if not self._takes(packed):
            return None
        taken: list[str] = []
        for key, run in packed.runs.items():
            kept = self._runs.get(key)
            if kept is None:
                at = self._floats.take(run.size)
                if at is None:
                    self._drop(taken)
                    return None
                self.arena[at : at + run.size] = run
                kept = self._runs[key] = _Kept(at, run.size, 0)
            kept.users += 1
            taken.append(key)
        first = self._take_index(packed.index) if packed.index.size else 0
        slot = self._empty.pop()
        for rows in self.sites:
            for group in rows:
                group[slot] = 0
        for s in packed.sites:
            a, b, scale = (self._runs[k].at for k in (s.a, s.b, s.scale))
            numbers = self.sites[s.place.layer][s.place.group]
            numbers[slot, s.part * (numbers.shape[1] // PARTS) + s.place.at] = (
                a, b, first + s.ia, first + s.ib, scale, s.r, s.l, s.w, s.wo
            )  # fmt: skip
        for site in packed.whole:
            self._whole.setdefault((site.place.layer, site.place.group), {}).setdefault(slot, []).append(site)
        self._whole_bytes += packed.whole_bytes
        self.slots[packed.identity], self._held[packed.identity] = slot, (packed, first)
        return slot

    def _takes(self, packed: Packed) -> bool:
        """Whether there is a slot, and room for what is kept whole."""
        whole = packed.whole_bytes
        return bool(self._empty) and (not whole or self.used_bytes + whole <= self.arena.nbytes)

    def drop(self, identity: str) -> None:
        """Take a variant out; no row may be using it."""
        slot = self.slots.pop(identity)
        packed, first = self._held.pop(identity)
        if packed.index.size:
            self._shorts.give(first, packed.index.size)
        self._drop(list(packed.runs))
        for key in {(site.place.layer, site.place.group) for site in packed.whole}:
            del self._whole[key][slot]
        self._whole_bytes -= packed.whole_bytes
        self._empty.append(slot)

    def _drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            kept = self._runs[key]
            kept.users -= 1
            if not kept.users:
                self._floats.give(kept.at, kept.size)
                del self._runs[key]

    def _take_index(self, index: Shorts) -> int:
        at = self._shorts.take(index.size)
        while at is None:  # the index arena grows: tables are a hundredth of the pools
            grown = np.zeros(2 * self.index.size, np.int16)
            grown[: self.index.size] = self.index
            self._shorts.give(self.index.size, self.index.size)
            self._shorts.size, self.index = grown.size, grown
            at = self._shorts.take(index.size)
        self.index[at : at + index.size] = index
        return at
