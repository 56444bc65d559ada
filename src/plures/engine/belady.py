"""The yardstick of a cache: the best hit rate that any could have had on the same requests."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from plures.core.errors import WrongUse


def belady(log: Sequence[str], slots: int) -> float:
    """The best hit rate that any cache of so many slots can have on a log of variants, each loaded when asked.

    Belady's rule: give up what is asked again last. It is the yardstick SCH of "Not All Models Suit Expert Offloading"
    (arXiv:2505.16056) with variants for experts and the whole log for a segment.
    """
    if slots < 1:
        raise WrongUse(f"slots must be at least 1, got {slots}")
    after, seen = [len(log)] * len(log), dict[str, int]()
    for i in range(len(log) - 1, -1, -1):
        after[i] = seen.get(log[i], len(log))
        seen[log[i]] = i
    held: dict[str, int] = {}  # variant -> when it is asked again
    heap, hits = list[tuple[int, str]](), 0
    for variant, again in zip(log, after, strict=True):
        if variant in held:
            hits += 1
        elif len(held) >= slots:
            while True:
                when, old = heapq.heappop(heap)
                if held.get(old) == -when:
                    del held[old]
                    break
        held[variant] = again
        heapq.heappush(heap, (-again, variant))
    return hits / len(log) if log else 1.0
