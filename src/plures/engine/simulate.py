"""Simulates the serving loop from measured step costs: limits chosen and policies tested without a model.

The idea of APEX (arXiv:2411.17651), one step at a time: the queue and the admission are the engine's own, the clock
is made of the costs of the steps.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from plures.core.errors import WrongUse
from plures.core.seeds import stream
from plures.engine.admit import Admission
from plures.engine.ask import BASE, Overloaded
from plures.engine.schedule import Queue, Waiting
from plures.engine.share import NEW_PRICE, PROMPT_PRICE, Share

Popularity = Literal["uniform", "distinct", "skewed", "identical"]
MOST_PREEMPTED = 4  # in one step
DRAIN_S = 5.0  # over how long the speed of draining is averaged


@dataclass(frozen=True)
class Costs:
    """A linear model of one step, in seconds: the step itself, what each row and token adds, an activation."""

    step_s: float
    decode_row_s: float
    prefill_token_s: float
    variant_row_s: float  # for every decoding row that is not the base's
    activate_s: float  # to bring one variant into a slot


@dataclass(frozen=True)
class Arrival:
    """A request that comes at a time and wants exactly `n_new` tokens."""

    at_s: float
    tenant: str
    variant: str
    n_prompt: int
    n_new: int


@dataclass(frozen=True)
class Limits:
    """Rows at once, prompt tokens a step, tokens in the KV memory, variants in slots."""

    rows: int = 32
    prefill_tokens: int = 256
    kv_tokens: int = 65536
    slots: int = 32


def _lists() -> defaultdict[str, list[float]]:
    return defaultdict(list)


def _counts() -> defaultdict[str, int]:
    return defaultdict(int)


@dataclass
class Outcome:
    """What came of a simulation, by tenant where a dictionary."""

    first_s: defaultdict[str, list[float]] = field(default_factory=_lists)  # from arrival to the first token
    between_s: defaultdict[str, list[float]] = field(default_factory=_lists)  # between two tokens of one answer
    finished: defaultdict[str, int] = field(default_factory=_counts)  # new tokens of the answers that ended
    served: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # 1 * prompt + 2 * new tokens
    refused: defaultdict[str, int] = field(default_factory=_counts)
    retry_s: list[float] = field(default_factory=list)  # of all refusals, in order
    log: list[str] = field(default_factory=list)  # the variants of the requests started, in order
    hits: int = 0
    activations: int = 0
    preempted: int = 0
    most_waiting: int = 0
    new_tokens: int = 0
    busy_s: float = 0.0
    end_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The share of started requests whose variant was resident; the base always is and does not count."""
        return self.hits / len(self.log) if self.log else 1.0

    @property
    def throughput(self) -> float:
        """New tokens per second."""
        return self.new_tokens / self.end_s if self.end_s else 0.0

    def p(self, tenant: str | None, q: float, *, what: Literal["first", "between"] = "first") -> float:
        """The q-th percentile (nearest rank) of a tenant's waits in seconds, all tenants' for None; NaN for none."""
        if not 0 <= q <= 100:
            raise WrongUse(f"q must be in [0, 100], got {q}")
        of = self.first_s if what == "first" else self.between_s
        values = sorted(of.get(tenant, ()) if tenant is not None else itertools.chain(*of.values()))
        return values[max(0, math.ceil(q / 100 * len(values)) - 1)] if values else math.nan

    def jain(self, weights: Mapping[str, float] | None = None) -> float:
        """Jain's index of the tenants' service over their weights: 1 where all are equal, 1/n where one has it all."""
        x = [served / (weights or {}).get(tenant, 1.0) for tenant, served in self.served.items()]
        return sum(x) ** 2 / (len(x) * sum(v * v for v in x)) if any(x) else 1.0


@dataclass(eq=False, slots=True)
class _Row:
    w: Waiting
    prefill: int  # prompt tokens to compute, with the new ones that a preemption lost
    new: int  # new tokens to come
    first: bool  # no token yet
    last_s: float = 0.0


class _Slots:
    """Variants in slots; the one given up has the smallest heat, requests that count half after 4 * slots others."""

    def __init__(self, slots: int) -> None:
        self.slots, self.heat, self.n = slots, dict[str, tuple[float, int]](), 0
        self.users: defaultdict[str, int] = defaultdict(int)

    def __contains__(self, variant: str) -> bool:
        return variant == BASE or variant in self.heat

    def room(self, variant: str) -> bool:
        """Whether this variant can be made resident."""
        return variant in self or len(self.heat) < self.slots or any(not self.users[v] for v in self.heat)

    def use(self, variant: str) -> bool:
        """Make a variant resident for one more row; whether it was already."""
        self.users[variant] += 1
        if variant == BASE:
            return True
        self.n += 1
        hit = variant in self.heat
        if not hit and len(self.heat) >= self.slots:
            del self.heat[min((v for v in self.heat if not self.users[v]), key=self._now)]
        self.heat[variant] = (1.0 + (self._now(variant) if hit else 0.0), self.n)
        return hit

    def _now(self, variant: str) -> float:
        heat, at = self.heat[variant]
        return float(heat * 0.5 ** ((self.n - at) / (4 * self.slots)))


