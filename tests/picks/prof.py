"""PROF against what the authors' code keeps, and against dropping one by one as the paper says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from picked import Pick, permuted, pool
from plures.choice.pool import Budget, Group, Pool
from plures.core.errors import WrongUse
from plures.select import selects
from plures.tensors.rng import rng

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "prof_authors.json").read_text())


def kept(process: list[float], correct: list[int], drop: int) -> tuple[list[int], int]:
    """Places of the rollouts of one prompt that stay, and how many of them are correct."""
    good = sorted((i for i, c in enumerate(correct) if c), key=lambda i: -process[i])
    bad = sorted((i for i, c in enumerate(correct) if not c), key=lambda i: process[i])
    for _ in range(drop):
        (good if len(good) > len(bad) else bad).pop()
    return sorted(good + bad), len(good)


def it_keeps_what_the_authors_code_keeps() -> None:
    of = Pool(len(GOLDEN["prompt"]), groups={"prompt": Group.of(GOLDEN["prompt"])},
              scores={k: np.array(GOLDEN[k], np.float64) for k in ("correct", "process")})  # fmt: skip
    for run in GOLDEN["runs"]:
        many = 8 * (8 - run["removed"])
        rows = selects.make("prof", process="process").choose(of, Budget(rows=many), rng(0)).rows
        assert sorted(rows.tolist()) == run["kept"]


def sides_are_balanced_by_dropping_what_contradicts() -> None:
    r = np.random.default_rng(1)
    sizes = [9, 6, 4, 1, 7]
    codes = r.permutation(np.repeat(np.arange(5), sizes))
    process, correct = r.random(27), (r.random(27) < 0.6).astype(np.float64)
    of = Pool(27, groups={"prompt": Group.of(codes)}, scores={"reward": process, "correct": correct})
    order = selects.make("prof").choose(of, Budget(rows=27), rng(0)).rows
    mean = process.mean()
    agrees = np.where(correct == 1, process - mean, mean - process)
    at = 0
    for m in range(1, 10):  # after m rounds, each prompt keeps m
        now = order[at : at + sum(s >= m for s in sizes)]
        assert (np.diff(agrees[now]) <= 0).all()
        at += len(now)
        for p, size in enumerate(sizes):
            mine = np.flatnonzero(codes == p)
            got = sorted(order[:at][codes[order[:at]] == p].tolist())
            want, good = kept(process[mine].tolist(), correct[mine].tolist(), max(size - m, 0))
            assert len(got) == min(m, size)
            if 2 * good == len(want) or good == correct[mine].sum() or good == len(want) - (correct[mine] == 0).sum():
                assert got == mine[want].tolist()
            else:
                assert abs(2 * correct[got].sum() - len(got)) <= 1  # an odd number: either side may have one more


def incorrect_ones_may_be_dropped_at_random() -> None:
    n = 12
    of = Pool(n, groups={"prompt": Group.of([0] * n)},
              scores={"reward": np.arange(n) / n, "correct": np.arange(n) % 2.0})  # fmt: skip
    made = selects.make("prof", filter="correct")
    taken = np.zeros(n)
    for seed in range(300):
        taken[made.choose(of, Budget(rows=6), rng(seed, "p")).rows] += 1
    assert taken[1::2].tolist() == [0, 0, 0, 300, 300, 300]
    assert taken[::2].sum() == 900 and taken[::2].std() < 2 * (300 / 4) ** 0.5
    assert sorted(selects.make("prof").choose(of, Budget(rows=6), rng(0)).rows.tolist()) == [0, 2, 4, 7, 9, 11]


def rows_may_be_in_any_order() -> None:
    of, order = pool(), np.random.default_rng(5).permutation(160)
    for k in (20, 33, 80):
        rows = selects.make("prof").choose(of, Budget(rows=k), rng(0)).rows
        moved = selects.make("prof").choose(permuted(of, order), Budget(rows=k), rng(0)).rows
        assert order[moved].tolist() == rows.tolist()


def prof() -> None:
    it_keeps_what_the_authors_code_keeps()
    sides_are_balanced_by_dropping_what_contradicts()
    incorrect_ones_may_be_dropped_at_random()
    rows_may_be_in_any_order()
    with pytest.raises(WrongUse, match=r"'both' \| 'correct', got 'incorrect'"):
        selects.make("prof", filter="incorrect")
    with pytest.raises(WrongUse, match="0 or 1"):
        selects.make("prof", correct="reward").choose(pool(), Budget(rows=3), rng(0))


ROW = Pick(
    options={},
    variants=({"filter": "correct"}, {"process": "quality"}),
    oracle=prof,
    gaps={"permute": "filter: correct draws places; for filter: both the oracle has this test"},
)
