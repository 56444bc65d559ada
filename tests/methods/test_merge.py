"""Every merger: its formula in float64 on every element, pieces, the order of models, zero differences, purity."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from merged import MERGINGS, as_formula, models, run
from plures.core.folder import options_of
from plures.engine import merging
from plures.merge import merges
from plures.tensors import largest
from plures.tensors.deltas import top_scan, top_settle, uniform

CASES = [(n, o, g) for n, row in MERGINGS.items() for o, g in ((row.options, row.given), *row.variants)]
every = pytest.mark.parametrize(("name", "options", "given"), CASES,
                                ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])  # fmt: skip


def test_every_method_has_a_row() -> None:
    assert set(MERGINGS) == set(merges)


@every
def test_it_is_the_formula_in_float64(name: str, options: Any, given: Any) -> None:
    as_formula(name, options, given)


@every
def test_pieces_do_not_show(name: str, options: Any, given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = MERGINGS[name]
    W, base = models(row.models)
    if row.random:
        given = given | {"density": [0.5, 0.4, 0.6]}
    whole = run(name, options, given, W, base)
    monkeypatch.setattr(merging, "CHUNK", 100)
    np.testing.assert_allclose(run(name, options, given, W, base), whole, rtol=1e-6, atol=1e-7)


@every
def test_the_order_of_models(name: str, options: Any, given: Any) -> None:
    row = MERGINGS[name]
    W, base = models(row.models)
    if row.random:
        given = given | {"density": [0.5, 0.4, 0.6]}
    a, b = (run(name, options, given, W, base, order=list(o)) for o in (range(row.models), range(row.models)[::-1]))
    if row.symmetric:
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    else:
        assert not np.allclose(a, b)


@pytest.mark.parametrize("name", [n for n in MERGINGS if merges.make(n).base])
def test_no_differences_leave_the_base(name: str) -> None:
    row = MERGINGS[name]
    _, base = models(row.models)
    got = run(name, row.options, row.given, np.repeat(base[None], row.models, 0), base)
    np.testing.assert_array_equal(got, base)


@pytest.mark.parametrize("name", sorted(merges))
def test_options_have_help(name: str) -> None:
    made = merges.make(name)
    assert inspect.getdoc(made.apply)
    for option, (_, default, text) in options_of(type(made)).items():
        assert isinstance(default, int | float | bool | str) and text, f"{name}.{option} has no help"


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della_linear", "della"])
def test_what_is_dropped_at_random(name: str) -> None:
    n = 40_000
    r = np.random.default_rng(0)
    base, d = np.zeros(n, np.float32), r.normal(size=n).astype(np.float32)
    W, shape = d[None], (400, 100)
    got = run(name, {}, {"density": [0.4]}, W, base, shape)
    kept = got != 0
    assert abs(kept.mean() - 0.4) < 0.01
    if name.startswith("dare"):
        np.testing.assert_allclose(got[kept], d[kept] / 0.4, rtol=1e-6)
    else:
        rank = np.argsort(np.argsort(np.abs(d.reshape(shape)), 1), 1)
        p = 0.4 - 0.15 + 0.3 * rank / 99
        np.testing.assert_allclose(got[kept], (d / p.reshape(-1))[kept], rtol=1e-6)
        high = rank >= 50
        assert abs(kept.reshape(shape)[high].mean() - p[high].mean()) < 0.015
    assert np.array_equal(got, run(name, {}, {"density": [0.4]}, W, base, shape))
    assert not np.array_equal(got, run(name, {}, {"density": [0.4]}, W, base, shape, seed=1))
    whole = uniform(0, "a", "m", 0, 1000)
    assert np.array_equal(uniform(0, "a", "m", 300, 50), whole[300:350]) and abs(whole.mean() - 0.5) < 0.05


def test_the_largest_are_exact_with_equal_numbers() -> None:
    r = np.random.default_rng(1)
    v = r.choice([0.0, 0.5, -0.5, 0.25, 1.0, -2.0, 1e-30], size=(2, 5000)).astype(np.float32)
    k = np.array([1234, 4999])
    before: list[Any] = []
    for _ in range(2):
        told = [top_scan(v[:, at : at + 700], before)["counts"] for at in range(0, 5000, 700)]
        before.append(top_settle({"counts": sum(told)}, k, before))
    left = before[-1]["left"]
    least = before[-1]["least"]
    mask = np.concatenate([largest.take(v[:, at : at + 700], least, left) for at in range(0, 5000, 700)], 1)
    for i in range(2):
        want = np.zeros(5000, bool)
        want[np.argsort(-np.abs(v[i]), kind="stable")[: k[i]]] = True
        assert np.array_equal(mask[i], want)