class _Loop:
    """The state of one simulation."""

    def __init__(self, costs: Costs, limits: Limits, queue: Queue, shares: Mapping[str, Share]) -> None:
        self.costs, self.limits, self.queue, self.shares = costs, limits, queue, shares
        self.slots, self.rows, self.kv = _Slots(limits.slots), list[_Row](), 0
        self.last_s: dict[int, float] = {}  # when a preempted request had its last token
        self.now_s = self.drain = 0.0  # drain: tokens a second, averaged over DRAIN_S
        self.out = Outcome()

    def arrive(self, ticket: int, a: Arrival, admission: Admission | None) -> None:
        """Let a request in, or count it as refused."""
        tokens, waiting = a.n_prompt + a.n_new, self.queue.waiting_tokens
        try:
            if admission is not None:
                admission.check(
                    use=(self.kv + waiting) / self.limits.kv_tokens,
                    waiting=len(self.queue),
                    waiting_tokens=waiting,
                    tokens=tokens,
                    weight=self.shares.get(a.tenant, Share()).weight,
                    behind=self.queue.lead(a.tenant),
                    drain_tokens_s=self.drain,
                )
            self.queue.put(Waiting(ticket, a.tenant, a.variant, a.n_prompt, a.n_new, a.at_s), a.at_s)
        except Overloaded as error:
            self.out.refused[a.tenant] += 1
            self.out.retry_s.append(error.retry_after_s)
            return
        self.out.most_waiting = max(self.out.most_waiting, len(self.queue))

    def fits(self, w: Waiting) -> bool:
        """Whether a request has its KV memory and a slot."""
        return self.kv + w.n_prompt + w.max_new <= self.limits.kv_tokens and self.slots.room(w.variant)

    def fill(self) -> int:
        """Start what may start, preempting a few at most; the number of activations."""
        activations, preempted = 0, 0
        while self.queue:
            full = len(self.rows) >= self.limits.rows
            w = None if full else self.queue.pick(self.slots.__contains__, self.fits, self.now_s)
            if w is None:
                victim = None if preempted >= MOST_PREEMPTED else self.queue.victim([row.w for row in self.rows])
                if victim is None:
                    break
                self._preempt(victim)
                preempted += 1
                continue
            hit = self.slots.use(w.variant)
            if w.variant != BASE:
                self.out.log.append(w.variant)
                self.out.hits += hit
            activations += not hit
            self.kv += w.n_prompt + w.max_new
            since = self.last_s.pop(w.ticket, w.arrived_s)
            self.rows.append(_Row(w, w.n_prompt + w.n_done, w.max_new - w.n_done, not w.n_done, since))
        self.out.activations += activations
        return activations

    def step(self, activations: int) -> None:
        """Every row that has its prompt decodes a token; the others share the step's prompt tokens, in order of start.

        The last piece of a prompt gives its first token in the same step.
        """
        c, budget = self.costs, self.limits.prefill_tokens
        decoding = [row for row in self.rows if not row.prefill]
        chunks: list[tuple[_Row, int]] = []
        for row in self.rows:
            if row.prefill and budget:
                chunks.append((row, min(budget, row.prefill)))
                budget -= chunks[-1][1]
        prompts = self.limits.prefill_tokens - budget
        variants = sum(row.w.variant != BASE for row in decoding)
        took = c.step_s + c.decode_row_s * len(decoding) + c.prefill_token_s * prompts
        took += c.variant_row_s * variants + c.activate_s * activations
        self.now_s += took
        self.out.busy_s += took
        for row, n in chunks:
            row.prefill -= n
            self.charge(row.w.tenant, n, 0)
        giving = decoding + [row for row, _ in chunks if not row.prefill]
        for row in giving:
            self._give(row)
        self.rows = [row for row in self.rows if row.new > 0]
        keep = math.exp(-took / DRAIN_S)
        self.drain = self.drain * keep + (1 - keep) * (prompts + len(giving)) / took

    def charge(self, tenant: str, prompt: int, new: int) -> None:
        """Tell the queue, and count, what was computed."""
        self.queue.served(tenant, prompt, new)
        self.out.served[tenant] += PROMPT_PRICE * prompt + NEW_PRICE * new
        self.out.new_tokens += new

    def _give(self, row: _Row) -> None:
        w = row.w
        (self.out.first_s if row.first else self.out.between_s)[w.tenant].append(self.now_s - row.last_s)
        row.first, row.last_s = False, self.now_s
        row.new -= 1
        w.n_done += 1
        self.charge(w.tenant, 0, 1)
        if row.new <= 0:
            self.out.finished[w.tenant] += w.max_new
            self._free(w)
            self.queue.ended(w)

    def _free(self, w: Waiting) -> None:
        self.kv -= w.n_prompt + w.max_new
        self.slots.users[w.variant] -= 1

    def _preempt(self, w: Waiting) -> None:
        row = next(row for row in self.rows if row.w is w)
        self.rows.remove(row)
        self._free(w)
        self.last_s[w.ticket] = row.last_s
        self.queue.back(w)
        self.out.preempted += 1


