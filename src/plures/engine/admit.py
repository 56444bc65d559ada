"""Which request is let in: a price that is flat while there is room, then rises, against what the request is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from plures.core.errors import WrongUse
from plures.engine.ask import Overloaded

LEAST_S, MOST_S = 1.0, 120.0  # Retry-After is kept between these


@dataclass(frozen=True)
class Threshold:
    """The ECT[alpha] price of a share in use: constant up to alpha, then exponential up to the greatest density.

    With L the least and U the greatest value density of what asks, and z the share in use,
        price(z) = L                       for 0 <= z <= alpha
        price(z) = U * exp(beta * (z - 1)) for alpha < z < 1
        beta = W(U * (1 - alpha) / (L * alpha)) / (1 - alpha),
    W the Lambert function, W(x) * exp(W(x)) = x. What asks is let in where its density is at least the price. Why this
    beta: having sold the share z at these prices one holds at least L*alpha + integral of price from alpha to z, and
    may have turned away a whole knapsack at price(z). Their ratio is the same beta at every z beyond alpha just when
    L*alpha*beta = U * exp(beta * (alpha - 1)); that solved for beta is the line above, and beta is how much worse than
    the best in hindsight the rule can be. The price jumps at alpha from L to L*alpha*beta. At alpha = 1/(1 + ln(U/L)),
    the least allowed, there is no jump and beta = 1 + ln(U/L), the best possible without fairness; at 1 the price is
    flat until all is full and beta = U/L.

    Options:
        flat: alpha, the share in use up to which the price is flat; in [1/(1 + ln(high/low)), 1].
        low, high: L and U.
    Raises: WrongUse for options out of range.
    Paper: Lechowicz et al., "Time Fairness in Online Knapsack Problems", ICLR 2024, arXiv:2305.13293, ECT[alpha];
        the formula is that of the authors' code, github.com/adamlechowicz/fair-knapsack at 422e9b2, knapsack.py,
        `alphaFair`, and the condition on beta is worked out above.
    Departs from the paper: what is packed leaves again here and z falls with it, so that beta is no promise but the
        shape of a curve; the price is infinite from z = 1 on, where the paper's is U and nothing fits.
    """

    flat: float = 0.8
    low: float = 1.0
    high: float = 64.0

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high < math.inf:
            raise WrongUse(f"0 < low <= high must hold, got low {self.low} and high {self.high}")
        least = 1 / (1 + math.log(self.high / self.low))
        if not least - 1e-12 <= self.flat <= 1:
            raise WrongUse(f"flat must be in [{least:.4g}, 1] for high/low = {self.high / self.low:g}, got {self.flat}")

    @property
    def beta(self) -> float:
        """The exponent, and the ratio to the best in hindsight where nothing leaves."""
        return _beta(self.flat, self.high / self.low)

    def price(self, use: float) -> float:
        """The least density that is let in at a share in use; infinite where all is full."""
        if use >= 1:
            return math.inf
        if use <= self.flat:
            return self.low
        return self.high * math.exp(self.beta * (use - 1))

    def admits(self, use: float, density: float) -> bool:
        """Whether what asks at this density is let in."""
        return density >= self.price(use)

    def reach(self, density: float) -> float:
        """The greatest share in use at which this density is let in."""
        if density < self.low:
            return 0.0
        if density >= self.high or self.flat == 1:
            return 1.0
        return max(self.flat, 1 + math.log(density / self.high) / self.beta)


@lru_cache(maxsize=64)
def _beta(flat: float, ratio: float) -> float:
    return ratio if flat == 1 else lambert(ratio * (1 - flat) / flat) / (1 - flat)


def lambert(x: float) -> float:
    """W(x) for x >= 0, the w with w * exp(w) = x, by Halley's iteration."""
    assert x >= 0, f"lambert wants 0 or more, got {x}"
    w = math.log1p(x) if x < math.e else math.log(x) - math.log(math.log(x))
    for _ in range(50):
        e = math.exp(w)
        off = w * e - x
        step = off / (e * (w + 1) - (w + 2) * off / (2 * w + 2))
        w -= step
        if abs(step) <= 1e-15 * max(1.0, abs(w)):
            break
    return w


