"""PROF (Ye et al., 2025): correct rollouts that were reasoned well, and as many incorrect ones that were not."""

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
    paper="arXiv:2509.03403",
    title="Beyond Correctness: Harmonizing Process and Outcome Rewards through RL Training",
    status="trial",
    when="Rollouts with a verifier's verdict and a process reward model's scores, for GRPO and its like; `filter: "
    "correct` where that model is weak or was trained on other data. It does not prefer one prompt to another.",
)
@dataclass(frozen=True)
class Prof:
    """Of each prompt's rollouts those whose process reward contradicts the verdict are dropped, sides kept balanced.

        of n rollouts, n+ correct and n- incorrect, r are dropped:  round((n+ - n- + r) / 2) correct ones, of lowest
        process reward, and the others incorrect ones, of highest process reward

    as far as r reaches: only the larger side is dropped from until both are equal. The order here deals every prompt's
    last rollout to be dropped, then every prompt's last but one, and so on; of one round, first those farthest from the
    mean process reward in the right direction. With m times as many rows as prompts, each gives its m.

    Options:
        prompt: the group column of prompts.
        correct: the column of verdicts, 1 or 0.
        process: the column of process rewards, of each rollout the mean over its steps.
        filter: both, or correct: there the incorrect ones are dropped at random.

    Raises: WrongUse for another filter, a verdict that is not 0 or 1, or a pool without those columns.
    Paper: arXiv:2509.03403, the text not at hand beyond its abstract: the numbers that are dropped, and that halves are
        rounded to even, are the authors' code, github.com/amazon-science/PROF-GRPO (Apache-2.0) at 8164ec2,
        prof_grpo/prof_grpo_both/prof_ray_trainer.py and its twin in prof_grpo_correct (filter_trajectories).
    Departs from the paper: it drops r rollouts of each prompt; here the budget says how many rows stay, and rounds
        share them out, so that short prompts keep as many as long ones. (The authors' code also takes 10 off what
        speaks for a rollout of fewer than 2 or more than 30 steps: put that into the column, taken from correct ones
        and added to incorrect ones.)
    """

    prompt: str = "prompt"
    correct: str = "correct"
    process: str = "reward"
    filter: Literal["both", "correct"] = "both"
    needs: ClassVar[frozenset[str]] = frozenset()
    by_group: ClassVar[frozenset[str]] = frozenset({"prompt"})
    plain: ClassVar[frozenset[str]] = frozenset({"filter"})

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The rollouts on which verdict and process agree, in rounds over the prompts."""
        codes = np.asarray(pool.group(self.prompt).codes, np.int64)
        verdict, process = pool.score(self.correct), pool.score(self.process)
        if not np.isin(verdict, (0, 1)).all():
            at = int(np.argmin(np.isin(verdict, (0, 1))))
            raise WrongUse(f"{self.correct!r} must be 0 or 1, and row {at} has {verdict[at]}")
        right = verdict == 1
        agrees = np.where(right, process - process.mean(), process.mean() - process)
        if self.filter == "correct":
            agrees = np.where(right, agrees, rng.random(pool.n))
        left = _left_when_dropped(agrees, right, codes)
        return in_order(pool, np.lexsort((np.arange(pool.n), -agrees, left)), budget)


def _left_when_dropped(agrees: Array, right: Array, codes: Array) -> Array:
    """How many rollouts of its prompt are left when a row is dropped, int64 `[n]`: 0 for the one that is never."""
    n = len(agrees)
    sizes, correct = np.bincount(codes), np.bincount(codes, right).astype(np.int64)
    start = np.cumsum(sizes) - sizes
    prompt = np.repeat(np.arange(len(sizes)), sizes)
    r = np.arange(n) - start[prompt] + 1  # every prompt's drops, flat one after the other
    # numpy rounds halves to even, as the authors' code does
    of_correct = np.round((2 * correct - sizes)[prompt] / 2 + r / 2).astype(np.int64)
    of_correct = np.clip(of_correct, 0, np.minimum(r, correct[prompt]))
    before = np.where(r == 1, 0, np.concatenate([[0], of_correct[:-1]]))
    is_correct = of_correct > before
    left = np.empty(n, np.int64)
    # the t-th drop of a side takes the t-th worst of that side; of equal rows the higher one is worse
    worst_first = np.lexsort((-np.arange(n), agrees, ~right, codes))
    drops = np.lexsort((r, ~is_correct, prompt))
    left[worst_first] = (sizes[prompt] - r)[drops]
    return left