def simulate(
    arrivals: Iterable[Arrival],
    costs: Costs,
    limits: Limits,
    *,
    policy: Literal["vtc", "fcfs"] = "vtc",
    shares: Mapping[str, Share] | None = None,
    admission: Admission | None = None,
    until_s: float | None = None,
    bonus_tokens: float = 256.0,
    quantum_tokens: float = 1024.0,
) -> Outcome:
    """Serve the arrivals and say what came of it; cut off after `until_s`.

    Recomputed tokens of a preempted request cost time and are charged. A request that waits is noticed when a step
    ends. Raises: WrongUse for a request that is empty or can never fit.
    """
    of = dict(shares or {})
    queue = Queue(
        lambda tenant: of.get(tenant, Share()), policy=policy, bonus_tokens=bonus_tokens, quantum_tokens=quantum_tokens
    )
    loop = _Loop(costs, limits, queue, of)
    coming = deque(enumerate(sorted(arrivals, key=lambda a: a.at_s)))
    for _, a in coming:
        if a.n_prompt < 1 or a.n_new < 1 or a.n_prompt + a.n_new > limits.kv_tokens:
            raise WrongUse(f"a request must have 1 to {limits.kv_tokens} tokens (kv_tokens), some new, got {a}")
    if min(limits.rows, limits.prefill_tokens, limits.slots) < 1:
        raise WrongUse(f"rows, prefill_tokens and slots must be at least 1, got {limits}")
    while until_s is None or loop.now_s < until_s:
        while coming and coming[0][1].at_s <= loop.now_s:
            ticket, a = coming.popleft()
            loop.arrive(ticket, a, admission)
        activations = loop.fill()
        if loop.rows:
            loop.step(activations)
        elif coming:
            loop.now_s = max(loop.now_s, coming[0][1].at_s)
        else:
            break
    loop.out.end_s = loop.now_s
    return loop.out


def zipf(n: int, alpha: float = 1.0) -> list[float]:
    """The shares of n variants where the k-th asked most has 1/k^alpha of the first."""
    raw = [k**-alpha for k in range(1, n + 1)]
    return [x / sum(raw) for x in raw]


def choose_variants(rng: random.Random, names: Sequence[str], popularity: Popularity, alpha: float) -> Iterator[str]:
    """Variants without end: each alike, each in turn, by Zipf's law (the first asked most), or always the first."""
    if popularity == "uniform":
        return (rng.choice(names) for _ in itertools.repeat(None))
    if popularity == "distinct":
        return itertools.cycle(names)
    if popularity == "skewed":
        shares = list(itertools.accumulate(zipf(len(names), alpha)))
        return (rng.choices(names, cum_weights=shares)[0] for _ in itertools.repeat(None))
    if popularity == "identical":
        return itertools.repeat(names[0])
    raise WrongUse(f"popularity must be 'uniform', 'distinct', 'skewed' or 'identical', got {popularity!r}")


def gamma_arrivals(
    seed: int,
    tenant: str,
    *,
    rate: float,
    duration_s: float,
    cv: float = 1.0,
    variants: Sequence[str] = (BASE,),
    popularity: Popularity = "uniform",
    alpha: float = 1.0,
    n_prompt: tuple[int, int] = (32, 128),
    n_new: tuple[int, int] = (16, 64),
) -> list[Arrival]:
    """A tenant's load as S-LoRA and SGLang measure it.

    The times between requests follow a Gamma law of mean 1/rate and coefficient of variation cv (1: Poisson; more:
    in bursts), the variants a popularity, the lengths are uniform between bounds that are included.
    """
    if not (rate > 0 and cv > 0 and variants):
        raise WrongUse(f"rate and cv must be above 0 and variants not empty, got {rate}, {cv} and {list(variants)!r}")
    rng = random.Random(stream(seed, "arrivals", tenant))
    names = choose_variants(rng, variants, popularity, alpha)
    made, at_s = list[Arrival](), 0.0
    while (at_s := at_s + rng.gammavariate(1 / cv**2, cv**2 / rate)) < duration_s:
        made.append(Arrival(at_s, tenant, next(names), rng.randint(*n_prompt), rng.randint(*n_new)))
    return made


def suggest(costs: Costs, arrivals: Sequence[Arrival], choices: Iterable[Limits]) -> Limits:
    """Of the choices that reach 95 % of the best throughput, the one with the least P95 wait for a first token."""
    tried = [(limits, simulate(arrivals, costs, limits)) for limits in choices]
    if not tried:
        raise WrongUse("choices must not be empty: nothing to suggest from")
    best = max(out.throughput for _, out in tried)
    return min((t for t in tried if t[1].throughput >= 0.95 * best), key=lambda t: t[1].p(None, 95))[0]
