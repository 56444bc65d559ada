"""The greedy loop against brute force, and what may never be broken: the budget, quotas, ties, threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plures.choice import graph, kmeans, polish, quota
from plures.choice.choose import best, in_order
from plures.choice.graph import Graph
from plures.choice.greedy import Objective, start
from plures.choice.pool import Budget, Group, Labels, Pool, Quota
from plures.core.errors import BadInput, WrongUse
from plures.tensors.rng import rng

Array = np.ndarray[Any, Any]


def rows_of(n: int, d: int = 16, seed: int = 0, kinds: int = 8) -> Array:
    r = np.random.default_rng(seed)
    return kmeans.unit(r.normal(size=(kinds, d))[r.integers(kinds, size=n)] + 0.4 * r.normal(size=(n, d)))


def dense(g: Graph) -> Array:
    """The graph's matrix, ones on the diagonal."""
    out = np.eye(g.n)
    for i in range(g.n):
        out[i, g.index[g.start[i] : g.start[i + 1]]] = g.near[g.start[i] : g.start[i + 1]]
    return out


def brute(n: int, k: int, value: Any) -> list[int]:
    """Plain greedy: of equal rows the first."""
    chosen: list[int] = []
    for _ in range(k):
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: (round(value([*chosen, i]) - value(chosen), 9), -i)))
    return chosen


@pytest.mark.parametrize("kind", ["cover", "concave", "log", "cut", "all"])
def test_the_lazy_loop_is_plain_greedy(kind: str) -> None:
    n, k, r = 60, 12, np.random.default_rng(1)
    g = graph.build(rows_of(n), rng(0), k=10)
    S = dense(g)
    labels = Labels.of([{f"t{t}": float(1 + r.random()) for t in r.integers(9, size=3)} for _ in range(n)])
    U = np.zeros((n, len(labels.names)))
    for i in range(n):
        at = slice(labels.start[i], labels.start[i + 1])
        U[i, labels.index[at]] = labels.value[at]
    q = r.random(n)

    def cover(c: list[int]) -> float:
        return float(S[:, c].max(1).sum()) if c else 0.0

    def concave(c: list[int]) -> float:
        return float((U[c].sum(0) ** 0.8).sum())

    def cut(c: list[int]) -> float:
        T = S - np.eye(n)
        return float(S.sum(0)[c].sum() - 0.4 * T[np.ix_(c, c)].sum())

    made = {
        "cover": (Objective(n, graph=g, cover=1.0), cover),
        "concave": (Objective(n, labels=labels, concave=1.0, power=0.8), concave),
        "log": (Objective(n, labels=labels, concave=1.0, power=0.0), lambda c: float(np.log1p(U[c].sum(0)).sum())),
        "cut": (Objective(n, graph=g, apart=0.4, modular=S.sum(0)), cut),
        "all": (Objective(n, graph=g, cover=0.6, labels=labels, concave=0.3, power=0.8, modular=q),
                lambda c: 0.6 * cover(c) + 0.3 * concave(c) + float(q[c].sum())),
    }  # fmt: skip
    objective, value = made[kind]
    got = best(Pool(n), objective, Budget(rows=k))
    assert got.rows.tolist() == brute(n, k, value)
    assert got.value == pytest.approx(value(got.rows.tolist()), rel=1e-6)
    assert objective.value(got.rows) == pytest.approx(got.value, rel=1e-9)


def test_the_bound_is_one() -> None:
    """No three rows of a small pool are worth more than the bound."""
    from itertools import combinations

    n = 18
    g = graph.build(rows_of(n, seed=3), rng(0), k=6)
    objective = Objective(n, graph=g, cover=1.0)
    got = best(Pool(n), objective, Budget(rows=3))
    top = max(objective.value(np.array(c)) for c in combinations(range(n), 3))
    assert got.value <= top <= got.bound + 1e-6
    assert (1 - 1 / np.e) * top <= got.value and 0 < got.certificate <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30))
