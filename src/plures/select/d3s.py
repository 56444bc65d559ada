"""D3S (Wang et al., ICLR 2026): of many rollouts those whose advantages vary most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from plures.choice.choose import in_order
from plures.choice.pool import Budget, Pool, Selection
from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.rng import Rng

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2509.22115",
    title="Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization",
    status="trial",
    when="Rollouts of GRPO and its like, more than can be trained on, with rewards that tell them apart. Train with "
    "the advantages of all rollouts: those of the chosen ones alone differ. It sees rewards only, not the texts.",
)
@dataclass(frozen=True)
class D3s:
    """The rollouts of most variance of the advantage: some with the lowest advantages and some with the highest.

        A_i = (r_i - mean_p) / sd_p  over all rollouts of i's prompt p,    S = argmax_{|S| = N} Var(A_S)

    The best S has the k lowest and the N - k highest advantages; prefix sums of A and A^2 give the variance for every
    k at once. N is the budget: of a budget of tokens, the most rows that fit. The rows that follow are those by which
    the variance falls least: whichever of the lowest and the highest of what is left is farther from the mean.

    Options:
        prompt: the group column of prompts.
        advantage: the column of rewards, or of advantages.
        m: rollouts that are kept of each prompt first, those of most variance there; 0 for all of them. Others follow
            when those are used up.
        across: batch, where S is of all prompts at once, or prompt, where a prompt gives its m rollouts together, the
            prompt with the most variance among them first.
        normal: whether advantages are made within prompts as above; false takes the column as it is.

    Raises: WrongUse for options out of range, or a pool without those columns.
    Paper: Sections 3.1 to 3.3, from public summaries of the paper, whose text was not at hand beyond its abstract; no
        public code was found. That a set of most variance is a prefix and a suffix is proved for PODS,
        arXiv:2504.13818.
    Departs from the paper: its second level, the share of tokens by |A_t| H_t within a rollout, is no choice of rows
        and is left out, and so is the schedule, which raises N with training: give budgets that grow. Summaries leave
        open whether S is of all rollouts or of m of each prompt: both are here. `across: prompt` is our order for the
        paper's choice within prompts. Where all rewards of a prompt are equal, A is 0.
    """

    prompt: str = "prompt"
    advantage: str = "reward"
    m: int = 0
    across: Literal["batch", "prompt"] = "batch"
    normal: bool = True
    needs: ClassVar[frozenset[str]] = frozenset()
    by_group: ClassVar[frozenset[str]] = frozenset({"prompt"})
    plain: ClassVar[frozenset[str]] = frozenset({"across"})

    def __post_init__(self) -> None:
        if self.m < 0 or self.m == 1:
            raise WrongUse(f"d3s.m must be 0 or at least 2, got {self.m}: one rollout has no variance")
        if self.across == "prompt" and not self.m:
            raise WrongUse("d3s.across is prompt, which needs m: say how many rollouts a prompt gives")

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The rollouts of most variance, then those that lower it least."""
        codes = np.asarray(pool.group(self.prompt).codes, np.int64)
        a = _within(pool.score(self.advantage), codes) if self.normal else pool.score(self.advantage)
        if not self.m:
            return in_order(pool, _batch(a, np.arange(pool.n), pool, budget), budget)
        kept, variance = _of_groups(a, codes, self.m)
        if self.across == "batch":
            rows = np.flatnonzero(kept)
            order = np.concatenate([_batch(a, rows, pool, budget), _batch(a, np.flatnonzero(~kept), pool, budget)])
        else:
            # first the m rollouts of each prompt, then the others in the same order of prompts, the outermost first
            first = np.full(int(codes.max()) + 1, pool.n)
            np.minimum.at(first, codes, np.arange(pool.n))
            order = np.lexsort((np.arange(pool.n), -np.abs(a), first[codes], -variance[codes], ~kept))
        return in_order(pool, order, budget)


