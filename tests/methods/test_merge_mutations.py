"""Every merger's oracle fails when its method is off by one: in a count, a threshold, a rank, a weight, a layer.

A mutant is a function of the method with one piece of its source replaced; the method is then compared with its formula
as in test_merge.py. A method without mutants fails, and so does a mutant whose piece of source is not there any more.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merged import MERGINGS, as_formula
from plures.engine import merging
from plures.flows import merge_recipe
from plures.flows.merge import merge
from plures.flows.merge_recipe import parse
from plures.merge import merges
from plures.tensors.weights import Planned, Weights, folder

Mutant = tuple[str, str, str]
"""The function (module and name), a piece of its source that is there once, and what takes its place."""
DELTAS, LARGEST, SPHERE = "plures.tensors.deltas", "plures.tensors.largest", "plures.tensors.sphere"
BY_LINE = "plures.tensors.lines"
MORE: Mutant = (f"{DELTAS}:count", "np.round(density * n, 9))", "np.round(density * n, 9)) + 1")
LESS: Mutant = (f"{DELTAS}:count", "np.floor(np.round(density * n, 9))", "np.floor(np.maximum(density * n - 1, 0))")
EQUAL: Mutant = (f"{LARGEST}:take", "np.greater(b, edge", "np.greater_equal(b, edge")
LATER: Mutant = (f"{LARGEST}:take", "[: left[i]]", "[-left[i] :]")
BIN: Mutant = (f"{LARGEST}:find", "above[at - 1] if at else 0", "above[at]")
TOP = [MORE, LESS, EQUAL, LATER, BIN]
SHIFTED: Mutant = (f"{DELTAS}:given", "of[name]", "np.roll(of[name], 1)")
OVER: Mutant = (f"{DELTAS}:mixed", "weights.sum()", "weights[1:].sum()")
SHARES: Mutant = (f"{DELTAS}:mixed", "shares[:] = 0", "shares[:] = 1")
PLACE: Mutant = (f"{DELTAS}:drawn", "found[start", "np.roll(found, 1)[start")
KEPT: Mutant = (f"{DELTAS}:drop", "zip(deltas, density,", "zip(deltas, np.roll(density, 1),")
OTHERS: Mutant = (f"{DELTAS}:drop", "row /= keep", "row /= 1 - keep")
RANK: Mutant = (f"{DELTAS}:drop_by_rank", "more * rank", "more * (rank + 1)")
WIDTH: Mutant = (f"{DELTAS}:drop_by_rank", "max(width - 1, 1)", "width")
UNCUT: Mutant = (f"{DELTAS}:_crumb_edges", "return top, top + stay", "return top, stay")
CLAMPED: Mutant = (f"{DELTAS}:_crumb_edges", "np.int64) - stay)", "np.int64) - stay - 1).clip(0)")
LINES: Mutant = (f"{DELTAS}:crumbs_by_row", "width - int(low),", "width - int(low) + 1,")
LINE: Mutant = (f"{DELTAS}:crumbs_by_row", "<= edges", "< edges")
LINED: Mutant = (f"{DELTAS}:crumbs_by_row", ")[::-1]", ")")
REACHED: Mutant = (f"{DELTAS}:changed", "> np.float32", ">= np.float32")
CRUMBS = [*TOP, SHIFTED, UNCUT, CLAMPED, LINES, LINE, LINED]
ROWS: Mutant = ("plures.merge:row", "shape[-1]", "shape[0]")
ELECTED: Mutant = (f"{DELTAS}:agree", "zip(weights, deltas, strict", "zip(np.roll(weights, 1), deltas, strict")


KINDS = {name: merges[name] for name in merges}  # all are imported before anything is replaced


def own(name: str, function: str, old: str, new: str) -> Mutant:
    """A mutant of the method's class."""
    return f"plures.merge.{name}:{KINDS[name].__name__}.{function}", old, new


