"""Mergers: several models of one shape become one, tensor by tensor, piece by piece, in memory that does not grow.

One file here is one method. It is pure and numpy alone: it sees pieces of one tensor of all models as float32, and what
it must know of the whole tensor it learns in passes over its pieces before. The pieces' sizes, the files that they come
from and the workers do not show in a single byte of the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from plures.core.folder import Folder

Array = np.ndarray[Any, Any]
Stats = dict[str, Array]
merges = Folder("plures.merge", "merge")
ANY = (1, 1 << 30)
"""As many models as there are."""


@dataclass(frozen=True)
class Part:
    """A piece of one tensor: `values [models, n]` float32 and, of methods with a base, `base [n]`.

    It stands at the element `start` of a tensor of `shape`. `given` has what the recipe says of each model, `[models]`
    by name. `models` are their names, by which random numbers are drawn, with `seed` and the tensor's `name`. Pieces of
    a tensor come in their order, and a method may use `values` up.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Array
    base: Array | None
    given: Mapping[str, Array]
    models: tuple[str, ...]
    seed: int

    def deltas(self) -> Array:
        """What each model adds to the base, `[models, n]`; takes the place of `values`."""
        assert self.base is not None, "the method says that it has a base"
        return np.subtract(self.values, self.base, out=self.values)

    def vectors(self) -> Array:
        """What each model adds to the base or, without one, the models themselves, `[models, n]`; as `deltas`."""
        return self.values if self.base is None else self.deltas()


class Merger(Protocol):
    """A way to merge.

    `base` says whether it works on what models add to a base (None: where the recipe names one), and `takes` how many
    models besides that it may be given, at least and at most; `of_model` names what a recipe may say of each model,
    with its default. `passes` are over a tensor's pieces before the last one; a method that has some is a `Scanner`. A
    piece is a multiple of `unit(shape)` elements, but the last one. A method may say `shows = True`: any number that is
    not finite makes one in the merged piece, so that nobody looks for such numbers before.
    """

    base: ClassVar[bool | None]
    takes: ClassVar[tuple[int, int]]
    of_model: ClassVar[Mapping[str, float]]

    @property
    def passes(self) -> int:
        """How many."""
        ...

    def unit(self, shape: tuple[int, ...]) -> int:
        """Elements that a piece may not part."""
        ...

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """The merged piece, float `[n]`."""
        ...


class Scanner(Merger, Protocol):
    """A merger that must know something of the whole tensor first.

    One with `measures = True` tells in its first pass the inner products of all rows as `products`: these are finite
    where all numbers are, so that nobody else looks for numbers that are not.
    """

    def scan(self, part: Part, before: list[Stats]) -> Stats:
        """What a pass learns of a piece: arrays that add up over pieces."""
        ...

    def settle(self, told: Stats, part: Part, before: list[Stats]) -> Stats:
        """What the sum means; of `part`, the tensor's last piece, only what is the same for all pieces is looked at."""
        ...


def one(shape: tuple[int, ...]) -> int:
    """The unit of a method that may be given any piece."""
    return 1


def row(shape: tuple[int, ...]) -> int:
    """The unit of a method that looks at whole rows: the last axis."""
    return max(1, shape[-1] if shape else 1)