def _within(r: Array, codes: Array) -> Array:
    """Rewards less their mean within groups, over their standard deviation (of the group, not of a sample)."""
    count = np.maximum(np.bincount(codes), 1)
    centred = r - (np.bincount(codes, r) / count)[codes]
    deviation = np.sqrt(np.bincount(codes, centred**2) / count)[codes]
    scale = np.bincount(codes, np.abs(r))[codes] / count[codes]
    return np.where(deviation > 1e-12 * scale, centred / np.maximum(deviation, 1e-300), 0.0)


def _of_groups(a: Array, codes: Array, m: int) -> tuple[Array, Array]:
    """Of each group its m rows of most variance, bool `[n]`, and that variance, `[groups]`; all where there are fewer.

    Every group has m + 1 splits, flat one after the other: k of its lowest and m - k of its highest.
    """
    n = len(a)
    sizes = np.bincount(codes)
    start = np.cumsum(sizes) - sizes
    low = np.lexsort((np.arange(n), a, codes))  # of equal rows the lower one is lower
    high = np.lexsort((np.arange(n), -a, codes))  # and higher, too
    centred = (a - (np.bincount(codes, a) / np.maximum(sizes, 1))[codes])[low]
    sums = [np.concatenate([[0.0], np.cumsum(centred**power)]) for power in (1, 2)]
    kept = np.minimum(sizes, m)
    group = np.repeat(np.arange(len(sizes)), kept + 1)
    k = np.arange(len(group)) - np.repeat(np.cumsum(kept + 1) - kept - 1, kept + 1)
    begin, end, many = start[group], (start + sizes)[group], np.maximum(kept[group], 1)
    mean, square = ((s[begin + k] - s[begin] + s[end] - s[end - kept[group] + k]) / many for s in sums)
    variance = np.maximum(square - mean**2, 0)
    best = np.lexsort((k, -variance, group))[np.cumsum(kept + 1) - kept - 1]
    place = np.empty(n, np.int64)
    place[high] = np.arange(n) - start[codes[high]]
    chosen = place < (kept - k[best])[codes]
    rest = low[~chosen[low]]  # a row of equal ones may be among both; the next low one is then as good
    left = np.bincount(codes[rest], minlength=len(sizes))
    at = np.arange(len(rest)) - (np.cumsum(left) - left)[codes[rest]]
    chosen[rest[at < k[best][codes[rest]]]] = True
    return chosen, variance[best]


def _batch(a: Array, rows: Array, pool: Pool, budget: Budget) -> Array:
    """These rows in an order that begins with the N of most variance, N what the budget allows."""
    if not len(rows):
        return rows
    part, one = a[rows], np.zeros(len(rows), np.int64)
    if budget.rows is not None:
        chosen = _of_groups(part, one, budget.rows)[0]
    else:
        cost = np.asarray(pool.need("cost"))[rows]
        fits, over = 0, len(rows) + 1  # the most rows that fit lie between
        chosen = np.zeros(len(rows), bool)
        while over - fits > 1:
            middle = (fits + over) // 2
            now = _of_groups(part, one, middle)[0]
            if cost[now].sum() <= budget.limit:
                fits, chosen = middle, now
            else:
                over = middle
    head, total = _outwards(part, np.flatnonzero(chosen), 0.0, 0)
    tail, _ = _outwards(part, np.flatnonzero(~chosen), total, len(head))
    return np.asarray(rows[head + tail])


def _outwards(a: Array, some: Array, total: float, count: int) -> tuple[list[int], float]:
    """These, at each step the lowest or the highest left, whichever is farther from the mean of what was taken.

    `count` of sum `total` were taken before. Of equal ones the lower is taken. Returns the order and the sum.
    """
    low, high = (some[np.lexsort((some, sign * a[some]))].tolist() for sign in (1, -1))
    value, taken, out = a.tolist(), bytearray(len(a)), list[int]()
    lo, hi = 0, 0
    while len(out) < len(low):
        while taken[low[lo]]:
            lo += 1
        while taken[high[hi]]:
            hi += 1
        mean = total / count if count else 0.0
        at = low[lo] if mean - value[low[lo]] >= value[high[hi]] - mean else high[hi]
        taken[at] = 1
        out.append(at)
        total, count = total + value[at], count + 1
    return out, total
