"""Queues, requests for them, and who is taken."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from plures.engine.schedule import Queue, Waiting
from plures.engine.share import Share

TICKETS = count(1)


def ask(tenant: str, n_prompt: int = 10, max_new: int = 10, variant: str = "v", at_s: float = 0.0) -> Waiting:
    return Waiting(next(TICKETS), tenant, variant, n_prompt, max_new, at_s)


def queue(policy: str = "vtc", bonus: float = 0.0, quantum: float = 0.0, **shares: Share) -> Queue:
    return Queue(lambda t: shares.get(t, Share()), policy=policy, bonus_tokens=bonus, quantum_tokens=quantum)  # type: ignore[arg-type]


def take(q: Queue, n: int = 1, hot: str = "", room: int = 10**9) -> list[Waiting]:
    """Up to n requests started now; `hot` variants are resident, and so many tokens fit."""
    got: list[Waiting] = []
    for _ in range(n):
        used = sum(w.n_prompt + w.max_new for w in got)
        w = q.pick(lambda v: v in hot.split(), lambda w, used=used: used + w.n_prompt + w.max_new <= room, 0.0)  # type: ignore[misc]
        if w is None:
            break
        got.append(w)
    return got


def tenants(got: Sequence[Waiting]) -> str:
    return "".join(w.tenant for w in got)
