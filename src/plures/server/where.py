"""Whom to ask for a variant: replicas that have it answer at once, the others would have to load it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Container

from plures.engine.ask import BASE

KNOWN_S = 2.0  # until then everybody knows where a variant is


class Where:
    """Who took a variant's requests a moment ago, and how many are under way. For one thread.

    Where a variant has been for longer is known to Ray; its router hears of it some tenths of a second late, in which
    the second and third request for a new variant would go to another replica.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.under_way = rows, Counter[str]()
        self._lately: dict[str, tuple[str, float]] = {}

    def near(self, variant: str, replicas: Container[str]) -> str:
        """A replica's name, or the variant for one that is known to have it; "" for any, where it is crowded there."""
        if variant == BASE or self.under_way[variant] >= self.rows:
            return BASE
        replica, since = self._lately.get(variant, ("", 0.0))
        return replica if time.monotonic() - since < KNOWN_S and replica in replicas else variant

    def begun(self, variant: str) -> None:
        """A request for it is under way."""
        self.under_way[variant] += 1

    def took(self, variant: str, replica: str) -> None:
        """A replica has taken one."""
        now = time.monotonic()
        if len(self._lately) > 1000:
            self._lately = {v: found for v, found in self._lately.items() if now - found[1] < KNOWN_S}
        if variant != BASE and now - self._lately.get(variant, ("", float("-inf")))[1] >= KNOWN_S:
            self._lately[variant] = replica, now

    def ended(self, variant: str) -> None:
        """One is under way no more."""
        self.under_way[variant] -= 1
        if not self.under_way[variant]:
            del self.under_way[variant]
