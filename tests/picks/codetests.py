"""B4 against the authors' scores and orders, and the beta functions by factorials over explicit matrices."""

from __future__ import annotations

import json
from itertools import pairwise
from math import lgamma
from pathlib import Path

import numpy as np
import pytest

from picked import Pick, pool
from plures.choice.pool import Budget, Group, Labels, Pool
from plures.core.errors import WrongUse
from plures.select import selects
from plures.tensors.rng import rng

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "codetests_authors.json").read_text())


def ln_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)


def b4(E: np.ndarray, i: int, alpha: float, beta: float) -> float:
    """The score of program i's pattern, with the parts of the matrix cut out."""
    same = (E[i] == E).all(1)
    mine = E[i] == 1
    one, zero = E[~same][:, mine], E[~same][:, ~mine]
    return (ln_beta(same.sum() + alpha, (~same).sum() + 1) + ln_beta(mine.sum() + alpha, (~mine).sum() + 1)
            + ln_beta(one.sum() + 1, one.size - one.sum() + 1) + ln_beta(zero.sum() + 1, zero.size - zero.sum() + beta))


def labels(matrices: list[np.ndarray], prefix: str = "p{}/") -> Labels:
    return Labels.of([{f"{prefix.format(p)}t{j}": float(x) for j, x in enumerate(row)}
                      for p, E in enumerate(matrices) for row in E])  # fmt: skip


def one(E: np.ndarray, **options: object) -> list[int]:
    of = Pool(len(E), labels=labels([E]), groups={"prompt": Group.of([0] * len(E))})
    return selects.make("codetests", **options).choose(of, Budget(rows=len(E)), rng(0)).rows.tolist()


def it_is_the_authors_order() -> None:
    for run in GOLDEN["runs"]:
        E = np.array([[int(c) for c in row] for row in run["E"]])
        for programs, score in run["order"]:
            np.testing.assert_allclose(b4(E, programs[0], run["alpha"], run["beta0"]), score, rtol=1e-9)
        got = one(E, alpha_xy=run["alpha"], beta_0=run["beta0"], tests=E.shape[1])
        place = {i: at for at, (programs, _) in enumerate(run["order"]) for i in programs}
        worth = [round(run["order"][place[i]][1], 6) for i in got]
        assert worth == sorted(worth, reverse=True)
        assert got[: len(run["order"][0][0])] == run["order"][0][0]


def problems_take_turns_with_their_best() -> None:
    r = np.random.default_rng(4)
    E = [(r.random((n, m)) < 0.5).astype(int) for n, m in ((7, 5), (4, 6), (1, 3), (9, 4))]
    E[0][:, 4] = 0  # a test that no program passes is not seen
    codes, s = np.repeat(np.arange(4), [len(e) for e in E]), r.normal(size=21)
    rows = [tuple(row) for e in E for row in e.tolist()]
    for prefix in ("p{}/", ""):  # tests with names of their own, or the same in all problems
        of = Pool(21, labels=labels(E, prefix), groups={"q": Group.of(codes)}, scores={"s": s})
        wide = [np.pad(e, ((0, 0), (0, 8 - e.shape[1]))) for e in E]
        for tests, seen in ((0, [e[:, e.any(0)] for e in E]), (8, wide)):
            passed = np.concatenate([e.mean(1) for e in seen])
            for rule, score in (("b4", lambda e, i: b4(e, i, 20, 50)),
                                ("codet", lambda e, i: (e[i] == e).all(1).sum() * e[i].sum())):  # fmt: skip
                worth = [score(e, i) for e in seen for i in range(len(e))]
                options = {"problem": "q", "rule": rule, "alpha_xy": 20.0, "beta_0": 50.0, "score": "s", "tests": tests}
                got = selects.make("codetests", **options).choose(of, Budget(rows=21), rng(0)).rows
                at = 0
                for turn in range(9):
                    now = got[at : at + sum(len(e) > turn for e in E)]
                    at += len(now)
                    assert len(set(codes[now].tolist())) == len(now) and (np.diff(passed[now]) <= 1e-12).all()
                for p in range(4):
                    mine = [int(i) for i in got if codes[i] == p]
                    assert all(worth[a] >= worth[b] - 1e-9 for a, b in pairwise(mine))
                    assert all(s[a] > s[b] for a, b in pairwise(mine) if rows[a] == rows[b])


def it_finds_right_programs_where_most_tests_do_not() -> None:
    right = most = 0
    for seed in range(60):
        r = np.random.default_rng(seed)
        x, y = r.random(10) < 0.3, r.random(30) < 0.3
        if not 0 < x.sum() < 10:
            continue
        E = np.where(x[:, None], y[None], r.random((10, 30)) < np.where(y, 0.4, 0.1)[None]).astype(int)
        right += bool(x[one(E, alpha_xy=10.0, beta_0=10.0, tests=30)[0]])
        most += bool(x[int(np.argmax(E.sum(1)))])
    assert right > most


def codetests() -> None:
    it_is_the_authors_order()
    problems_take_turns_with_their_best()
    it_finds_right_programs_where_most_tests_do_not()
    none = Pool(3, labels=Labels.of([{}, {}, {}]), groups={"prompt": Group.of("aab")})
    assert selects.make("codetests").choose(none, Budget(rows=2), rng(0)).rows.tolist() == [0, 2]
    wrong = (({"rule": "dstc"}, r"'b4' \| 'codet'"), ({"beta_0": 0.0}, "above 0"), ({"tests": -1}, "at least"))
    for options, text in wrong:
        with pytest.raises(WrongUse, match=text):
            selects.make("codetests", **options)
    with pytest.raises(WrongUse, match="programs of one problem pass"):
        selects.make("codetests", tests=1).choose(pool(), Budget(rows=3), rng(0))


ROW = Pick(
    options={"score": "quality"},
    variants=({"rule": "codet", "score": "quality"}, {"problem": "kind", "tests": 13, "score": "reward"}),
    oracle=codetests,
)
