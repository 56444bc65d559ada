"""What a tenant may use: its share, its limits of requests and tokens, and what a token costs."""

from __future__ import annotations

from dataclasses import dataclass, field

from plures.core.errors import WrongUse
from plures.engine.ask import Overloaded

PROMPT_PRICE, NEW_PRICE = 1.0, 2.0  # w_p and w_q of the paper: a new token costs about twice a prompt's
BURST_S = 10.0


@dataclass(frozen=True)
class Share:
    """What a tenant may use; 0 is no limit.

    Options:
        weight: share of the service relative to the other tenants that have work waiting.
        concurrency: requests that run at once.
        rate: requests per second, a token bucket that holds max(1, rate * 10 s): so many may come at once.
        tokens_per_minute: prompt and new tokens (unweighted), a bucket that holds one minute's worth. Prompts not yet
            computed count as used; new tokens are taken when they are computed, so that the bucket goes below zero by
            what the requests already accepted still use, and the tenant waits until it is refilled.
    """

    weight: float = 1.0
    concurrency: int = 0
    rate: float = 0.0
    tokens_per_minute: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise WrongUse(f"weight must be above 0 and finite, got {self.weight}")
        for name in ("concurrency", "rate", "tokens_per_minute"):
            if not getattr(self, name) >= 0:
                raise WrongUse(f"{name} must be 0 (no limit) or more, got {getattr(self, name)}")


@dataclass(eq=False, slots=True)
class Bucket:
    """A token bucket that is full at first."""

    level: float = 0.0
    at_s: float = float("-inf")

    def refill(self, per_s: float, most: float, now_s: float) -> float:
        """The level now."""
        self.level = min(most, self.level + per_s * max(0.0, now_s - self.at_s))
        self.at_s = max(self.at_s, now_s)
        return self.level


@dataclass(eq=False, slots=True)
class Had:
    """What a tenant has left of its limits: requests that may start, and tokens."""

    starts: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)

    def take(self, share: Share, tenant: str, coming: int, now_s: float) -> None:
        """Count one request against the limits; `coming` are prompt tokens let in but not computed.

        Raises: Overloaded, with nothing counted.
        """
        rate, per_minute, who = share.rate, share.tokens_per_minute, f"tenant {tenant!r}"
        if rate and (level := self.starts.refill(rate, max(1.0, rate * BURST_S), now_s)) < 1.0 - 1e-9:
            wait = (1.0 - level) / rate
            raise Overloaded(f"{who} is over its {rate:g} requests per second; come back in {wait:.1f} s", wait)
        if per_minute:
            level = self.tokens.refill(per_minute / 60.0, per_minute, now_s) - coming
            if level <= 0.0:
                wait = (1.0 - level) * 60.0 / per_minute
                raise Overloaded(f"{who} is over its {per_minute:g} tokens a minute; come back in {wait:.1f} s", wait)
        if rate:
            self.starts.level -= 1.0
