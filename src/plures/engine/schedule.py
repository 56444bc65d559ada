"""Which request starts next: fair between tenants by the tokens they were given, with a bounded taste for locality."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from plures.core.errors import WrongUse
from plures.engine.share import NEW_PRICE, PROMPT_PRICE, Had, Share

LOOK, LOOK_TENANT = 256, 32  # waiting requests looked at for a resident variant: in one pick, of one tenant


@dataclass
class Waiting:
    """A request as the queue sees it. `n_done` is the number of new tokens that it had before it was preempted."""

    ticket: int
    tenant: str
    variant: str
    n_prompt: int
    max_new: int
    arrived_s: float
    n_done: int = 0


@dataclass(eq=False, slots=True)
class _Entry:
    """A request in its tenant's line, and the tokens of those that went before it although it was ahead."""

    w: Waiting
    order: int
    again: bool = False  # it was preempted: its prompt is not paid in advance again, it passes nothing
    near: float = 0.0  # prompt tokens that passed it because their variants were resident
    far: float = 0.0  # price of what passed it because it did not fit
    price: float = 0.0  # all that it may still be charged; set when it is queued


@dataclass(eq=False, slots=True)
class _Line:
    """A tenant: its counter, its limits, what waits in order, what runs."""

    tenant: str
    share: Share
    counter: float = 0.0
    entries: OrderedDict[int, _Entry] = field(default_factory=OrderedDict)
    running: int = 0
    paid: dict[int, int] = field(default_factory=dict)  # prompt tokens charged but not computed, by running ticket
    waiting_price: float = 0.0
    waiting_prompt: int = 0
    had: Had = field(default_factory=Had)

    def head(self) -> _Entry:
        """The request that came first."""
        return next(iter(self.entries.values()))

    def open(self) -> bool:
        """Whether one more may run."""
        return not self.share.concurrency or self.running < self.share.concurrency

    def take(self, now_s: float) -> None:
        """Count one request against the limits of rate and tokens. Raises: Overloaded, with nothing counted."""
        self.had.take(self.share, self.tenant, self.waiting_prompt + sum(self.paid.values()), now_s)


