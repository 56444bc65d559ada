"""The one pipeline of merging: pieces of tensors from models, through a method, into a sink. No torch is imported.

A piece is of 65,536 elements or a few times that, whatever the files: what a method learns of pieces is summed in one
order, and the result does not depend on shards, on how files are read, or on how many tensors are worked on at once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, cast

import numpy as np

from plures.core.errors import BadInput
from plures.merge import Merger, Part, Scanner, Stats
from plures.tensors.scratch import scratch
from plures.tensors.weights import CHUNK, finite

Array = np.ndarray[Any, Any]
Read = Callable[[int, Array], None]
"""Puts the elements from a start on into a float32 array."""
Write = Callable[[int, Array], None]
"""Takes the elements from a start on."""
LOOK = 1 << 14
"""Elements of a tensor's middle piece by which the result is compared: a cosine is then right to 1 % a tensor."""


@dataclass(frozen=True)
class Job:
    """How one tensor comes about: of which models' tensors, by which method, with what the recipe says of each."""

    name: str
    shape: tuple[int, ...]
    models: tuple[str, ...]
    reads: tuple[Read, ...]
    base: Read | None
    method: Merger
    given: Mapping[str, Array]
    seed: int


@dataclass(frozen=True)
class Told:
    """What merging told of a tensor: how its difference to the base compares with that of the plain mean.

    `cosine` is the mean of the pairs of models' differences, `conflict` the share of places where not all differences
    have one sign, `length` and `mean_length` the norms of the merged difference and of the plain mean's; without a base
    differences are to the mean, and only `length` is meant.
    """

    name: str
    cosine: float
    conflict: float
    length: float
    mean_length: float


