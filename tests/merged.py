"""One row for each merger: its options, what is said of models, and the formula in float64 on whole tensors.

A method without a row fails. `oracle(W, base, given, shape, options)` gets `W [models, n]` and `base [n]` in float64.
`run` merges one tensor, called "a.weight", of models m0, m1, .. by the seed 0, and `as_formula` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np

from plures.core.seeds import stream
from plures.engine import merging
from plures.engine.merging import Job
from plures.merge import merges
from plures.tensors.weights import half

Array = np.ndarray[Any, Any]
Oracle = Callable[[Array, Array, Mapping[str, Array], tuple[int, ...], Mapping[str, Any]], Array]


@dataclass(frozen=True)
class Merging:
    """How one merger is tested: `models` how many, `symmetric` whether their order does not matter, `spread` how far
    they are from a base of numbers around 1."""

    oracle: Oracle
    options: dict[str, Any] = field(default_factory=dict)
    given: dict[str, list[float]] = field(default_factory=dict)
    models: int = 3
    symmetric: bool = True
    variants: tuple[tuple[dict[str, Any], dict[str, list[float]]], ...] = ()
    random: bool = False
    spread: float = 0.05


def top(d: Array, share: float) -> Array:
    """The mask of the share of largest magnitudes, the earlier of equal ones: a whole sort."""
    mask = np.zeros(d.size, bool)
    mask[np.argsort(-np.abs(d.astype(np.float32)), kind="stable")[: int(share * d.size + 1e-9)]] = True
    return mask


def elected(t: Array, w: Array, normalize: bool) -> Array:
    """TIES' election and mean, place by place."""
    out = np.zeros(t.shape[1])
    for j in range(t.shape[1]):
        total = sum(w[i] * t[i, j] for i in range(len(w)))
        sign = 1 if total >= 0 else -1
        those = [i for i in range(len(w)) if np.sign(w[i] * t[i, j]) == sign]
        if those:
            out[j] = sum(w[i] * t[i, j] for i in those) / (sum(w[i] for i in those) if normalize else 1)
    return out


