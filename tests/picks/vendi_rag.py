"""Vendi-RAG's mixture against the formula on every row, choice by choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.linalg import eigvalsh

from picked import Pick, pool
from plures.choice.pool import Budget
from plures.core.errors import WrongUse
from plures.select import selects
from plures.tensors.rng import rng

Array = np.ndarray[Any, Any]


def mixture(X: Array, Q: Array, rows: list[int], s: float, among: Array) -> float:
    """VRS of order 1; Q is brought to [0, 1] over the rows `among`."""
    p = eigvalsh(X[rows] @ X[rows].T / len(rows))
    p = p[p > 1e-13]
    different = (np.exp(-(p * np.log(p)).sum()) - 1) / (len(rows) - 1) if len(rows) > 1 else 0.0
    return float(s * different + (1 - s) * (Q[rows].mean() - Q[among].min()) / np.ptp(Q[among]))


def it_is_greedy_on_the_mixture() -> None:
    of = pool(70)
    assert of.features is not None and of.target is not None
    X = np.asarray(of.features, np.float64)
    X /= np.linalg.norm(X, axis=1)[:, None]
    one = replace(of, target=of.target[:1])
    t = np.asarray(of.target, np.float64)
    t /= np.linalg.norm(t, axis=1)[:, None]
    cases = [(one, {}, X @ t[0], np.arange(70)), (of, {"s": 0.3}, (X @ t.T).mean(1), np.arange(70)),
             (of, {"score": "quality", "s": 0.6}, of.scores["quality"], np.arange(70)),
             (one, {"candidates": 25}, X @ t[0], np.argsort(-(X @ t[0]))[:25])]  # fmt: skip
    for given, options, Q, among in cases:
        got = selects.make("vendi_rag", **options).choose(given, Budget(rows=15), rng(0))
        s = float(options.get("s", 0.8))
        for k in range(15):
            chosen = got.rows[:k].tolist()
            worth = {i: mixture(X, Q, [*chosen, i], s, among) for i in among.tolist() if i not in chosen}
            assert worth[int(got.rows[k])] >= max(worth.values()) - 1e-9, (options, k)
        assert got.value == pytest.approx(mixture(X, Q, got.rows.tolist(), s, among), abs=1e-9)
        assert got.report["quality"] == pytest.approx(Q[got.rows].mean(), abs=1e-6)
    nearest = selects.make("vendi_rag", s=0.0).choose(one, Budget(rows=9), rng(0)).rows.tolist()
    assert nearest == np.argsort(-(X @ t[0]))[:9].tolist()
    wider = selects.make("vendi_rag", s=1.0, q=0.5).choose(one, Budget(rows=9), rng(0)).rows
    assert (X @ t[0])[wider].mean() < (X @ t[0])[nearest].mean()
    for wrong, why in (({"s": 1.5}, r"vendi_rag\.s must be in \[0, 1\], got 1\.5"), ({"candidates": -1}, "got -1"),
                       ({"q": 0}, "vendi_rag.q must be in")):  # fmt: skip
        with pytest.raises(WrongUse, match=why):
            selects.make("vendi_rag", **wrong)
    with pytest.raises(WrongUse, match="the pool has 5 that may be chosen"):
        selects.make("vendi_rag", candidates=5).choose(one, Budget(rows=9), rng(0))
    with pytest.raises(WrongUse, match="both included and excluded"):
        both = Budget(rows=9, include=np.array([3]), exclude=np.array([3]))
        selects.make("vendi_rag", candidates=20).choose(one, both, rng(0))
    with pytest.raises(WrongUse, match="needs target"):
        selects.make("vendi_rag").choose(replace(of, target=None), Budget(rows=9), rng(0))


ROW = Pick({}, it_is_greedy_on_the_mixture, variants=({"s": 0.2, "q": "inf"}, {"score": "quality", "q": 0.3}))