MUTANTS: dict[str, list[Mutant]] = {
    "linear": [SHIFTED, OVER],
    "task_arithmetic": [SHIFTED, own("task_arithmetic", "apply", "part.deltas()", "np.roll(part.deltas(), 1, 0)")],
    "ties": [*TOP, SHIFTED, SHARES, ELECTED],
    "breadcrumbs": CRUMBS,
    "breadcrumbs_ties": [*CRUMBS, ELECTED],
    "dare_linear": [PLACE, KEPT, OTHERS, SHIFTED],
    "dare_ties": [PLACE, KEPT, OTHERS, SHIFTED, SHARES, ELECTED],
    "della": [PLACE, RANK, WIDTH, SHIFTED, SHARES, ELECTED],
    "della_linear": [PLACE, RANK, WIDTH, SHIFTED],
    "slerp": [
        (f"{SPHERE}:arc", "np.array([np.sin((1 - t)", "np.array([np.sin((1 + t)"),
        own("slerp", "scan", "products(part.values)", "products(part.values[:, 1:])"),
    ],
    "nuslerp": [
        own("nuslerp", "settle", "weight[1]", "weight[0]"), SHIFTED, ROWS,
        own("nuslerp", "scan", "products(vectors)}", "products(vectors[:, 1:])}"),
        (f"{BY_LINE}:columns", "shape[1:]", "shape[:1]"),
        (f"{BY_LINE}:line_products", "values[j].reshape", "np.roll(values[j], 1).reshape"),
        (f"{BY_LINE}:line_mixed", "w if down", "np.roll(w, 1) if down"),
        (f"{BY_LINE}:line_mixed", "w[:, None]", "np.roll(w, 1)[:, None]"),
    ],
    "multislerp": [SHIFTED, (f"{SPHERE}:around", "range(steps)", "range(steps + 1)"),
                   (f"{SPHERE}:around", "range(steps)", "range(steps - 1)"),
                   (f"{SPHERE}:around", "lengths + eps", "lengths + 2 * eps"),
                   (f"{SPHERE}:around", "move = counts * scale", "move = weights * scale")],
    "karcher": [SHIFTED, (f"{SPHERE}:around", "range(steps)", "range(1)")],
    "model_stock": [own("model_stock", "settle", "(m - 1) * cosine", "m * cosine"),
                    own("model_stock", "settle", "np.triu_indices(m, 1)", "np.triu_indices(m, 0)"),
                    own("model_stock", "apply", "t[:, None]", "np.roll(t, 1)[:, None]"), ROWS,
                    own("model_stock", "apply", "line_products(deltas", "line_products(np.roll(deltas, 1, 1)")],
    "nearswap": [own("nearswap", "apply", "-self.t, self.t", "-self.t, 0"),
                 own("nearswap", "apply", "part.deltas()[0]", "np.roll(part.deltas()[0], 1)")],
    "passthrough": [own("passthrough", "apply", "part.values[0]", "np.roll(part.values[0], 1)"),
                    own("passthrough", "apply", 'given(part.given, "scale")[0] *', "1 *")],
    "cabs": [
        SHIFTED,
        own("cabs", "_mask", "-(-self.n * width // self.m)]", "self.n * width // self.m]"),
        own("cabs", "_mask", "-(-self.n * width // self.m)]", "-(-self.n * width // self.m) + 1]"),
        own("cabs", "_mask", "(-size, ~free)", "(-size,)"),
        own("cabs", "apply", "taken |= mask", "taken = mask"),
        own("cabs", "unit", "return self.m", "return self.m - 1"),
    ],
    "sce": [MORE, LESS, SHARES, own("sce", "settle", 'told["squares"] / total', 'np.roll(told["squares"], 1) / total'),
            own("sce", "scan", "before[1][\"least\"]", "before[1][\"least\"] + np.uint64(1 << 22)")],
    "ram": [REACHED, SHARES],
    "ramplus_tl": [
        REACHED, SHARES,
        own("ramplus_tl", "scan", "mask.sum(0) == 1", "mask.sum(0) <= 2"),
        own("ramplus_tl", "apply", "mask.sum(0) == 1", "mask.sum(0) == 2"),
        own("ramplus_tl", "settle", "rho = told", "rho = 1 + told"),
        own("ramplus_tl", "apply", 'stats[-1]["scale"]', 'np.roll(stats[-1]["scale"], 1)'),
    ],
}  # fmt: skip
ALL = [(name, mutant) for name, mutants in MUTANTS.items() for mutant in mutants]


