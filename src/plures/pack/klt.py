"""Transform coding: a basis per site and side that the fleet shares, one quantiser step a variant, an entropy code."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from plures.core.errors import BadInput, WrongUse
from plures.core.folder import method
from plures.pack import Factors, Fleet
from plures.tensors.basis import FIRST, MOST_STRENGTH, cells, choose, moments, norm, octaves, sampled
from plures.tensors.coding import Reader, Writer, counted, tables
from plures.tensors.gauge import Gauged, gauged, missed
from plures.tensors.pieces import checked
from plures.tensors.site import Site
from plures.tensors.turn import turns

Array = np.ndarray[Any, Any]
LEAST = 0.005  # of an error that may be asked for
SAMPLE = 64  # variants, at most, that steps and tables are fitted to
LOW, TOP = -16, 12  # classes with tables: quarter octaves of a number's foreseen size over the step
FINE = 32  # steps a variant may choose among, in an octave
WIDEST = 24 * FINE  # how far from the usual step a variant's is looked for
HEAD = struct.Struct("<HhB")  # ranks, step, lift
LIFT = 256
MOST_GAIN = 2.0
EPS = 1e-30


@method(
    paper="none",
    title="Theoretical foundations of transform coding (Goyal 2001, doi:10.1109/79.952802), applied to a fleet of "
    "low-rank adapters",
    status="trial",
    when="The default. It gains what variants have in common, and on variants that have nothing in common it still "
    "takes less than plain integers of the same error.",
)
@dataclass(frozen=True)
class Klt:
    """Singular vectors, scaled by their values, in a basis that the fleet shares, rounded by one step, entropy-coded.

    Every delta is brought into the one form `U diag(s) V`. The rows of `s U` and `s V` are turned into the eigenbasis
    of their second moments over the fleet, for each site and side, where few numbers are large (Karhunen-Loeve
    transform). All are rounded by one step, which costs the same error wherever it is spent (reverse water-filling):
    what lies below the step costs almost nothing. How large a number will be is foreseen by its singular value and its
    eigenvalue; by that it has one of 29 tables of the entropy coder, which the fleet shares.

    Small numbers are mostly rounded to 0, so others are put back larger, class by class: times sum x^2 / sum x n, at
    most 2, so that what comes back projects onto what was there whole. Means of bins have a smaller error and less of
    every weak direction, by which variants lose more of their gain.

        ||delta - decoded|| <= error ||delta||      Frobenius, over all sites of a variant: its step is searched for it

    A basis vector is kept where it saves more bits than its 8 bits a number cost. The rest of the space is what
    Householder reflections of the kept ones make of it: it costs nothing, and each transform stays orthogonal.

    Options:
        error: the relative error of a variant, from 0.005 and below 1.
        expect: over how many variants the basis must pay; 0 is as many as it is fitted to.
        dead: by how much of a step the bin of zero is wider on each side, from 0 and below 0.5.
        even: 0 gives all sites one step, 1 a step in proportion to the size that a site's deltas have in the fleet.

    Raises: WrongUse for options out of range; BadInput for a fleet of nothing but zeros.
    Paper: none on adapters is followed; it is textbook transform coding. Compress then Serve (arXiv:2407.00066) shares
        bases too, and cuts to them.
    Departs from the paper: there is none to depart from.
    """

    error: float = 0.1
    expect: int = 0
    dead: float = 0.0
    even: float = 0.5
    bounds: ClassVar[bool] = True
    free: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not LEAST <= self.error < 1:
            raise WrongUse(f"klt.error must be from 0.005 and below 1, got {self.error}; 0.1 keeps 99 % of the energy")
        if self.expect < 0:
            raise WrongUse(f"klt.expect must be at least 0, got {self.expect}; 0 is as many as there are")
        if not 0 <= self.dead < 0.5:
            raise WrongUse(f"klt.dead must be from 0 and below 0.5, got {self.dead}; 0 suits most fleets")
        if not 0 <= self.even <= 1:
            raise WrongUse(f"klt.even must be from 0 to 1, got {self.even}")

    def finer(self, share: float) -> Klt:
        """With `share` of the error, and 0.005 at least."""
        return replace(self, error=max(share * self.error, LEAST))

    def fit(self, fleet: Fleet, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Steps, bases, foreseen sizes and tables; goes over the fleet once for every `MOST_MOMENTS` of moments.

        Raises: BadInput for a fleet of nothing but zeros.
        """
        sample, norms, sizes = sampled(fleet, sites, SAMPLE)
        weight = np.maximum(sizes / sizes.max(), 2.0**-7) ** self.even
        shared = {"weight": torch.from_numpy(np.round(FINE * np.log2(weight)).astype(np.int16))}
        plain = Coder(self, sites, shared)
        strengths = _stacked([plain.rounded(g, plain.step_of(g)) for g in sample])
        pays = max(self.expect or len(norms), 1)
        bases, scales, kept, spreads = [], [], [], []
        for at, moment in enumerate(moments(fleet, sites, norms)):
            basis, scale, spread = choose(moment, strengths[:, at // 2].reshape(-1), pays / len(sample))
            bases.append(basis.reshape(-1))
            scales.append(scale)
            kept.append(len(scale))
            spreads.append(spread)
        shared |= {"kept": torch.tensor(kept, dtype=torch.int32), "basis": torch.cat(bases)}
        shared |= {"scale": torch.cat(scales), "spread": torch.cat(spreads)}
        return shared | _tables(Coder(self, sites, shared), sample)

    def codec(self, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> Coder:
        """What codes and decodes. Raises: BadInput where `shared` is not of these sites."""
        try:
            return Coder(self, sites, shared)
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise BadInput(f"what the fleet shares is not of these {len(sites)} sites: {error}") from error


@dataclass(frozen=True)
class _Rounded:
    """A variant in whole numbers: these with their classes and exact values over the step, all sites' in one line;
    strengths `[sites, r]`; by how many parts in `LIFT` the decoded delta is made larger, so that its projection on the
    delta is the delta; the squared error and the squared norm of the delta."""

    numbers: Array
    classes: Array
    exact: Array
    strengths: Array
    lift: int
    lost: float
    whole: float


class Coder:
    """Codes variants; without `basis` in what is shared nothing is turned, without `counts` nothing can be coded."""

    def __init__(self, of: Klt, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> None:
        self.of, self.sites = of, tuple(sites)
        self.at = {s.name: i for i, s in enumerate(sites)}
        self.widths = [(s.out, s.into) for s in sites]
        self.weight = shared["weight"].numpy().astype(np.float64)
        sides = [w for pair in self.widths for w in pair]
        if len(self.weight) != len(sites):
            raise ValueError(f"it has {len(self.weight)} sites")
        kept = shared["kept"].tolist() if "kept" in shared else [0] * len(sides)
        none = torch.zeros(0)
        self.turns = list(turns(sides, kept, shared.get("basis", none), shared.get("scale", none)))
        self.spread, told = list[Array](), 0
        for width, k in zip(sides, kept, strict=True):
            spread = np.full(width, octaves(1 / width), np.int16)
            if "spread" in shared:
                found = shared["spread"][told : told + k + 1].numpy().astype(np.int16)
                spread[:k], spread[k:] = found[:k], found[k]
                told += k + 1
            self.spread.append(spread)
        self.usual = shared["usual"].numpy().astype(np.int32) if "usual" in shared else np.zeros((len(sites), 0))
        self.start = float(shared["start"]) if "start" in shared else math.log2(of.error) * FINE
        self.gains = shared["gains"].numpy().astype(np.float32) if "gains" in shared else None
        if "counts" in shared:
            self.tables = tables(shared["counts"].numpy(), [2 * _most(c) + 2 for c in range(LOW, TOP + 1)])
            (self.rest,) = tables(shared["strengths"].numpy(), [len(shared["strengths"])])
        self._matrices: dict[tuple[tuple[str, ...], int], Tensor | None] = {}

    # ------------------------------------------------------------------ rounding

    def rounded(self, forms: Sequence[Gauged], step: int) -> _Rounded:
        """The variant in whole numbers at the step `2 ** (step / FINE)`, times the weight of each site."""
        ranks = max(g.s.shape[1] for g in forms)
        strengths = np.zeros((len(self.sites), ranks), np.int32)
        parts: list[tuple[int, Array, Array, Array]] = []
        sums, whole = np.zeros(3), 0.0
        for g in forms:
            at = [self.at[n] for n in g.names]
            size = np.exp2((step + self.weight[at]) / FINE)[:, None]
            s = g.s.numpy().astype(np.float64)
            c = np.clip(np.round(4 * np.log2(np.maximum(s / size, 1e-9))) + FIRST, 0, MOST_STRENGTH).astype(np.int32)
            scale = np.exp2((c - FIRST) / 4).astype(np.float32)
            exact = ((self._turned(g, 0) * torch.from_numpy(s / size)[..., None]).float().numpy(),
                     (self._turned(g, 1) * torch.from_numpy(scale)[..., None]).numpy())  # fmt: skip
            numbers = [_rounded(x, self.of.dead) for x in exact]
            c *= numbers[0].any(-1) & numbers[1].any(-1)
            numbers = [n * (c > 0)[..., None] for n in numbers]
            classes = [np.clip(c[..., None] - FIRST + np.stack([self.spread[2 * i + side] for i in at])[:, None], LOW,
                               MOST_STRENGTH).astype(np.int8) for side in (0, 1)]  # fmt: skip
            back = [_back(n, k, self.gains) for n, k in zip(numbers, classes, strict=True)]
            rows = [x[1] / scale[..., None] for x in (exact, back)]
            sums += np.stack(missed(exact[0], rows[0], back[0], rows[1])) @ size[:, 0] ** 2
            whole += float((s**2).sum())
            strengths[at, : c.shape[1]] = c
            for i, site in enumerate(at):
                live = c[i] > 0
                parts += [(2 * site + side, *(x[side][i][live].reshape(-1) for x in (numbers, classes, exact)))
                          for side in (0, 1)]  # fmt: skip
        parts.sort(key=lambda p: p[0])
        numbers_, classes_, exact_ = (np.concatenate([p[i] for p in parts]) for i in (1, 2, 3))
        off, along, energy = sums.tolist()
        lift = round(LIFT * min(max(whole / max(energy + along, EPS) - 1, 0), 255 / LIFT))
        more = lift / LIFT  # the error of (1 + more) times what comes back
        lost = off - 2 * more * along + more**2 * energy
        return _Rounded(numbers_, classes_, exact_, strengths, lift, max(lost, 0.0), whole)

    def step_of(self, forms: Sequence[Gauged]) -> int:
        """The widest step at which the variant's error is as asked for."""
        whole = norm(forms)
        step = round(self.start + FINE * math.log2(whole))
        least, most = step - WIDEST, step + WIDEST
        for _ in range(24):
            found = self.rounded(forms, step)
            error = math.sqrt(found.lost / found.whole)
            if error <= self.of.error:
                least = step
            else:
                most = step
            if most - least <= 1:
                break
            aim = step + round(FINE * math.log2(self.of.error / max(error, 1e-9)))
            step = min(max(aim if aim != step else step + (1 if error <= self.of.error else -1), least + 1), most - 1)
        return least

    def _turned(self, g: Gauged, side: int) -> Tensor:
        rows, at = (g.V if side else g.U), [2 * self.at[n] + side for n in g.names]
        key = g.names, side
        if key not in self._matrices:
            found = [self.turns[i].matrix for i in at]
            whole = [m for m in found if m is not None]
            self._matrices[key] = torch.stack(whole) if len(whole) == len(found) else None
        matrix = self._matrices[key]
        if matrix is not None:
            return rows @ matrix
        return torch.stack([self.turns[i].there(r) for i, r in zip(at, rows, strict=True)])

    # ------------------------------------------------------------------ codes

    def encode(self, factors: Factors) -> Tensor:
        """A variant's code, uint8 `[bytes]`.

        Raises: BadInput for a site that the fleet did not have, of another shape, or not finite.
        """
        forms = gauged(checked(factors, self.sites))
        if not forms or norm(forms) <= 0:
            return torch.tensor(list(HEAD.pack(0, 0, 0)), dtype=torch.uint8)
        step = self.step_of(forms)
        found = self.rounded(forms, step)
        writer = Writer()
        ranks = found.strengths.shape[1]
        writer.put((found.strengths - self._usual(ranks)).reshape(-1), self.rest)
        order = np.argsort(found.classes, kind="stable")
        numbers, classes = found.numbers[order], found.classes[order]
        ends = np.searchsorted(classes, np.arange(LOW, MOST_STRENGTH + 2))
        for c in range(LOW, MOST_STRENGTH + 1):
            run = numbers[ends[c - LOW] : ends[c - LOW + 1]]
            if len(run):
                bits = _shift(c)
                writer.put(run >> bits, self.tables[c - 4 * bits - LOW])
                if bits:
                    writer.put_plain(run & ((1 << bits) - 1), bits)
        return torch.frombuffer(bytearray(HEAD.pack(ranks, step, found.lift) + writer.done()), dtype=torch.uint8)

    def decode(self, code: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of a code, `B [out, r]`, `A [r, into]` at every site with something.

        Raises: BadInput for a damaged code.
        """
        data = code.numpy().tobytes()
        if len(data) < HEAD.size:
            raise BadInput(f"a code has at least {HEAD.size} bytes, this one {len(data)}; it is damaged")
        ranks, step, lift = HEAD.unpack_from(data)
        if abs(step) > FINE * 100:
            raise BadInput(f"a code has a step of 2**{step / FINE:.0f}; it is damaged")
        if not ranks:
            if step or lift or len(data) > HEAD.size:
                raise BadInput("a code of nothing goes on; it is damaged")
            return {}
        reader = Reader(data[HEAD.size :])
        n = len(self.sites)
        if ranks > max(min(w) for w in self.widths):
            raise BadInput(f"a code of rank {ranks}, which none of its sites can have; it is damaged")
        strengths = reader.take(n * ranks, self.rest).reshape(n, ranks) + self._usual(ranks)
        if strengths.min() < 0 or strengths.max() > MOST_STRENGTH:
            raise BadInput("a code has strengths that none can have; it is damaged")
        live = [np.flatnonzero(c > 0) for c in strengths]
        lines = [
            np.clip(c[k][:, None] - FIRST + self.spread[2 * i + side], LOW, MOST_STRENGTH).astype(np.int8)
            for i, (c, k) in enumerate(zip(strengths, live, strict=True)) for side in (0, 1)
        ]  # fmt: skip
        classes = np.concatenate([line.reshape(-1) for line in lines])
        order = np.argsort(classes, kind="stable")
        ends = np.searchsorted(classes[order], np.arange(LOW, MOST_STRENGTH + 2))
        numbers = np.empty(len(classes), np.int32)
        for c in range(LOW, MOST_STRENGTH + 1):
            run = order[ends[c - LOW] : ends[c - LOW + 1]]
            if len(run):
                bits = _shift(c)
                high = reader.take(len(run), self.tables[c - 4 * bits - LOW])
                numbers[run] = (high << bits) | reader.take_plain(len(run), bits) if bits else high
        reader.end()
        values = _back(numbers, classes, self.gains)
        out, at = {}, 0
        for i, site in enumerate(self.sites):
            sides = []
            for side in (0, 1):
                shape = lines[2 * i + side].shape
                rows = torch.from_numpy(values[at : at + shape[0] * shape[1]].reshape(shape))
                sides.append(self.turns[2 * i + side].back(rows))
                at += shape[0] * shape[1]
            if len(live[i]):
                # each side has the step and about its singular value as its size: half of both goes to each factor
                size = 2.0 ** ((step + self.weight[i]) / FINE)
                s = torch.from_numpy(np.exp2((strengths[i][live[i]] - FIRST) / 8))[:, None]
                root = math.sqrt(size)
                root *= math.sqrt(1 + lift / LIFT)
                out[site.name] = (sides[0] * (root / s)).T.float().contiguous(), (sides[1] * (root / s)).float()
        return out

    def _usual(self, ranks: int) -> Array:
        out = np.zeros((len(self.sites), ranks), np.int32)
        known = min(ranks, self.usual.shape[1])
        out[:, :known] = self.usual[:, :known]
        return out


# ---------------------------------------------------------------------- numbers


def _rounded(x: Array, dead: float) -> Array:
    """To the nearest whole number, where nearer to 0 by `dead`."""
    return np.asarray(np.sign(x) * np.floor(np.abs(x) + np.float32(0.5 - dead)), np.int32)


def _back(numbers: Array, classes: Array, gains: Array | None) -> Array:
    """The values, over the step, that whole numbers stand for: each times the gain of its class."""
    values = numbers.astype(np.float32)
    return values if gains is None else np.asarray(values * gains[np.minimum(classes, TOP) - LOW])


def _shift(c: int) -> int:
    """How many low bits of numbers of a class are coded as they are."""
    return max(0, -(-(c - TOP) // 4))


def _most(c: int) -> int:
    """The largest number in the table of a class."""
    return math.ceil(6 * 2 ** (c / 4)) + 1


# ---------------------------------------------------------------------- fitting


def _stacked(found: Sequence[_Rounded]) -> Array:
    """The strengths of variants, `[variants, sites, r]`, 0 where a variant has fewer ranks."""
    ranks = max(f.strengths.shape[1] for f in found)
    return np.stack([np.pad(f.strengths, ((0, 0), (0, ranks - f.strengths.shape[1]))) for f in found])


def _tables(coder: Coder, sample: Sequence[Sequence[Gauged]]) -> dict[str, Tensor]:
    """The classes' gains; by these, tables of strengths and of every class, and a step to begin with."""
    numbers, classes, exact, _, _ = _all(coder, sample)
    gains = np.ones(TOP - LOW + 1)
    for c in range(LOW, TOP + 1):
        mine = np.minimum(classes, TOP) == c
        energy, along = (float((exact[mine] * of[mine]).sum()) for of in (exact, numbers))
        few = 16 * 2.0 ** (c / 2)  # as of 16 numbers with a gain of 1, so that a handful decides nothing
        gains[c - LOW] = min(max((energy + few) / (along + few), 1.0), MOST_GAIN)
    coder.gains = gains.astype(np.float16).astype(np.float32)
    numbers, classes, _, strengths, steps = _all(coder, sample)  # steps are finer now
    usual = np.round(strengths.mean(0)).astype(np.int16)
    bits = np.maximum(0, -(-(classes.astype(np.int32) - TOP) // 4))
    counts = []
    for c in range(LOW, TOP + 1):
        told = counted((numbers >> bits)[classes - 4 * bits == c], _most(c))
        told[1:] += np.round(32 * cells(2 ** (c / 4), _most(c))).astype(np.int32)
        counts.append(told)
    start = np.mean([step - FINE * math.log2(norm(g)) for g, step in zip(sample, steps, strict=True)])
    rest = counted((strengths - usual).reshape(-1), 32) + 1
    return {"usual": torch.from_numpy(usual), "strengths": torch.from_numpy(rest),
            "counts": torch.from_numpy(np.concatenate(counts)), "gains": torch.from_numpy(gains).to(torch.float16),
            "start": torch.tensor(start, dtype=torch.float32)}  # fmt: skip


def _all(coder: Coder, sample: Sequence[Sequence[Gauged]]) -> tuple[Array, Array, Array, Array, list[int]]:
    """Of variants at their steps the numbers, classes and exact values in one line, the strengths, and the steps."""
    steps = [coder.step_of(g) for g in sample]
    found = [coder.rounded(g, step) for g, step in zip(sample, steps, strict=True)]
    numbers, classes, exact = (np.concatenate([getattr(f, k) for f in found]) for k in ("numbers", "classes", "exact"))
    return numbers, classes, exact, _stacked(found), steps