def test_quotas_are_exact_and_the_budget_too(seed: int, k: int) -> None:
    r, n = np.random.default_rng(seed), 80
    pool = Pool(n, groups={"a": Group.of(r.integers(3, size=n)), "b": Group.of(r.integers(4, size=n))})
    least, most = int(r.integers(0, k // 2 + 1)), int(r.integers(k // 2, k + 1))
    quotas = (Quota("a", "0", least=least), Quota("b", "1", most=most), Quota("b", "2", least=0.1, most=0.5))
    objective = Objective(n, graph=graph.build(rows_of(n, seed=seed), rng(0), k=8), cover=1.0)
    got, error = None, None
    try:
        got = best(pool, objective, Budget(rows=k, quotas=quotas), swaps=2)
    except WrongUse as raised:
        error = raised
    if got is None:
        there = np.array([[((pool.groups["a"].codes == i) & (pool.groups["b"].codes == j)).sum() for j in range(4)]
                          for i in range(3)])  # fmt: skip
        low, high = int(np.ceil(round(0.1 * k, 9))), int(np.floor(round(0.5 * k, 9)))
        ok = any(
            _feasible(there, k, least, most, b2, b1) for b2 in range(low, high + 1) for b1 in range(most + 1)
        )  # fmt: skip
        assert not ok, error
        return
    assert len(got.rows) == len(set(got.rows.tolist())) == k
    a, b = pool.groups["a"].codes[got.rows], pool.groups["b"].codes[got.rows]
    assert (a == 0).sum() >= least and (b == 1).sum() <= most
    assert 0.1 * k - 1e-9 <= (b == 2).sum() <= 0.5 * k + 1e-9


def _feasible(there: Array, k: int, least: int, most: int, b2: int, b1: int) -> bool:
    """Whether k rows with `b1` of b = 1, `b2` of b = 2 and at least `least` of a = 0 exist."""
    cols = there.sum(0)
    if b1 > min(cols[1], most) or b2 > cols[2]:
        return False
    rest = k - b1 - b2
    if not 0 <= rest <= cols[0] + cols[3]:
        return False
    most_a0 = min(there[0, 1], b1) + min(there[0, 2], b2) + min(there[0, 0] + there[0, 3], rest)
    return bool(most_a0 >= least)


def test_quotas_cost_little_of_the_value() -> None:
    n = 400
    g = graph.build(rows_of(n, seed=5, kinds=20), rng(0), k=32)
    pool = Pool(n, groups={"a": Group.of(np.arange(n) % 4)})
    objective = Objective(n, graph=g, cover=1.0)
    free = best(pool, objective, Budget(rows=40))
    even = best(pool, objective, Budget(rows=40, quotas=tuple(Quota("a", str(i), 10, 10) for i in range(4))))
    assert np.bincount(pool.groups["a"].codes[even.rows]).tolist() == [10] * 4
    assert even.value > 0.97 * free.value


def test_swaps_improve_and_stop_at_a_local_best() -> None:
    n = 150
    g = graph.build(rows_of(n, seed=2, kinds=12), rng(0), k=149)
    S = np.maximum(dense(g), 0)
    objective = Objective(n, graph=g, cover=1.0)
    plain = best(Pool(n), objective, Budget(rows=10))
    better = best(Pool(n), objective, Budget(rows=10), swaps=20)
    assert better.value >= plain.value

    def value(c: list[int]) -> float:
        return float(S[:, c].max(1).sum())

    rows = better.rows.tolist()
    assert better.value == pytest.approx(value(rows), rel=1e-6)
    for p in range(10):
        for c in range(n):
            if c not in rows:
                assert value([*rows[:p], c, *rows[p + 1 :]]) <= better.value + 1e-3
    X = rows_of(n, seed=2, kinds=12)
    begun = np.arange(10)
    refreshed = polish.refresh(X, begun, np.zeros(n, np.int32), np.zeros(n, bool), 9)
    near = kmeans.assign(X, X[refreshed])  # each is the medoid of its cluster: no member has a larger sum of cosines
    for p, row in enumerate(refreshed):
        mine = X[near == p]
        assert (mine @ mine.sum(0)).max() <= X[row] @ mine.sum(0) + 1e-5
    cell = np.arange(n) % 2
    held = polish.refresh(X, begun, cell, np.arange(n) == 3, 9)
    assert (cell[held] == cell[begun]).all() and held[3] == 3 and len(set(held.tolist())) == 10
    got, made = polish.swap(g, np.arange(10), np.zeros(n, np.int32), np.zeros(n, bool), 50)
    assert made > 0 and len(set(got.tolist())) == 10 and value(got.tolist()) > value(list(range(10)))


def test_swaps_by_exact_cosines_count_every_pair_that_decides() -> None:
    n, k = 700, 25
    X = rows_of(n, seed=8, kinds=30)
    X[350:380] = X[:30]  # rows that are there twice, chosen ones among them
    S = np.maximum(X.astype(np.float64) @ X.T, 0)
    begun = np.concatenate([np.arange(24), [350]])
    g = polish.around(X, begun, lists=k)
    assert g is not None
    two = -np.sort(-S[:, begun], axis=1)[:, 1]
    of = np.repeat(np.arange(n), np.diff(g.start))
    np.testing.assert_allclose(g.near, S[of, g.index], atol=1e-6)
    held = np.zeros((n, n), bool)
    held[of, g.index] = True
    asked = (two[:, None] + 1e-6 < S) & ~np.eye(n, dtype=bool)
    asked[:, begun] = False
    assert held[asked].all() and (held == held.T).all()
    cell, fixed = (np.arange(n) % 2).astype(np.int32), np.arange(n) == 3
    sparse = graph.build(X, rng(0), k=8)
    values = [S[:, begun].max(1).sum()]
    for rounds in (1, 2, 20):
        got = polish.exact(X, sparse, begun, cell, fixed, 50, rounds)
        assert len(set(got.tolist())) == k and (cell[got] == cell[begun]).all() and got[3] == 3
        values.append(S[:, got].max(1).sum())
    assert values[0] < values[1] - 1 and values[1] <= values[2] + 1e-6 and values[2] <= values[3] + 1e-6
    assert values[3] >= S[:, polish.exact(None, sparse, begun, cell, fixed, 50, 9)].max(1).sum()


def test_what_is_included_excluded_and_apart() -> None:
    n = 120
    X = rows_of(n, seed=4)
    X[60:] = X[:60]  # every row twice
    pool = Pool(n, features=X, graph=graph.build(X, rng(0), k=20))
    assert pool.graph is not None
    objective = Objective(n, graph=pool.graph, cover=1.0)
    budget = Budget(rows=20, include=np.array([7, 3]), exclude=np.array([5, 65]), apart=0.999)
    got = best(pool, objective, budget)
    assert got.rows[:2].tolist() == [7, 3] and not {5, 65} & set(got.rows.tolist())
    sims = X[got.rows] @ X[got.rows].T - np.eye(20)
    assert sims.max() < 0.999
    with pytest.raises(WrongUse, match=r"only .* rows can be chosen with a cosine below"):
        best(pool, objective, Budget(rows=100, apart=0.999))
    for wrong in (Budget(rows=121), Budget(rows=5, include=np.array([1]), exclude=np.array([1])),
                  Budget(rows=1, include=np.array([1, 2])), Budget(rows=1, include=np.array([120]))):  # fmt: skip
        with pytest.raises(WrongUse):
            best(pool, objective, wrong)


def test_a_budget_of_tokens_is_not_exceeded_and_nearly_spent() -> None:
    r, n = np.random.default_rng(0), 300
    cost = r.integers(1, 40, n)
    pool = Pool(n, cost=cost, groups={"a": Group.of(np.arange(n) % 3)})
    objective = Objective(n, graph=graph.build(rows_of(n), rng(0), k=20), cover=1.0)
    got = best(pool, objective, Budget(tokens=500))
    assert 500 - cost.min() < cost[got.rows].sum() <= 500
    quotas = (Quota("a", "0", least=0.5), Quota("a", "1", most=60))
    got = best(pool, objective, Budget(tokens=500, quotas=quotas))
    of = {a: int(cost[got.rows][pool.groups["a"].codes[got.rows] == a].sum()) for a in range(3)}
    assert of[0] >= 250 and of[1] <= 60 and 460 < sum(of.values()) <= 500
    with pytest.raises(WrongUse, match="needs cost"):
        best(Pool(5), Objective(5, modular=np.ones(5)), Budget(tokens=3))


def test_a_quota_that_cannot_be_met_says_why() -> None:
    pool = Pool(10, groups={"a": Group.of([0] * 3 + [1] * 7)})
    ask = Objective(10, modular=np.ones(10))
    for quotas, why in (
        ((Quota("a", "0", least=4),), "at least 4 rows of a=0 are asked for, and the pool has 3"),
        ((Quota("a", "1", most=1),), "leave at most 4 rows, and the budget is 6"),
        ((Quota("a", "0", 3), Quota("a", "1", 4)), "at least 7 rows together, and the budget is 6"),
        ((Quota("a", "0", 3, 2),), "contradict each other"),
        ((Quota("a", "0", 1.5),), "neither a count nor a share"),
    ):
        with pytest.raises(WrongUse, match=why):
            best(pool, ask, Budget(rows=6, quotas=quotas))
    with pytest.raises(WrongUse, match="no group column 'b'"):
        best(pool, ask, Budget(rows=6, quotas=(Quota("b", "0", 1),)))
    with pytest.raises(BadInput, match="no row has a = '2'"):
        best(pool, ask, Budget(rows=6, quotas=(Quota("a", "2", 1),)))


def test_an_order_is_followed_as_far_as_the_budget_allows() -> None:
    pool = Pool(8, groups={"a": Group.of([0, 0, 0, 0, 1, 1, 1, 1])})
    order = np.array([3, 1, 0, 2, 7, 5, 4, 6])
    assert in_order(pool, order, Budget(rows=3)).rows.tolist() == [3, 1, 0]
    some = in_order(pool, order, Budget(rows=4, quotas=(Quota("a", "1", least=2),)))
    assert sorted(some.rows.tolist()) == [1, 3, 5, 7]
    assert in_order(pool, order[:5], Budget(rows=5), weights=np.arange(8.0)).weights is not None
    with pytest.raises(WrongUse, match="the budget is 6 rows, and the pool has 5"):
        in_order(pool, order[:5], Budget(rows=6))


def test_the_graph_finds_the_nearest() -> None:
    X = rows_of(6000, d=24, kinds=60, seed=7)
    S = X @ X.T
    np.fill_diagonal(S, -9)
    want = np.argsort(-S, axis=1, kind="stable")[:, :16]
    index, near = graph.nearest(X[:3000], 16, rng(0))  # small: all with all
    exact = S[:3000, :3000]
    np.testing.assert_allclose(near, -np.sort(-exact, axis=1)[:, :16], atol=1e-6)
    assert (np.take_along_axis(exact, index.astype(int), 1) >= near - 1e-6).all()
    index, near = graph.nearest(X, 16, rng(0), probes=12)
    found = np.mean([len(set(a) & set(b)) / 16 for a, b in zip(index, want, strict=True)])
    assert found > 0.9
    again, _ = graph.nearest(X, 16, rng(0), probes=12, threads=3)
    assert np.array_equal(index, again)
    worst, holds = near[:, -1], [set(row.tolist()) for row in index]
    for i in range(6000):  # what i holds as near holds i too, or sixteen rows that are no farther
        assert all(i in holds[j] or v <= worst[j] for j, v in zip(index[i], near[i], strict=True))


def test_the_graph_has_every_edge_both_ways_once() -> None:
    X = rows_of(500, seed=9)
    index, near = graph.nearest(X, 5, rng(0))
    g = graph.undirected(index, near)
    of = np.repeat(np.arange(500), np.diff(g.start))
    edges = {(int(i), int(j)): float(v) for i, j, v in zip(of, g.index, g.near, strict=True)}
    assert len(edges) == len(g.index)
    assert all(edges[j, i] == v and i != j and v > 0 for (i, j), v in edges.items())
    assert set(edges) == {(i, int(j)) for i in range(500) for a, j in enumerate(index[i]) if near[i, a] > 0} | {
        (int(j), i) for i in range(500) for a, j in enumerate(index[i]) if near[i, a] > 0
    }
    few = graph.build(X[:3], rng(0), k=64)
    assert few.n == 3 and len(graph.build(X[:1], rng(0)).index) == 0


def test_clusters_and_cells() -> None:
    X = rows_of(900, kinds=6, seed=11)
    centroids = kmeans.kmeans(X, 6, rng(1), 20)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)
    cluster = kmeans.assign(X, centroids)
    near = X @ centroids.T
    assert (np.take_along_axis(near, cluster[:, None].astype(int), 1)[:, 0] >= near.max(1) - 1e-6).all()
    pool = Pool(4, groups={"a": Group.of(["x", "y", "x", "y"]), "b": Group.of([1, 1, 2, 2])})
    made = quota.cells(pool, [Quota("a", "x"), Quota("b", "2")])
    assert made.number == 4 and made.counts_for.sum(1).tolist() == [2, 2]
    assert start(Objective(4, cover=1.0)).best.shape == (4,)
