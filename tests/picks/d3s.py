"""D3S against all subsets of small batches and of every prompt."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from picked import Pick, pool
from plures.choice.pool import Budget, Group, Pool
from plures.core.errors import WrongUse
from plures.select import selects
from plures.tensors.rng import rng


def advantages(of: Pool) -> dict[int, float]:
    """Prompt by prompt, as GRPO has it."""
    r, made = of.scores["reward"], {}
    for p in set(of.groups["prompt"].codes.tolist()):
        rows = np.flatnonzero(of.groups["prompt"].codes == p)
        sd = np.std(r[rows])
        made |= {int(i): float((r[i] - np.mean(r[rows])) / sd) if sd > 1e-9 else 0.0 for i in rows}
    return made


def small(seed: int, binary: bool) -> Pool:
    r = np.random.default_rng(seed)
    reward = (r.random(13) < 0.4).astype(float) if binary else r.exponential(size=13)
    return Pool(13, scores={"reward": reward}, groups={"prompt": Group.of([0] * 5 + [1] * 3 + [2] * 4 + [3])})


def most(values: dict[int, float], rows: list[int], size: int) -> float:
    return max(float(np.var([values[i] for i in some])) for some in combinations(rows, size))


def of_all_subsets_it_takes_one_of_most_variance() -> None:
    for seed in range(12):
        of = small(seed, seed % 2 == 0)
        a = advantages(of)
        for size in (1, 2, 3, 5, 8, 12, 13):
            rows = selects.make("d3s").choose(of, Budget(rows=size), rng(0)).rows.tolist()
            np.testing.assert_allclose(np.var([a[i] for i in rows]), most(a, list(range(13)), size), atol=1e-12)
        raw = dict(enumerate(of.scores["reward"].tolist()))
        rows = selects.make("d3s", normal=False).choose(of, Budget(rows=4), rng(0)).rows.tolist()
        np.testing.assert_allclose(np.var([raw[i] for i in rows]), most(raw, list(range(13)), 4), atol=1e-12)


def of_every_prompt_it_takes_its_most_varied() -> None:
    for seed in range(12):
        of = small(seed, seed % 2 == 0)
        a, codes = advantages(of), of.groups["prompt"].codes
        for m in (2, 3, 4):
            kept = [min(m, int((codes == p).sum())) for p in range(4)]
            got = selects.make("d3s", m=m, across="prompt").choose(of, Budget(rows=13), rng(0)).rows
            first, worth = got[: sum(kept)], []
            for p in range(4):
                mine = np.flatnonzero(codes == p).tolist()
                worth.append(most(a, mine, kept[p]))
                np.testing.assert_allclose(np.var([a[i] for i in first if codes[i] == p]), worth[p], atol=1e-12)
            along = [worth[p] for p in codes[first]]
            assert all(x >= y - 1e-12 for x, y in pairwise(along))
            assert len([1 for x, y in pairwise(codes[first]) if x != y]) == 3  # together
            chosen = [int(i) for i in first]
            for size in (2, 4):
                rows = selects.make("d3s", m=m).choose(of, Budget(rows=size), rng(0)).rows.tolist()
                assert len({a[i] for i in rows} - {a[i] for i in chosen}) == 0
                np.testing.assert_allclose(np.var([a[i] for i in rows]), most(a, chosen, size), atol=1e-12)


def the_rest_lowers_the_variance_least() -> None:
    of = small(3, False)
    a = advantages(of)
    rows = selects.make("d3s").choose(of, Budget(rows=4, exclude=np.zeros(0, np.int64)), rng(0)).rows.tolist()
    first = selects.make("d3s").choose(of, Budget(rows=4, exclude=np.array(rows[:1])), rng(0)).rows.tolist()
    assert set(rows[1:]) < set(first) and len(first) == 4  # one is out, and the next best takes its place
    (new,) = set(first) - set(rows)
    left = [i for i in range(13) if i not in rows]
    assert np.var([a[i] for i in (*rows, new)]) >= max(np.var([a[i] for i in (*rows, j)]) for j in left) - 1e-12


def equal_rewards_have_no_advantage_and_lower_rows_are_first() -> None:
    of = Pool(6, scores={"reward": np.array([1, 1, 1, 0, 0.0, 1])},
              groups={"prompt": Group.of(["a", "a", "a", "b", "b", "b"])})  # fmt: skip
    assert selects.make("d3s").choose(of, Budget(rows=2), rng(0)).rows.tolist() == [5, 3]
    assert set(selects.make("d3s").choose(of, Budget(rows=3), rng(0)).rows.tolist()) == {3, 4, 5}
    assert selects.make("d3s", normal=False).choose(of, Budget(rows=4), rng(0)).rows.tolist() == [0, 3, 4, 1]
    flat = Pool(4, scores={"reward": np.full(4, 0.1)}, groups={"prompt": Group.of("aaaa")})
    assert selects.make("d3s").choose(flat, Budget(rows=3), rng(0)).rows.tolist() == [0, 1, 2]


def tokens_are_filled() -> None:
    of = pool()
    a = advantages(of)
    assert of.cost is not None
    rows = selects.make("d3s").choose(of, Budget(tokens=1500), rng(0)).rows
    many = selects.make("d3s").choose(of, Budget(rows=len(rows)), rng(0)).rows.tolist()
    assert np.var([a[i] for i in rows]) > 0.9 * np.var([a[i] for i in many])


def d3s() -> None:
    of_all_subsets_it_takes_one_of_most_variance()
    of_every_prompt_it_takes_its_most_varied()
    the_rest_lowers_the_variance_least()
    equal_rewards_have_no_advantage_and_lower_rows_are_first()
    tokens_are_filled()
    wrong = (({"m": 1}, "at least 2"), ({"across": "x"}, r"'batch' \| 'prompt'"), ({"across": "prompt"}, "m"))
    for options, text in wrong:
        with pytest.raises(WrongUse, match=text):
            selects.make("d3s", **options)


ROW = Pick(
    options={},
    variants=({"m": 4}, {"m": 3, "across": "prompt"}, {"advantage": "quality", "normal": False}),
    oracle=d3s,
    gaps={"nested": "the subset of most variance of 12 rows need not be part of that of 30"},
)
