"""DSEE: its places against those that the authors' code finds, its map against the formula, entry by entry."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from plures.adapt import adapts
from plures.tensors.site import Site
from rows import Row, wide

GOLDEN = Path(__file__).parent.parent / "golden" / "dsee_authors.json"


def dsee_is_the_authors() -> None:
    """The support from run_glue.py of github.com/VITA-Group/DSEE at 61844c3, from the same weight and first vector.

    Then that of "omp" (the largest weights), and y = W x + alpha/r (B (A x) + S x) of its modeling_bert.py.
    """
    said = json.loads(GOLDEN.read_text())
    W = np.array(said["W"])
    (out, into), n = W.shape, said["num_sparse"]
    site = Site("lin", out, into, torch.tensor(W, dtype=torch.float32))
    options = {k: said[k] for k in ("r", "num_sparse", "rounds")}
    method = adapts.make("dsee", **options, alpha=5.0)
    own = method.own(site, {}, np.random.default_rng(7))
    assert own["index"].tolist() == said["support"]
    assert not own["U"].any() and not own["values"].any() and 0.01 < own["V"].std() < 0.03

    largest = adapts.make("dsee", **options, sparse_method="omp").own(site, {}, np.random.default_rng(7))["index"]
    ranked = sorted(((i, j) for i in range(out) for j in range(into)), key=lambda at: -abs(W[at]))  # ties in order
    assert largest.T.tolist() == sorted(map(list, ranked[:n]))

    g = np.random.default_rng(1)
    U, V, s, x = g.normal(size=(out, 2)), g.normal(size=(2, into)), g.normal(size=n), g.normal(size=(3, into))
    y = x @ W.T + (5.0 / 2) * (x @ V.T) @ U.T
    for value, i, j in zip(s, *said["support"], strict=True):
        y[:, i] += (5.0 / 2) * value * x[:, j]
    tensors = {"U": torch.tensor(U), "V": torch.tensor(V), "values": torch.tensor(s), "index": own["index"]}
    got = torch.tensor(x) @ method.weight(torch.tensor(W), tensors, {}).T
    torch.testing.assert_close(got, torch.tensor(y), rtol=1e-12, atol=1e-12)


ROW = Row(
    options={"r": 3, "num_sparse": 5},
    variants=({"r": 2, "sparse_method": "omp"}, {"r": 2, "sparse_method": "rp", "num_sparse": 7}),
    trained=lambda s: wide(s, 3) + 5 * len(s),
    oracle=dsee_is_the_authors,
)
