"""Parameters of recipes that are words: for all tensors, by filter, and what is no such word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merged import MERGINGS
from plures.core.errors import PluresError
from plures.flows.merge import merge, plan
from plures.flows.merge_recipe import parse
from plures.tensors.weights import Planned, Weights, folder

SHAPES = {"layers.0.mlp.weight": (6, 20), "layers.0.attn.weight": (5, 16), "layers.0.norm.weight": (24,)}
GIVEN = {"weight": 0.5, "density": 0.3, "gamma": 0.2}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base and two models near it, float32."""
    for i, model in enumerate(("base", "a", "b")):
        with folder(tmp_path / model, [Planned(n, "F32", s) for n, s in SHAPES.items()]) as sink:
            for j, (n, s) in enumerate(SHAPES.items()):
                sink.write(n, 0, np.random.default_rng([i, j]).normal(size=int(np.prod(s))).astype(np.float32))
    return tmp_path


def held(at: Path) -> dict[str, Any]:
    with Weights(at) as source:
        told = {n: np.empty(source.entries[n].size, np.float32) for n in source.names}
        for n, values in told.items():
            source.read(n, 0, values)
    return told


def recipe(models: Path, method: str, **parameters: Any) -> Any:
    return parse({"merge_method": method, "base_model": str(models / "base"), "parameters": parameters,
                  "models": [{"model": str(models / n)} for n in "ab"]})  # fmt: skip


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize(
    ("scope", "rows"),
    [("row", ["mlp", "attn", "norm"]), ("tensor", []),
     ([{"filter": "mlp", "value": "row"}, {"filter": "*", "value": "tensor"}], ["mlp"])],
)  # fmt: skip
def test_rows_or_tensors(models: Path, method: str, scope: Any, rows: list[str]) -> None:
    merge(recipe(models, method, scope=scope, **GIVEN), models / "out")
    got, base, a, b = (held(models / n) for n in ("out", "base", "a", "b"))
    given = {k: np.array([v, v]) for k, v in GIVEN.items()}
    for n, shape in SHAPES.items():
        said = {"scope": "row" if any(r in n for r in rows) else "tensor"}
        W, below = np.stack([a[n], b[n]]).astype(np.float64), base[n].astype(np.float64)
        want = MERGINGS[method].oracle(W, below, given, shape, said)
        np.testing.assert_allclose(got[n], want, rtol=3e-6, atol=3e-7)


def test_rows_are_read_once(models: Path) -> None:
    by_row, by_tensor = (plan(recipe(models, "breadcrumbs", scope=s)).read_bytes for s in ("row", "tensor"))
    assert by_tensor == 3 * by_row


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"scope": "rows"}, r"scope must be 'tensor' \| 'row', got 'rows'"),
        ({"scope": 1}, "scope is '1'; a word, or words by filter are meant"),
        ({"scope": [{"filter": "mlp", "value": "row"}]}, "scope: no filter fits"),
        ({"scop": "row"}, "has no parameter 'scop'. Did you mean 'scope'"),
    ],
)
def test_what_is_no_scope(models: Path, said: Any, why: str) -> None:
    with pytest.raises(PluresError, match=why):
        merge(recipe(models, "breadcrumbs", **said), models / "out")
    assert not (models / "out").exists()


def test_a_whole_density_beside_others(models: Path) -> None:
    """A model that keeps all, with no outliers to lose, may stand beside one that keeps less."""
    said = {"merge_method": "breadcrumbs", "base_model": str(models / "base"), "models": [
        {"model": str(models / n), "parameters": {"density": d, "gamma": 0.1}} for n, d in (("a", 1.0), ("b", 0.5))]}
    merge(parse(said), models / "out")
    got, base, a, b = (held(models / n) for n in ("out", "base", "a", "b"))
    given = {"weight": np.ones(2), "density": np.array([1.0, 0.5]), "gamma": np.array([0.1, 0.1])}
    for n, shape in SHAPES.items():
        W = np.stack([a[n], b[n]]).astype(np.float64)
        want = MERGINGS["breadcrumbs"].oracle(W, base[n].astype(np.float64), given, shape, {})
        np.testing.assert_allclose(got[n], want, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize(("method", "said"), [("ram", {"epsilon": -1}), ("ramplus_tl", {"r": -0.1}),
                                              ("ramplus_tl", {"alpha": -2})])  # fmt: skip
def test_ram_out_of_range(models: Path, method: str, said: Any) -> None:
    (key, value), = said.items()
    with pytest.raises(PluresError, match=rf"{method}\.{key} must be at least 0, got '{float(value)}'"):
        plan(recipe(models, method, **said))
