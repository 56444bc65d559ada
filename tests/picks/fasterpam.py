"""FasterPAM against the authors' package on the graph's distances, and no swap may be left that gains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from picked import Pick, pool
from plures.choice import polish
from plures.choice.pool import Budget, Pool
from plures.select import selects
from plures.tensors.rng import rng

GOLDEN = Path(__file__).parents[1] / "golden" / "fasterpam_authors.json"


def near(of: Pool) -> np.ndarray[Any, Any]:
    """The graph's matrix: 1 on the diagonal."""
    assert of.graph is not None
    S = np.eye(of.n)
    for i in range(of.n):
        S[i, of.graph.index[of.graph.start[i] : of.graph.start[i + 1]]] = of.graph.near[
            of.graph.start[i] : of.graph.start[i + 1]
        ]
    return S


def it_is_fasterpam() -> None:
    theirs = json.loads(GOLDEN.read_text())
    for case in theirs["cases"]:
        of = pool(case["n"], case["seed"])
        assert of.graph is not None
        start = np.array(case["start"])
        rows, made = polish.swap(of.graph, start, np.zeros(of.n, np.int32), np.zeros(of.n, bool), 100)
        assert sorted(rows.tolist()) == sorted(case["medoids"]) and made == case["swaps"]
        np.testing.assert_allclose(of.n - near(of)[:, rows].max(1).sum(), case["loss"], rtol=1e-5)
    of = pool()
    S = near(of)
    for init in ("random", "build"):
        got = selects.make("fasterpam", init=init, exact=0).choose(of, Budget(rows=12), rng(3, "x"))
        best = S[:, got.rows].max(1).sum()
        np.testing.assert_allclose(got.value, best, rtol=1e-6)
        assert got.value <= got.bound
        for p in range(12):
            for c in np.setdiff1d(np.arange(160), got.rows):
                assert S[:, [*np.delete(got.rows, p), c]].max(1).sum() <= best + 1e-5
        plain = selects.make("cover", swaps=0).choose(of, Budget(rows=12), rng(0))
        assert init == "random" or got.value >= plain.value
    assert of.features is not None
    S = np.maximum(of.features.astype(np.float64) @ of.features.T, 0)  # now by exact cosines; all 8 medoids are near
    chosen = selects.make("fasterpam", exact=30).choose(of, Budget(rows=8), rng(3, "x")).rows
    best = S[:, chosen].max(1).sum()
    for p in range(8):
        for c in np.setdiff1d(np.arange(160), chosen):
            assert S[:, [*np.delete(chosen, p), c]].max(1).sum() <= best + 1e-5


ROW = Pick(
    options={},
    variants=({"init": "build"}, {"max_iter": 1}),
    oracle=it_is_fasterpam,
    gaps={"permute": "its random start draws places, not rows", "nested": "swaps depend on all of the rows"},
)