def linear(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    total = sum(w * row for w, row in zip(g["weight"], W, strict=True))
    return np.asarray(total / sum(g["weight"]) if o.get("normalize", True) else total)


def task_arithmetic(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    return np.asarray(base + o.get("lambda_", 1.0) * np.einsum("i,ij->j", g["weight"], W - base))


def ties(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    t = np.stack([d * top(d, s) for d, s in zip(W - base, g["density"], strict=True)])
    return np.asarray(base + o.get("lambda_", 1.0) * elected(t, g["weight"], o.get("normalize", True)))


def crumbs(W: Any, base: Any, g: Any) -> Array:
    """By a whole sort: so many stay, behind those that go or, of too many for that, the smallest."""
    out, n = W - base, W.shape[1]
    for d, density, gamma in zip(out, g["density"], g["gamma"], strict=True):
        stay = int(density * n + 1e-9)
        first = min(int(gamma * n + 1e-9), n - stay)
        by_size = np.argsort(-np.abs(d.astype(np.float32)), kind="stable")
        d[by_size[:first]] = d[by_size[first + stay :]] = 0
    return np.asarray(out)


def scoped(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    """Breadcrumbs of the tensor, or of one row after the other."""
    if o.get("scope", "tensor") == "tensor":
        return crumbs(W, base, g)
    wide = shape[-1]
    return np.concatenate([crumbs(W[:, at : at + wide], base[at : at + wide], g)
                           for at in range(0, W.shape[1], wide)], 1)  # fmt: skip


def breadcrumbs(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    return np.asarray(base + np.einsum("i,ij->j", g["weight"], scoped(W, base, g, shape, o)))


def breadcrumbs_ties(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    return np.asarray(base + elected(scoped(W, base, g, shape, o), g["weight"], False))


def ram(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    """Place by place; `r` 0 without the larger ones."""
    D, out = W - base, base.copy()
    eps, r, alpha = float(np.float32(o.get("epsilon", 1e-5))), o.get("r", 0.0), o.get("alpha", 0.2)
    who = [[i for i in range(len(D)) if abs(D[i, j]) > eps] for j in range(D.shape[1])]
    scale = []
    for i in range(len(D)):
        alone = sum(w == [i] for w in who)
        shared = sum(i in w and len(w) > 1 for w in who)
        scale.append(1 + r * min(shared / alone, alpha) if alone else 1.0)
    for j, w in enumerate(who):
        if w:
            out[j] += scale[w[0]] * D[w[0], j] if len(w) == 1 else sum(D[i, j] for i in w) / len(w)
    return np.asarray(out)


def ramplus_tl(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    return ram(W, base, g, shape, {"r": 0.1} | o)


def arc(a: Any, b: Any, t: float, near: float = 0.9995) -> Array:
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    if abs(cosine) > near:
        return np.asarray((1 - t) * a + t * b)
    w = np.arccos(cosine)
    return np.asarray((np.sin((1 - t) * w) * a + np.sin(t * w) * b) / np.sin(w))


def slerp(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    return arc(W[0], W[1], o.get("t", 0.5))


def nuslerp(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    """One line after the other, each an index of the tensor: all of it, along the last axis, or along the first."""
    t, cubes = g["weight"][1] / sum(g["weight"]), W.reshape(2, *shape)
    out, lines = np.zeros(shape), [(...,)]
    if not o.get("nuslerp_flatten", True) and len(shape) > 1:
        down = o.get("nuslerp_row_wise", False)
        lines = [(slice(None), *at) if down else (*at, slice(None))
                 for at in np.ndindex(shape[1:] if down else shape[:-1])]  # fmt: skip
    for line in lines:
        a, b = (cube[line].ravel() for cube in cubes)
        none = not a.any() or not b.any()
        out[line] = ((1 - t) * a + t * b if none else arc(a, b, t, 1 - 1e-12)).reshape(out[line].shape)
    return out.reshape(-1)


def sphere(W: Any, w: Any, steps: int, eps: float = 0.0) -> Array:
    """log and exp maps on vectors themselves; `eps` makes vectors of a length near it count less."""
    lengths = np.linalg.norm(W, axis=1)
    u, w = W / lengths[:, None], w / w.sum()
    mean, w = w @ lengths, w * lengths / (lengths + eps)
    p = (w[:, None] * u).sum(0)
    p /= np.linalg.norm(p)
    for _ in range(steps):
        logs = []
        for x in u:
            c = np.clip(x @ p, -1, 1)
            flat = x - c * p
            size = np.linalg.norm(flat)
            logs.append(np.arccos(c) * flat / size if size > 1e-9 else 0 * flat)
        v = (w[:, None] * np.stack(logs)).sum(0)
        size = np.linalg.norm(v)
        if size < 1e-9:
            break
        p = np.cos(size) * p + np.sin(size) * v / size
    return np.asarray(p * mean)


def multislerp(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    eps, all_of = o.get("eps", 1e-8), sum(g["weight"])
    return sphere(W, np.asarray(g["weight"]), 1, eps) * (1 if o.get("normalize_weights", True) else all_of)


def karcher(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    return sphere(W, np.asarray(g["weight"]), 60)


def model_stock(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    """Of the tensor, or of one row after the other; the base where nothing changed, and at the formula's pole."""
    D, n, out = W - base, len(W), base.copy()
    wide = shape[-1] if o.get("filter_wise", False) and shape else W.shape[1]
    for at in range(0, W.shape[1], wide):
        d = D[:, at : at + wide]
        sizes = np.maximum(np.linalg.norm(d, axis=1), 1e-12)
        c = float(np.mean([d[i] @ d[j] / sizes[i] / sizes[j] for i in range(n) for j in range(i)]))
        if 1 + (n - 1) * c > 1e-6:
            out[at : at + wide] += n * c / (1 + (n - 1) * c) * d.mean(0)
    return np.asarray(out)


def nearswap(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    d = W[0] - base
    with np.errstate(divide="ignore"):
        return np.asarray(base + np.minimum(1, o["t"] / np.abs(d)) * d)


def passthrough(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    return np.asarray(g["scale"][0] * W[0])


def cabs(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    n, m, size = o["n"], o["m"], W.shape[1]
    taken, total = np.zeros(size, bool), np.zeros(size)
    for w, d in zip(g["weight"], W - base, strict=True):
        mask = np.zeros(size, bool)
        for at in range(0, size, m):
            group = list(range(at, min(at + m, size)))
            many = -(-n * len(group) // m)
            free = sorted((j for j in group if not taken[j]), key=lambda j: -abs(np.float32(d[j])))
            rest = sorted((j for j in group if taken[j]), key=lambda j: -abs(np.float32(d[j])))
            mask[(free + rest)[:many]] = True
        total += w * mask * d
        taken |= mask
    return np.asarray(base + o.get("lambda_", 1.0) * total)


def sce(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    D, share = W - base, o.get("select_topk", 1.0)
    if share < 1:
        D = D * top(D.var(0), share * np.count_nonzero(D.var(0)) / D.shape[1])
    w, out = np.square(D).sum(1), np.zeros(D.shape[1])
    for j in range(D.shape[1]):
        those = [i for i in range(len(w)) if np.sign(D[i, j]) == (1 if D[:, j].sum() >= 0 else -1)]
        if those:
            out[j] = sum(w[i] * D[i, j] for i in those) / sum(w[i] for i in those)
    return np.asarray(base + out)


@cache
def block(model: int, n: int) -> list[int]:
    """What SFC64 draws for the elements of block `n` of a model's tensor."""
    return list(map(int, np.random.SFC64([stream(0, "merge", "a.weight", f"m{model}"), n]).random_raw(1 << 15)))


def drawn(model: int, place: int) -> float:
    """The number in [0, 1) of a model and a place: the lower, then the upper half of each whole number of its block."""
    n, at = divmod(place, 1 << 16)
    return (block(model, n)[at // 2] >> 32 * (at % 2) & 0xFFFFFFFF) / 2**32


def dare(W: Any, base: Any, g: Any) -> Array:
    """What is left of each model's differences, one number after the other."""
    return np.array([[d / p if p == 1 or drawn(i, j) < p else 0.0 for j, d in enumerate(row)]
                     for i, (row, p) in enumerate(zip(W - base, g["density"], strict=True))])  # fmt: skip


def magprune(W: Any, base: Any, g: Any, shape: Any) -> Array:
    """The same, with probabilities by the rank in a row."""
    out, wide = W - base, shape[-1]
    for i, (p, e) in enumerate(zip(g["density"], g["epsilon"], strict=True)):
        for at in range(0, W.shape[1] if p < 1 else 0, wide):
            by = sorted(range(at, at + wide), key=lambda j: abs(np.float32(out[i, j])))
            for rank, j in enumerate(by):
                chance = p - e + 2 * e * rank / (wide - 1)
                out[i, j] = out[i, j] / chance if drawn(i, j) < chance else 0
    return np.asarray(out)


def dare_linear(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    return np.asarray(base + np.einsum("i,ij->j", g["weight"], dare(W, base, g)))


def dare_ties(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    return np.asarray(base + elected(dare(W, base, g), g["weight"], o.get("normalize", False)))


def della_linear(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    return np.asarray(base + np.einsum("i,ij->j", g["weight"], magprune(W, base, g, shape)))


def della(W: Any, base: Any, g: Any, shape: Any, o: Any) -> Array:
    return np.asarray(base + elected(magprune(W, base, g, shape), g["weight"], o.get("normalize", True)))


THREE = {"weight": [0.5, 0.3, 0.7]}
FEWER = THREE | {"density": [0.5, 0.4, 1.0]}
SPREAD = FEWER | {"epsilon": [0.13, 0.11, 0.05]}  # sums that cancel to the last bit of float32 would differ in sign
CRUMBS = THREE | {"density": [0.3, 0.5, 0.6], "gamma": [0.1, 0.01, 0.2]}
OVER = THREE | {"density": [0.95, 0.99, 1.0], "gamma": [0.1, 0.005, 0.2]}
MERGINGS: dict[str, Merging] = {
    "linear": Merging(linear, given=THREE, variants=(({"normalize": False}, {"weight": [1.0, -0.5, 0.25]}),)),
    "task_arithmetic": Merging(task_arithmetic, {"lambda_": 0.8}, THREE),
    "ties": Merging(ties, {}, THREE | {"density": [0.2, 0.5, 0.9]}, variants=(
        ({"lambda_": 1.5, "normalize": False}, THREE | {"density": [0.0, 1.0, 0.333]}),)),
    "breadcrumbs": Merging(breadcrumbs, {}, THREE | {"density": [0.3, 0.5, 0.6], "gamma": [0.1, 0.01, 0.0]},
                           variants=(({"scope": "row"}, CRUMBS | {"density": [0.3, 0.5, 1.0]}), ({}, OVER),
                                     ({"scope": "row"}, OVER))),
    "breadcrumbs_ties": Merging(breadcrumbs_ties, {}, CRUMBS, variants=(({"scope": "row"}, CRUMBS), ({}, OVER),
                                                                        ({"scope": "row"}, OVER))),
    "dare_linear": Merging(dare_linear, {}, THREE | {"density": [1.0, 1.0, 1.0]}, random=True,
                          variants=(({}, FEWER),)),
    "dare_ties": Merging(dare_ties, {"normalize": True}, THREE | {"density": [1.0, 1.0, 1.0]}, random=True,
                        variants=(({"normalize": True}, FEWER),)),
    "della_linear": Merging(della_linear, {}, THREE | {"density": [1.0, 1.0, 1.0]}, random=True,
                           variants=(({}, SPREAD),)),
    "della": Merging(della, {"normalize": True}, THREE | {"density": [1.0, 1.0, 1.0]}, random=True,
                    variants=(({"normalize": True}, SPREAD),)),
    "slerp": Merging(slerp, {"t": 0.3}, models=2, symmetric=False, spread=1.0),
    "nuslerp": Merging(nuslerp, {}, {"weight": [1.0, 3.0]}, models=2, spread=0.3, variants=(
        ({"nuslerp_flatten": False}, {"weight": [1.0, 3.0]}),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"weight": [1.0, 3.0]}))),
    "multislerp": Merging(multislerp, {}, THREE, spread=1.0, variants=(
        ({"normalize_weights": False}, THREE), ({"eps": 0.4}, {"weight": [9.0, 2.0, 3.0]}))),
    "karcher": Merging(karcher, {"max_iter": 60, "tol": 1e-12}, THREE, spread=1.0),
    "model_stock": Merging(model_stock, variants=(({"filter_wise": True}, {}),)),
    "nearswap": Merging(nearswap, {"t": 0.01}, models=1),
    "passthrough": Merging(passthrough, {}, {"scale": [0.5]}, models=1),
    "cabs": Merging(cabs, {"n": 2, "m": 8, "lambda_": 1.2}, THREE, symmetric=False,
                    variants=(({"n": 5, "m": 8}, THREE),)),
    "ram": Merging(ram, {"epsilon": 0.0625}, variants=(({}, {}),)),
    "ramplus_tl": Merging(ramplus_tl, {"epsilon": 0.0625, "r": 0.7, "alpha": 1.5}, variants=(
        ({"epsilon": 0.0625}, {}), ({"epsilon": 0.03125, "r": 0.5, "alpha": 100.0}, {}))),
    "sce": Merging(sce, {"select_topk": 0.4}, variants=(({}, {}),)),
}  # fmt: skip
SHAPE = (37, 29)


def models(m: int, shape: tuple[int, ...] = SHAPE, seed: int = 0, spread: float = 0.05) -> tuple[Any, Any]:
    """m models and their base as bfloat16 has them: many differences are equal."""
    r = np.random.default_rng(seed)
    base = r.normal(size=shape).astype(np.float32).reshape(-1)
    whole = base + spread * r.normal(size=(m, base.size)).astype(np.float32)
    wide = [(half(np.ascontiguousarray(x)).astype(np.uint32) << 16).view(np.float32) for x in (*whole, base)]
    return np.stack(wide[:-1]), wide[-1]


def run(name: str, options: dict[str, Any], given: dict[str, Any], W: Any, base: Any, shape: tuple[int, ...] = SHAPE,
        order: list[int] | None = None, seed: int = 0, on_base: bool = False) -> Any:  # fmt: skip
    """`on_base` says whether a method that may work on what models add to a base does."""
    method, rows = merges.make(name, **options), list(range(len(W))) if order is None else order
    said = {k: np.array(given.get(k, [v] * len(W)), float)[rows] for k, v in method.of_model.items()}

    def read(of: Any, start: int, out: Any) -> None:
        out[:] = of[start : start + len(out)]

    out = np.full(W.shape[1], np.nan, np.float32)

    def write(start: int, values: Any) -> None:
        assert np.isnan(out[start : start + len(values)]).all()
        out[start : start + len(values)] = values

    below = partial(read, base) if method.base or on_base else None
    told = merging.merge(Job("a.weight", shape, tuple(f"m{i}" for i in rows), tuple(partial(read, W[i]) for i in rows),
                             below, method, said, seed), write)  # fmt: skip
    assert 0 <= told.conflict <= 1 and -1 <= told.cosine <= 1 + 1e-9
    return out


def as_formula(name: str, options: dict[str, Any], given: dict[str, Any]) -> None:
    """Fails unless all merged numbers are the formula's in float64, and within one bit of bfloat16."""
    row = MERGINGS[name]
    W, base = models(row.models, spread=row.spread)
    said = {k: given.get(k, [v] * len(W)) for k, v in merges.make(name).of_model.items()}
    want = row.oracle(W.astype(np.float64), base.astype(np.float64), said, SHAPE, options)
    got = run(name, options, given, W, base)
    np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-7)
    ulp = np.abs(half(got).view(np.int16).astype(int) - half(want.astype(np.float32)).view(np.int16).astype(int))
    assert ulp.max() <= 1
