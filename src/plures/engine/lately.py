"""Who asks, and who had how much of late: which tenants are heavy beside the others."""

from __future__ import annotations

import math
from collections.abc import Callable

from plures.engine.share import NEW_PRICE, PROMPT_PRICE, Share

ASKS_S = 30.0  # a tenant that asked so long ago asks no longer
WINDOW = 8192.0  # weighted tokens served, to all, after which a tenant's service counts 1/e
FACTOR = 2.0  # more than this times what the others had on the mean is heavy
_RESCALE = 1e100


class Lately:
    """The service that tenants had of late, in weighted tokens, each forgotten as others are served.

    A queue that is fair decides who starts; it cannot say who may be made to wait within a step. A tenant is heavy
    while it had more than `FACTOR` times what the others that ask had on the mean, over their weights. Alone, or among
    equals, nobody is. A tenant that sends much soon counts as heavy, however short its requests are.
    """

    def __init__(self, share_of: Callable[[str], Share], window: float = WINDOW) -> None:
        self._share_of, self._window = share_of, window
        self._asked_s: dict[str, float] = {}
        self._had: dict[str, float] = {}  # times _grown: what is served later counts more, so that nothing is decayed
        self._grown = 1.0

    def asked(self, tenant: str, now_s: float) -> None:
        """A request of a tenant has come."""
        self._asked_s[tenant] = now_s

    def served(self, tenant: str, prompt_tokens: int, new_tokens: int) -> None:
        """Tokens were computed for a tenant."""
        cost = PROMPT_PRICE * prompt_tokens + NEW_PRICE * new_tokens
        self._grown *= math.exp(cost / self._window)
        self._had[tenant] = self._had.get(tenant, 0.0) + cost * self._grown
        if self._grown > _RESCALE:
            self._had = {t: had / self._grown for t, had in self._had.items() if had > self._grown * 1e-6}
            self._grown = 1.0

    def heavy(self, now_s: float) -> frozenset[str]:
        """The heavy ones of those that ask."""
        for tenant in [t for t, last in self._asked_s.items() if now_s - last > ASKS_S]:
            del self._asked_s[tenant]
        if len(self._asked_s) < 2:
            return frozenset()
        had = {t: self._had.get(t, 0.0) / self._share_of(t).weight for t in self._asked_s}
        total, others = sum(had.values()), len(had) - 1
        return frozenset(t for t, own in had.items() if own * others > FACTOR * (total - own))