class Admission:
    """Lets a request in or raises `Overloaded`: the knapsack is what the server may owe at once.

    The share z in use is the fullest of four bounds, each 1 where all of it is owed:
        use / horizon                                  memory: the tokens running and waiting, in memories full
        waiting / max_waiting                          requests that wait
        waiting_tokens / max_waiting_tokens            their prompt and new tokens: the memory that the queue takes
        (waiting_tokens / drain_tokens_s) / horizon_s  how long the queue takes to empty, where the speed is known
    The density is what a request is worth, high * weight / max(1, behind), kept in [low, high], where `behind` is by
    how many quanta its tenant leads the least served one, with what it has waiting counted (`Queue.lead`).

    So everything is let in while z <= flat, and always where nothing waits. Beyond, a tenant must be near the least
    served one: with the defaults (alpha 0.8, U/L 64) the price jumps to 8.2 at z = 0.8, which turns away whom more
    than 7.8 quanta lead, and to 64 at z = 1. Who floods the server is refused first, at 80 % of whatever bound is
    nearest, and the last fifth is kept for those who ask little: they are let in until a bound is reached. The queue
    never holds more than max_waiting requests, nor more than max_waiting_tokens tokens (but one request on its own).

    Retry-After is the time in which the queue, as fast as it drains now, falls to where this request would be let in,
    kept in [1, 120] seconds; 120 where nothing drains.

    Options:
        horizon: how many times the memory may be owed, running and waiting together.
        horizon_s: the longest time that the queue may take to empty.
    """

    def __init__(
        self,
        threshold: Threshold = Threshold(),
        *,
        max_waiting: int = 1024,
        max_waiting_tokens: int = 1 << 20,
        horizon: float = 16.0,
        horizon_s: float = 60.0,
    ) -> None:
        for name, value in (("max_waiting", max_waiting), ("max_waiting_tokens", max_waiting_tokens)):
            if value < 1:
                raise WrongUse(f"{name} must be at least 1, got {value}")
        if not horizon >= 1:
            raise WrongUse(f"horizon must be at least 1 (the memory itself), got {horizon}")
        if not horizon_s > 0:
            raise WrongUse(f"horizon_s must be above 0 seconds, got {horizon_s}")
        self.threshold, self.horizon, self.horizon_s = threshold, horizon, horizon_s
        self.max_waiting, self.max_waiting_tokens = max_waiting, max_waiting_tokens

    def share(self, *, use: float, waiting: int, waiting_tokens: int, drain_tokens_s: float) -> float:
        """z, the share in use of the fullest bound; see the class."""
        wait_s = waiting_tokens / drain_tokens_s if drain_tokens_s > 0 else 0.0
        return max(
            use / self.horizon,
            waiting / self.max_waiting,
            waiting_tokens / self.max_waiting_tokens,
            wait_s / self.horizon_s,
        )

    def density(self, weight: float, behind: float) -> float:
        """What a request is worth that comes from a tenant so many quanta ahead."""
        t = self.threshold
        return min(t.high, max(t.low, t.high * weight / max(1.0, behind)))

    def check(
        self,
        *,
        use: float,
        waiting: int,
        waiting_tokens: int,
        tokens: int,
        weight: float,
        behind: float,
        drain_tokens_s: float,
    ) -> None:
        """Let a request of so many tokens (prompt and new) in, or refuse it.

        `use`: tokens running and waiting over those that fit in the memory, above 1 while requests queue.
        `waiting`, `waiting_tokens`: what waits. `weight`, `behind`: the tenant's weight, and its `Queue.lead`.
        `drain_tokens_s`: prompt and new tokens computed per second of late, 0 where not known.

        Raises: Overloaded.
        """
        if waiting == 0:
            return
        z = self.share(use=use, waiting=waiting, waiting_tokens=waiting_tokens, drain_tokens_s=drain_tokens_s)
        full = waiting + 1 > self.max_waiting or waiting_tokens + tokens > self.max_waiting_tokens
        density = self.density(weight, behind)
        if not full and self.threshold.admits(z, density):
            return
        keep = self.threshold.reach(density)
        excess = waiting_tokens * max(0.0, 1 - keep / z) + tokens
        wait_s = excess / drain_tokens_s if drain_tokens_s > 0 else MOST_S
        wait_s = min(MOST_S, max(LEAST_S, wait_s))
        why = "the queue is full" if full or z >= 1 else f"{z:.0%} of the queue is taken and this tenant has its share"
        raise Overloaded(f"{why} ({waiting} requests wait); come back in {wait_s:.0f} s", wait_s)
