"""The Vendi score and its greedy choice against the eigenvalues of the whole kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.linalg import eigvalsh

from picked import Pick, pool
from plures.choice import vendi
from plures.choice.pool import Budget
from plures.core.errors import RecipeErrors, WrongUse
from plures.select import selects
from plures.tensors.rng import rng


def it_is_greedy_on_the_score_of_order_2() -> None:
    of = pool(90)
    assert of.features is not None
    X = np.asarray(of.features, np.float64)

    def score(c: list[int]) -> float:
        p = eigvalsh(X[c] @ X[c].T / len(c))
        return float(1 / np.square(p).sum())

    got = selects.make("vendi").choose(of, Budget(rows=30), rng(0))
    chosen = [int(got.rows[0])]  # one row has the score 1, whichever it is
    while len(chosen) < 30:
        worth = [score([*chosen, i]) if i not in chosen else -np.inf for i in range(90)]
        chosen.append(int(np.argmax(np.round(worth, 10))))
    assert got.rows.tolist() == chosen
    np.testing.assert_allclose(np.cumsum(got.gains), [score(chosen[: i + 1]) for i in range(30)], rtol=1e-6)
    assert got.report["vendi"] == {f"{q:g}": s for q, s in vendi.scores(of.features, got.rows).items()}
    np.testing.assert_allclose(got.report["vendi"]["2"], score(chosen), rtol=1e-6)


def it_is_greedy_on_the_score_of_every_order() -> None:
    of = pool(80, d=10)
    assert of.features is not None
    X = np.asarray(of.features, np.float64)
    X /= np.linalg.norm(X, axis=1)[:, None]
    for q in (0.1, 0.5, 1, 1.5, 2.5, 8, "inf"):
        got = selects.make("vendi", q=q).choose(of, Budget(rows=24), rng(0))
        for k in (1, 4, 9, 11, 23):  # below, at and above as many as the vectors are wide
            chosen = got.rows[:k].tolist()
            left = [i for i in range(80) if i not in chosen]
            worth = {i: by_kernel(X[[*chosen, i]], q) for i in left}
            assert worth[int(got.rows[k])] >= max(worth.values()) * (1 - 1e-9), (q, k)
        np.testing.assert_allclose(got.value, by_kernel(X[got.rows], q), rtol=1e-9)
        named = f"{float(q):g}"
        np.testing.assert_allclose(got.report["vendi"][named], got.value, rtol=1e-5)
        assert got.report["computed"] < 24 * 80
    both = (selects.make("vendi", q=q).choose(of, Budget(rows=24), rng(0)).rows.tolist() for q in (1.9999999, 2))
    assert len(set(next(both)) & set(next(both))) == 24
    for wrong in (0, -1, 101, "two", float("inf")):
        with pytest.raises((WrongUse, RecipeErrors), match=r"vendi\.q must be"):
            selects.make("vendi", q=wrong)


def by_kernel(X: np.ndarray[Any, Any], q: float | str) -> float:
    """The definition, on the whole kernel."""
    p = eigvalsh(X @ X.T / len(X))
    p = p[p > 1e-13]
    if q == "inf":
        return float(1 / p.max())
    if q == 1:
        return float(np.exp(-(p * np.log(p)).sum()))
    return float((p ** float(q)).sum() ** (1 / (1 - float(q))))


def both_oracles() -> None:
    it_is_greedy_on_the_score_of_order_2()
    it_is_greedy_on_the_score_of_every_order()


ROW = Pick({}, both_oracles, variants=({"q": 0.5}, {"q": 1.0}, {"q": 5.0}, {"q": "inf"}))