def plant(patch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    """Put the mutant in the place of its function, in every module that has it."""
    where, old, new = mutant
    module_name, _, path = where.partition(":")
    module = importlib.import_module(module_name)
    holder, _, name = path.rpartition(".")
    owner: Any = getattr(module, holder) if holder else module
    original = vars(owner)[name]
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(old) == 1, f"{where} holds {old!r} {source.count(old)} times: write the mutant anew"
    made: dict[str, Any] = {}
    exec("from __future__ import annotations\n" + source.replace(old, new), vars(module), made)
    patch.setattr(owner, name, made[name])
    for other in [m for n, m in sys.modules.items() if n.startswith("plures.") and m is not module]:
        if vars(other).get(name) is original:
            patch.setattr(other, name, made[name])


def caught(name: str) -> bool:
    """Whether one of the method's rows fails."""
    row = MERGINGS[name]
    for options, given in ((row.options, row.given), *row.variants):
        try:
            as_formula(name, options, given)
        except AssertionError:
            return True
    return False


def test_every_method_has_mutants() -> None:
    assert set(MUTANTS) == set(KINDS) and min(map(len, MUTANTS.values())) >= 2


@pytest.mark.parametrize(("name", "mutant"), ALL, ids=[f"{n}-{i}" for i, (n, _) in enumerate(ALL)])
def test_the_oracle_sees_it(name: str, mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "CHUNK", 100)
    with monkeypatch.context() as patch:
        plant(patch, (mutant[0], mutant[1], mutant[1]))
        assert not caught(name), "the function as it is fails when it is only read anew"
    plant(monkeypatch, mutant)
    assert caught(name), f"{mutant[0]}: with {mutant[2]!r} for {mutant[1]!r} the oracle of {name} is as content"


# ---- a number along the layers


def weighed(root: Path) -> dict[str, float]:
    """The weight of the second model in every layer, as a merge of zeros and ones by it shows it."""
    names = [f"layers.{i}.w.weight" for i in range(5)]
    for model, number in (("zeros", 0.0), ("ones", 1.0)):
        if not (root / model).exists():
            with folder(root / model, [Planned(n, "F32", (3,)) for n in names]) as sink:
                for n in names:
                    sink.write(n, 0, np.full(3, number, np.float32))
    said = {"merge_method": "linear", "parameters": {"normalize": False}, "models": [
        {"model": str(root / "zeros"), "parameters": {"weight": 1.0}},
        {"model": str(root / "ones"), "parameters": {"weight": [0.1, 0.9, 0.4]}}]}  # fmt: skip
    out = root / f"out{len(list(root.iterdir()))}"
    merge(parse(said), out)
    told = {}
    with Weights(out) as made:
        for n in names:
            values = np.empty(3, np.float32)
            made.read(n, 0, values)
            told[n] = float(values[0])
    return told


def by_hand() -> dict[str, float]:
    """The same by interpolation: 0.1 in the first of five layers, 0.9 in the third, 0.4 in the last one."""
    return {f"layers.{i}.w.weight": float(np.interp(i, [0, 2, 4], [0.1, 0.9, 0.4])) for i in range(5)}


def test_a_layer_off_by_one_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weighed(tmp_path) == pytest.approx(by_hand(), abs=1e-6)
    for old, new in (("t * (len(said) - 1)", "t * len(said)"), ("min(low + 1,", "min(low,"), ("* (at - low)", "* at")):
        with monkeypatch.context() as patch:
            plant(patch, ("plures.flows.merge_recipe:value", old, new))
            assert weighed(tmp_path) != pytest.approx(by_hand(), abs=1e-6), new
    real = merge_recipe.layer_of
    for by in (1, -1):
        with monkeypatch.context() as patch:
            patch.setattr(merge_recipe, "layer_of", lambda name, by=by: beside(real(name), by))
            assert weighed(tmp_path) != pytest.approx(by_hand(), abs=1e-6), by


def beside(layer: int | None, by: int) -> int | None:
    """Another layer; none for a tensor that is of none."""
    return None if layer is None else layer + by