def piece(job: Job) -> int:
    """Elements of a piece: a multiple of what the method does not part.

    Of few models pieces are several times as long, less so where masks of a density are held beside them: threads then
    hand the interpreter to each other as many times less often.
    """
    unit, held = job.method.unit(job.shape), len(job.reads) + (job.base is not None)
    longer = max(1, min(3, 9 // held) if "density" in job.method.of_model else min(6, 12 // held))
    return max(1, longer * CHUNK // unit) * unit


def parts(job: Job, only: Collection[int] | None = None, trusted: bool = False, most: int = sys.maxsize
          ) -> Iterator[Part]:  # fmt: skip
    """The tensor's pieces, or `most` elements of those that start at some of `only`; each takes the place of the one
    before.

    Raises: BadInput where a number is not finite, unless that was seen to before.
    """
    size, step = prod(job.shape), piece(job)
    for start in range(0, size, step):
        if only is not None and start not in only:
            continue
        n = min(step, size - start, most)
        here, below = scratch("values", (len(job.reads), n)), scratch("base", n)
        for read, row in zip(job.reads, here, strict=True):
            read(start, row)
        if not trusted and not finite(here.reshape(-1)):
            model, row = next((m, r) for m, r in zip(job.models, here, strict=True) if not finite(r))
            raise _no_number(repr(model), job.name, start, row)
        if job.base is not None:
            job.base(start, below)
            if not trusted and not finite(below):
                raise _no_number("the base", job.name, start, below)
        yield Part(job.name, job.shape, start, here, below if job.base is not None else None, job.given, job.models,
                   job.seed)  # fmt: skip


def _no_number(model: str, name: str, start: int, row: Array) -> BadInput:
    """What is said of a piece with a number that is not finite."""
    bad = int(np.flatnonzero(~np.isfinite(row))[0])
    return BadInput(f"{model}: {name!r} has {row[bad]} at element {start + bad}; mend the model first")


def merge(job: Job, write: Write) -> Told:
    """Put the merged tensor out, piece by piece, and say how it lies beside the plain mean, by some of its elements.

    Raises: BadInput; what the method raises.
    """
    return merge_all([job], [write])[0]


def merge_all(jobs: Sequence[Job], writes: Sequence[Write]) -> list[Told]:
    """The same of several results of one tensor, which differ in their methods' options and what is said of models.

    The models are read once for all whose pieces are of one length: those of one method, unless an option sets it.
    """
    told: dict[int, Told] = {}
    for step in dict.fromkeys(map(piece, jobs)):
        some = [i for i, job in enumerate(jobs) if piece(job) == step]
        told |= zip(some, _together([jobs[i] for i in some], [writes[i] for i in some]), strict=True)
    return [told[i] for i in range(len(jobs))]


def _together(jobs: Sequence[Job], writes: Sequence[Write]) -> list[Told]:
    stats: list[list[Stats]] = [[] for _ in jobs]
    measured, shown = (all(getattr(job.method, k, False) for job in jobs) for k in ("measures", "shows"))
    for turn in range(max(job.method.passes for job in jobs)):
        those = [i for i, job in enumerate(jobs) if job.method.passes > turn]
        told, last = [dict[str, Array]() for _ in jobs], list[Part]()
        for part in parts(jobs[0], trusted=turn > 0 or measured):
            last = [part]
            for i in those:
                found = cast(Scanner, jobs[i].method).scan(_for(jobs[i], part, len(those)), stats[i])
                if measured and turn == 0 and not np.isfinite(found["products"]).all():
                    _look(jobs[0], part.start)
                _add(told[i], found, prod(part.shape) >= 2**31)
        for part in last:
            for i in those:
                method, of = cast(Scanner, jobs[i].method), replace(part, given=jobs[i].given)
                stats[i].append(method.settle(told[i], of, stats[i]))
    step, size = piece(jobs[0]), prod(jobs[0].shape)
    middle, looked = size // step // 2 * step, [np.empty(0, np.float32)] * len(jobs)
    for part in parts(jobs[0], trusted=shown or any(stats)):
        for i, (job, write, before) in enumerate(zip(jobs, writes, stats, strict=True)):
            with np.errstate(invalid="ignore" if shown else "warn"):
                out = np.ascontiguousarray(job.method.apply(_for(job, part, len(jobs)), before), np.float32)
            if shown and not finite(out):
                out = out.copy()  # it may stand where the piece is read to
                _look(jobs[0], part.start)
            write(part.start, out)
            if part.start == middle:
                looked[i] = out[:LOOK].copy()
    return _compare(jobs[0], middle, looked)


def _look(job: Job, start: int) -> None:
    """Read a piece again. Raises: BadInput, which says what number it is, where one is not finite."""
    for _ in parts(job, (start,)):
        pass


def _add(told: dict[str, Array], found: Stats, large: bool) -> None:
    """Add up what a pass learns; the counts of `large` tensors, whose pieces' are int32, in int64."""
    for key, value in found.items():
        if key in told:
            told[key] += value
        else:
            told[key] = value.astype(np.int64) if large and value.dtype == np.int32 else value


def _for(job: Job, part: Part, many: int) -> Part:
    """A piece for one of several results: with its own numbers, which a method may use up."""
    if many == 1 and part.given is job.given:
        return part
    return replace(part, values=part.values.copy() if many > 1 else part.values, given=job.given)


def _compare(job: Job, start: int, merged: Sequence[Array]) -> list[Told]:
    """How a merged piece of each result lies beside the plain mean of the models."""
    if not prod(job.shape):
        return [Told(job.name, 1.0, 0.0, 0.0, 0.0) for _ in merged]
    part = next(parts(job, (start,), trusted=True, most=LOOK))
    mean = np.add.reduce(part.values, 0, np.float64) / len(part.values)
    origin = mean if part.base is None else part.base
    deltas = np.subtract(part.values, origin, dtype=np.float64)
    gram = deltas @ deltas.T
    conflict = np.count_nonzero((deltas > 0).any(0) & (deltas < 0).any(0)) / len(mean)
    size = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    cosines = (gram / np.outer(size, size))[np.triu_indices(len(deltas), 1)]
    cosine = float(np.clip(cosines, -1, 1).mean()) if len(cosines) else 1.0
    return [Told(job.name, cosine, conflict, _apart(of, origin), _apart(mean, origin)) for of in merged]


def _apart(a: Array, b: Array) -> float:
    """The distance of two pieces."""
    apart = np.subtract(a, b, dtype=np.float64)
    return float(np.dot(apart, apart)) ** 0.5


def order(names: Sequence[str]) -> list[str]:
    """Tensor names as people count: layers by their number."""
    def key(name: str) -> list[tuple[int, int, str]]:
        return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name)]

    return sorted(names, key=key)
