"""Every merger: its formula in float64 on every element, pieces, the order of models, zero differences, purity."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from merged import MERGINGS, as_formula, models, run
from plures.core.errors import BadInput, WrongUse
from plures.core.folder import options_of
from plures.engine import merging
from plures.merge import merges
from plures.tensors import largest
from plures.tensors.deltas import drawn, top_scan, top_settle

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


@pytest.mark.parametrize("name", [n for n in MERGINGS if merges.make(n).base is None])
def test_what_models_add_where_a_base_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = MERGINGS[name]
    W, base = models(row.models, spread=0.05)
    wide, low = W.astype(np.float64), base.astype(np.float64)
    want = low + row.oracle(wide - low, low, row.given, W.shape[1:], row.options)
    got = run(name, row.options, row.given, W, base, on_base=True)
    np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-7)
    assert np.abs(got - run(name, row.options, row.given, W, base)).max() > 1e-3
    monkeypatch.setattr(merging, "CHUNK", 100)
    np.testing.assert_allclose(run(name, row.options, row.given, W, base, on_base=True), got, rtol=1e-6, atol=1e-7)
    still = run(name, row.options, row.given, np.repeat(base[None], row.models, 0), base, on_base=True)
    np.testing.assert_array_equal(still, base)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_a_model_without_length_has_no_direction(name: str) -> None:
    """It counts in the mean of the lengths alone: the others' mean, with the share of their weights."""
    W, base = models(2, spread=1.0)
    here = {"weight": [0.5, 0.25, 0.25]}
    got = run(name, {}, here, np.stack([W[0], np.zeros_like(base), W[1]]), base)
    want = 0.75 * MERGINGS[name].oracle(W.astype(np.float64), base, {"weight": [2 / 3, 1 / 3]}, (), {})
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("cosine", "t"), [(-0.25, -2 / 3), (-1.0, 0.0), (0.5, 2 / 3), (1.0, 1.0)])
def test_model_stock_by_hand(cosine: float, t: float) -> None:
    """Two differences of length 1 at an angle: t = 2 cos / (1 + cos), and the base at the formula's pole."""
    base, d = np.ones(4, np.float32), np.zeros((2, 4), np.float32)
    d[0, 0], d[1, :2] = 1, (cosine, (1 - cosine**2) ** 0.5)
    got = run("model_stock", {}, {}, base + d, base, (4,))
    np.testing.assert_allclose(got, base + t * d.mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(37, 29), (5, 4, 6), (29,), (), (9, 1), (1, 9)], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [("nuslerp", {"nuslerp_flatten": False}), ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
     ("model_stock", {"filter_wise": True})],
)  # fmt: skip
def test_lines_of_tensors(name: str, options: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any number of axes, some not changed by one model or by both; to the byte in pieces of any length."""
    n = int(np.prod(shape))
    r = np.random.default_rng(n)
    base, W = r.normal(size=n).astype(np.float32), r.normal(size=(2, n)).astype(np.float32)
    if len(shape) > 1:
        below, cubes = base.reshape(shape), W.reshape(2, *shape)
        cubes[:, 1:3], cubes[0, -1:] = below[1:3], below[-1:]
    on_base, given, low = name == "nuslerp", {"weight": [1.0, 3.0]}, base.astype(np.float64)
    if on_base:
        want = low + MERGINGS[name].oracle(W - low, low, given, shape, options)
    else:
        want = MERGINGS[name].oracle(W.astype(np.float64), low, given, shape, options)
    got = run(name, options, given, W, base, shape, on_base=on_base)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for chunk in (1, 7, 100):
        monkeypatch.setattr(merging, "CHUNK", chunk)
        np.testing.assert_array_equal(run(name, options, given, W, base, shape, on_base=on_base), got)


def test_which_lines_are_meant() -> None:
    """By hand: the first model is 1 everywhere, the second turned by a right angle in its first row alone."""
    W = np.array([[1, 1, 1, 1], [1, -1, 1, 1]], np.float32)
    half, given = 0.5**0.5, {"weight": [1.0, 1.0]}
    by = [{}, {"nuslerp_row_wise": True}, {"nuslerp_flatten": False},
          {"nuslerp_flatten": False, "nuslerp_row_wise": True}]  # fmt: skip
    whole, ignored, rows, columns = (run("nuslerp", o, given, W, W[0], (2, 2)) for o in by)
    np.testing.assert_allclose(rows, [2 * half, 0, 1, 1], atol=1e-6)  # sin 45 / sin 90, of each; equal rows stay
    np.testing.assert_allclose(columns, [1, 0, 1, 2 * half], atol=1e-6)
    np.testing.assert_allclose(whole, np.array([2, 0, 2, 2]) * 0.5 / 0.75**0.5, atol=1e-6)  # 30 and 60 degrees
    np.testing.assert_array_equal(whole, ignored)


def test_eps_of_multislerp_by_hand() -> None:
    """Of lengths 1.2 and 0.4 at a right angle, with eps 0.4: directions count 3/4 and 1/2."""
    W = np.array([[1.2, 0, 0], [0, 0.4, 0]], np.float32)
    a, b = 0.375, 0.25
    p = np.array([a, b, 0]) / np.hypot(a, b)
    first, second = np.arccos(p[:2])
    v = a * first * (np.array([1, 0, 0]) - p[0] * p) / np.sin(first)
    v += b * second * (np.array([0, 1, 0]) - p[1] * p) / np.sin(second)
    size = np.linalg.norm(v)
    got = run("multislerp", {"eps": 0.4}, {}, W, W[0], (3,))
    np.testing.assert_allclose(got, 0.8 * (np.cos(size) * p + np.sin(size) * v / size), atol=1e-6)
    for eps, mean in ((0.4, False), (0.5, True)):  # |u| is 0.45 and 0.42
        plain = np.allclose(run("multislerp", {"eps": eps}, {}, W, W[0], (3,)), W.mean(0), atol=1e-6)
        assert plain is mean
    with pytest.raises(WrongUse, match=r"multislerp\.eps must be at least 0, got '-1e-09'; 1e-8 is usual"):
        merges.make("multislerp", eps=-1e-9)


@pytest.mark.parametrize(("density", "gamma", "kept"), [
    (0.5, 0.2, [7, 6, 5, 4, 3]), (0.5, 0.5, [4, 3, 2, 1, 0]), (0.5, 0.9, [4, 3, 2, 1, 0]), (0.8, 0.3, range(8)),
    (0.9, 0.1, range(9)), (0.99, 0.5, range(9)), (1.0, 0.5, range(10)), (0.0, 1.0, []), (0.0, 0.0, [])])  # fmt: skip
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_density_counts_where_gamma_is_too_much(scope: str, density: float, gamma: float, kept: list[int]) -> None:
    """By hand, of the differences 1 to 10: mergekit's magnitude_outliers keeps the same."""
    base, said = np.zeros(10, np.float32), {"density": [density], "gamma": [gamma], "weight": [1.0]}
    got = run("breadcrumbs", {"scope": scope}, said, np.arange(1, 11, dtype=np.float32)[None], base, (10,))
    np.testing.assert_array_equal(got, [i + 1 if i in kept else 0 for i in range(10)])


def test_sce_selects_among_the_places_that_vary() -> None:
    """Half of the places change alike in all models: a share of 0.5 is of the other half."""
    r = np.random.default_rng(3)
    base = np.zeros(400, np.float32)
    d = np.where(np.arange(400) < 200, 1.0, r.normal(size=(3, 400))).astype(np.float32)
    got = run("sce", {"select_topk": 0.5}, {}, d, base, (400,))
    assert np.count_nonzero(got) == 100 and not got[:200].any()
    np.testing.assert_array_equal(np.flatnonzero(got), np.sort(200 + np.argsort(-d[:, 200:].var(0))[:100]))
    assert run("sce", {}, {}, d, base, (400,))[:200].all()
    assert not run("sce", {"select_topk": 0.5}, {}, d[:1], base, (400,)).any()  # of one model no place varies


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("name", sorted(merges))
def test_what_is_no_number_is_told(name: str, bad: float) -> None:
    """Of a model, and of the base where there is one."""
    row = MERGINGS[name]
    for on_base in (False, True) if merges.make(name).base is not False else (False,):
        W, base = models(row.models)
        (base if on_base else W[-1])[700] = bad
        who = "the base" if on_base else f"'m{row.models - 1}'"
        told = pytest.raises(BadInput, match=f"{who}: 'a.weight' has {bad} at element 700; mend")
        with np.errstate(invalid="ignore"), told:
            run(name, row.options, row.given, W, base, on_base=on_base)


SHOWING = [n for n in sorted(merges) if getattr(merges.make(n), "shows", False)]


@pytest.mark.parametrize("name", SHOWING)
def test_what_is_no_number_shows_however_little_of_a_model_is_taken(name: str) -> None:
    """Nobody looks at the models of these methods but where the result is no number: none may be lost on the way."""
    W, base = models(2)
    W[1][700] = np.inf
    given = {"weight": [1.0, 0.0]} | ({"density": [0.5, 0.0]} if "density" in merges.make(name).of_model else {})
    with pytest.raises(BadInput, match=r"'m1': 'a\.weight' has inf at element 700; mend"):
        run(name, {}, given, W, base)


@pytest.mark.parametrize("name", SHOWING)
def test_a_sum_that_overflows_is_written_as_it_is(name: str) -> None:
    W, base = np.full((2, 8), 3e38, np.float32), np.zeros(8, np.float32)
    W[:, 5:] = 1
    with np.errstate(over="ignore"):
        got = run(name, {"normalize": False}, {"weight": [1.0, 1.0]}, W, base, (8,))
    assert np.isinf(got[:5]).all() and (got[5:] == 2).all()


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
    whole = drawn(0, "a", "m", 0, 200_001)
    assert whole.dtype == np.uint32 and abs(whole.mean() / 2**32 - 0.5) < 0.005
    for start, n in ((301, 50), (65_530, 20), (65_536, 3), (131_071, 68_930)):  # odd, over the end of a block, at one
        assert np.array_equal(drawn(0, "a", "m", start, n), whole[start : start + n])
    assert not np.array_equal(drawn(0, "a", "n", 0, 50), whole[:50])


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