class Queue:
    """Requests that wait, in lines by tenant; `pick` says which one starts.

    Virtual Token Counter: a tenant's counter grows by (1 * prompt + 2 * new tokens) / weight as it is served, and the
    waiting tenant with the smallest counter goes first. The prompt is charged when the request is picked, as in the
    paper, and `served` first uses up what was paid so; what was not computed (a prefix cache, a cancelled prompt) is
    paid back when the request ends. A tenant whose line was empty is lifted on its next request to the smallest
    counter of the tenants that wait, or if none waits to the counter of the one whose line emptied last: idling earns
    no credit. Counters less than `quantum_tokens` above the smallest count as equal; of these the tenant with fewer
    requests running (over its weight) goes first, then the smaller counter, then the older request.

    Locality: a request whose variant is resident goes before others of its tenant that are not, and counts as if its
    tenant's counter were `bonus_tokens` smaller. Every request so passed, of its own tenant or another, notes the
    prompt tokens that passed it; from `bonus_tokens` on it is passed no more. A pick looks at 256 requests for this.

    Memory: where the request whose turn it is does not fit, another tenant's that fits may start, if its counter is
    less than a quantum above the smallest. The one passed notes the most that those may be charged; from
    `quantum_tokens` on nothing behind it starts until it fits. A request that can never fit must not be put.

    With both allowances 0 this is the paper's algorithm. The service of two tenants that both wait all the time and
    are at no limit differs by at most 2 * (U + bonus_tokens + quantum_tokens) weighted tokens, where U = max(1 *
    longest prompt, 2 * tokens running at once) over the smaller weight: the paper's bound and the allowances.

    policy "fcfs" starts in order of arrival over all tenants, under the same limits; nothing passes the first. A
    preempted request is then the first of all.

    Options:
        share_of: a tenant's limits; asked again at each of its requests.
        bonus_tokens: what a resident variant is worth, in weighted tokens. 0 ignores residency between tenants.
        quantum_tokens: what counters may differ by and count as equal, how far one may be passed where it does not
            fit, and how far behind a tenant must be for a preemption; in weighted tokens.
    Paper: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, arXiv:2401.00588, the VTC algorithm
        with weights; github.com/Ying1123/VTC-artifact at 14c19b7, slora/server/router/vtc_req_queue.py.
    Departs from the paper: the allowances above, limits and preemption. A preempted request lifts its tenant's
        counter too where its line was empty.
    """

    def __init__(
        self,
        share_of: Callable[[str], Share],
        *,
        policy: Literal["vtc", "fcfs"] = "vtc",
        bonus_tokens: float = 256.0,
        quantum_tokens: float = 1024.0,
    ) -> None:
        if policy not in ("vtc", "fcfs"):
            raise WrongUse(f"policy must be 'vtc' or 'fcfs', got {policy!r}")
        for name, value in (("bonus_tokens", bonus_tokens), ("quantum_tokens", quantum_tokens)):
            if not value >= 0:
                raise WrongUse(f"{name} must be 0 or more, got {value}")
        self.policy, self.bonus_tokens, self.quantum_tokens = policy, bonus_tokens, quantum_tokens
        self.waiting_tokens = 0  # prompt and new tokens that wait, preempted ones with all they had
        self._share_of = share_of
        self._lines: dict[str, _Line] = {}
        self._active: dict[str, _Line] = {}  # those with something waiting
        self._waits: dict[int, str] = {}  # ticket -> tenant
        self._running: dict[int, _Entry] = {}  # in order of start
        self._left: _Line | None = None  # the last to leave the queue
        self._back, self._front = 0, 0

    def put(self, w: Waiting, now_s: float) -> None:
        """Queue a request. Raises: Overloaded, where its tenant's rate or tokens are used up."""
        assert w.ticket not in self._waits and w.ticket not in self._running, f"ticket {w.ticket} is known already"
        line = self._line(w.tenant)
        line.share = self._share_of(w.tenant)
        line.take(now_s)
        self._back += 1
        self._enter(line, _Entry(w, self._back), last=True)

    def drop(self, ticket: int) -> bool:
        """Forget a request that waits; False where none of that ticket does."""
        if ticket not in self._waits:
            return False
        line = self._lines[self._waits[ticket]]
        self._leave(line, line.entries[ticket])
        return True

    def pick(
        self, resident: Callable[[str], bool], fits: Callable[[Waiting], bool], now_s: float,
        may: Callable[[str], bool] = lambda _: True,
    ) -> Waiting | None:  # fmt: skip
        """Take out the request to start now and count it as running; None where nothing may start.

        Tenants that `may` not are passed over like those at their concurrency; "fcfs" does not ask.
        """
        if self.policy == "fcfs":
            first = min((n for n in self._active.values() if n.open()), key=lambda n: n.head().order, default=None)
            return self._start(first, first.head()) if first is not None and fits(first.head().w) else None
        opened = {name: line for name, line in self._active.items() if line.open() and may(name)}
        least = min((line.counter for line in opened.values()), default=0.0)
        heap = [(*self._turn(line, least), name) for name, line in opened.items()]
        heapq.heapify(heap)
        look, chosen = LOOK, None  # chosen: the one whose turn it is and that fits; only a resident one goes before it
        blocked, near = list[_Entry](), list[_Entry]()
        while heap:
            far, *_, name = heapq.heappop(heap)
            line = opened[name]
            if far and blocked:
                break
            if chosen is not None and line.counter >= chosen.counter + self.bonus_tokens:
                if far:
                    break
                continue
            found, ahead, seen = self._resident(line, resident, fits, look)
            look -= seen
            if found is not None:
                return self._pass(line, found, near + ahead, blocked)
            head = line.head()
            if chosen is None:
                if not fits(head.w):
                    if head.far >= self.quantum_tokens:
                        break
                    blocked.append(head)
                    continue
                if head.again and blocked:
                    continue
                chosen = line
            if look <= 0 or self._stays(head):
                break
            near.append(head)
        return self._pass(chosen, chosen.head(), [], blocked) if chosen is not None else None

    def back(self, w: Waiting) -> None:
        """Put a preempted request (its `n_done` brought up to date) at the head of its tenant's line.

        What `served` is told of the second computing of its tokens is charged; to be charged once, tell it nothing.
        """
        assert w.ticket in self._running, f"ticket {w.ticket} was preempted but does not run"
        self.ended(w)
        self._front -= 1
        self._enter(self._line(w.tenant), _Entry(w, self._front, again=True), last=False)

    def served(self, tenant: str, prompt_tokens: int, new_tokens: int) -> None:
        """Charge a tenant for tokens computed for it; prompts paid when they were picked come off first."""
        line = self._line(tenant)
        line.had.tokens.level -= prompt_tokens + new_tokens
        owed = prompt_tokens
        while owed and line.paid:
            ticket = next(iter(line.paid))
            used = min(owed, line.paid[ticket])
            owed -= used
            line.paid[ticket] -= used
            if not line.paid[ticket]:
                del line.paid[ticket]
        line.counter += (PROMPT_PRICE * owed + NEW_PRICE * new_tokens) / line.share.weight

    def ended(self, w: Waiting) -> None:
        """Count a request as running no more; one that does not run is ignored."""
        if self._running.pop(w.ticket, None) is None:
            return
        line = self._lines[w.tenant]
        line.running -= 1
        line.counter -= PROMPT_PRICE * line.paid.pop(w.ticket, 0) / line.share.weight

    def victim(self, running: Sequence[Waiting]) -> Waiting | None:
        """Whom to preempt so that a waiting tenant more than a quantum behind may start; None where nobody.

        Behind is measured in counters to which is added what the running requests may still be charged (by their
        `n_done`, better up to date), for the tenant that waits its first request too: a tenant that took all rows
        while it was alone gives some back. It must not be its turn all the same, or it would be picked again.
        The one preempted is the request started last, so that the least work is lost.
        """
        opened = [line for line in self._active.values() if line.open()]
        if self.policy == "fcfs" or not opened:
            return None
        least = min(line.counter for line in opened)
        behind = min(opened, key=lambda line: self._turn(line, least))
        will: dict[str, float] = {}
        for w in running:
            line = self._lines[w.tenant]
            will[w.tenant] = will.get(w.tenant, line.counter) + _price(w, paid=True) / line.share.weight
        wants = behind.head().price / behind.share.weight + will.get(behind.tenant, behind.counter)
        name = max(will, key=lambda tenant: will[tenant], default=behind.tenant)
        ahead, least = self._lines[name], min(least, self._lines[name].counter)
        again = self._turn(ahead, least, -1)[:3] <= self._turn(behind, least)[:3]
        if again or will.get(name, 0.0) - wants <= self.quantum_tokens:
            return None
        mine = {w.ticket: w for w in running if w.tenant == name}
        return next((mine[ticket] for ticket in reversed(self._running) if ticket in mine), None)

    def lead(self, tenant: str) -> float:
        """Quanta that a tenant would be ahead of the least served waiting one if all it has waiting were served.

        The counter alone would not tell: the fairer the queue, the closer the counters of all that wait, and what a
        heavy tenant asks too much stands in its line. This is what `Admission.check` wants as `behind`.
        """
        line = self._lines.get(tenant)
        if line is None or not self._active:
            return 0.0
        ahead = line.counter - min(other.counter for other in self._active.values())
        ahead += line.waiting_price / line.share.weight
        return max(0.0, ahead) / max(self.quantum_tokens, 1.0)

    def depths(self) -> dict[str, int]:
        """Requests that wait, by tenant."""
        return {tenant: len(line.entries) for tenant, line in self._active.items()}

    def counters(self) -> dict[str, float]:
        """The virtual token counter of every tenant seen."""
        return {tenant: line.counter for tenant, line in self._lines.items()}

    def __len__(self) -> int:
        return len(self._waits)

    def _line(self, tenant: str) -> _Line:
        if tenant not in self._lines:
            self._lines[tenant] = _Line(tenant, self._share_of(tenant))
        return self._lines[tenant]

    def _enter(self, line: _Line, entry: _Entry, *, last: bool) -> None:
        if not line.entries:  # max(c_u, min over those queued), or max(c_u, c of the last to leave)
            least = min((other.counter for other in self._active.values()), default=None)
            if least is None:
                least = self._left.counter if self._left is not None else line.counter
            line.counter = max(line.counter, least)
            self._active[line.tenant] = line
        w = entry.w
        entry.price = _price(w, paid=entry.again)
        line.entries[w.ticket] = entry
        line.entries.move_to_end(w.ticket, last=last)
        line.waiting_price += entry.price
        line.waiting_prompt += 0 if entry.again else w.n_prompt
        self.waiting_tokens += w.n_prompt + w.max_new
        self._waits[w.ticket] = line.tenant

    def _leave(self, line: _Line, entry: _Entry) -> None:
        w = entry.w
        del line.entries[w.ticket], self._waits[w.ticket]
        line.waiting_price -= entry.price
        line.waiting_prompt -= 0 if entry.again else w.n_prompt
        self.waiting_tokens -= w.n_prompt + w.max_new
        if not line.entries:
            line.waiting_price = 0.0
            del self._active[line.tenant]
            self._left = line

    def _start(self, line: _Line, entry: _Entry) -> Waiting:
        w = entry.w
        self._leave(line, entry)
        self._running[w.ticket] = entry
        line.running += 1
        if not entry.again and w.n_prompt:
            line.paid[w.ticket] = w.n_prompt
            line.counter += PROMPT_PRICE * w.n_prompt / line.share.weight
        return w

    def _pass(self, line: _Line, entry: _Entry, near: list[_Entry], blocked: list[_Entry]) -> Waiting:
        for passed in near:
            passed.near += max(1, entry.w.n_prompt)
        for passed in blocked:
            passed.far += max(1.0, _price(entry.w, paid=False))
        return self._start(line, entry)

    def _turn(self, line: _Line, least: float, more: int = 0) -> tuple[bool, float, float, int]:
        """What lines are sorted by: within a quantum of the least counter, who has fewer running; then the counter."""
        rows, order = (line.running + more) / line.share.weight, line.head().order if line.entries else 0
        if line.counter < least + self.quantum_tokens:
            return False, rows, line.counter, order
        return line.counter > least, line.counter, rows, order

    def _stays(self, entry: _Entry) -> bool:
        """Whether a resident request may not go before this one (any more)."""
        return entry.near >= self.bonus_tokens or 0 < self.quantum_tokens <= entry.far

    def _resident(
        self, line: _Line, resident: Callable[[str], bool], fits: Callable[[Waiting], bool], look: int
    ) -> tuple[_Entry | None, list[_Entry], int]:
        """The first resident request of a line that fits and may pass those ahead of it; those; how many were seen."""
        ahead, seen = list[_Entry](), 0
        for entry in line.entries.values():
            if seen >= min(look, LOOK_TENANT) or entry.again:
                break
            seen += 1
            if resident(entry.w.variant):
                return (entry, ahead, seen) if fits(entry.w) else (None, [], seen)
            if self._stays(entry):
                break
            ahead.append(entry)
        return None, [], seen


def _price(w: Waiting, *, paid: bool) -> float:
    """The most that a request may still be charged."""
    return PROMPT_PRICE * (0 if paid else w.n_prompt) + NEW_PRICE * max(0, w.max_new - w.n_done)
