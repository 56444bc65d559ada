"""Every selector: exactly the budget, quotas, purity, seeds, permutations, and its oracle."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from picked import PICKS, Pick, permuted, pool
from plures.choice.pool import Budget, Pool, Quota, Selection
from plures.core.errors import WrongUse
from plures.core.folder import options_of
from plures.select import selects
from plures.tensors.rng import rng

CASES = [(name, options) for name, row in PICKS.items() for options in (row.options, *row.variants)]
PARTS = {"features", "graph", "labels", "target", "cost", "signatures", "triplets", "judge", "alike", "chosen"}
KINDS = ("may_lack", "by_group", "by_vector", "by_sum", "plain")  # of which options something else is to be read
every = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])


def choose(name: str, options: dict[str, Any], of: Pool, budget: Budget, seed: int = 0) -> Selection:
    chosen: Selection = selects.make(name, **options).choose(of, budget, rng(seed, "select"))
    return chosen


def test_every_method_has_a_row() -> None:
    assert set(PICKS) == set(selects)


@pytest.mark.parametrize("name", sorted(selects))
def test_the_oracle(name: str) -> None:
    PICKS[name].oracle()


@pytest.mark.parametrize("name", sorted(selects))
def test_options_are_scalars_with_help_and_needs_are_known(name: str) -> None:
    made = selects.make(name, **PICKS[name].options)
    assert made.needs <= PARTS
    classwide = {k for k, kind in type(made).__annotations__.items() if str(kind).startswith("ClassVar")}
    assert classwide <= {"needs", "greedy", *KINDS}, "a class variable that nobody reads: is it misspelt?"
    assert set(getattr(made, "greedy", ())) <= set(options_of(type(made)))
    said = frozenset().union(*(getattr(made, of, ()) for of in KINDS))
    assert said <= set(options_of(type(made)))
    assert inspect.getdoc(made.choose)
    for option, (_, default, text) in options_of(type(made)).items():
        assert isinstance(default, int | float | bool | str) and text, f"{name}.{option} has no help in the docstring"


@every
@pytest.mark.parametrize("k", [1, 7, 40, 160])
def test_exactly_the_budget_of_distinct_rows(name: str, options: dict[str, Any], k: int) -> None:
    got = choose(name, options, pool(), Budget(rows=k))
    assert len(got.rows) == len(set(got.rows.tolist())) == k == len(got.gains)
    assert got.rows.min() >= 0 and got.rows.max() < 160
    assert all(len(set(e.tolist())) == k and e.min() >= 0 and e.max() < 160 for e in got.later)
    assert got.weights is None or (got.weights.shape == (k,) and (got.weights >= 0).all())


@every
def test_the_pool_is_not_touched_and_the_seed_decides(name: str, options: dict[str, Any]) -> None:
    of = pool()
    assert of.features is not None and of.labels is not None and of.graph is not None
    arrays = [of.features, *of.scores.values(), of.cost, of.labels.value, of.target, of.graph.near]
    before = [np.array(a) for a in arrays]
    a, b = (choose(name, options, of, Budget(rows=20)) for _ in range(2))
    assert a.rows.tolist() == b.rows.tolist()
    assert all(np.array_equal(x, y) for x, y in zip(before, arrays, strict=True))


@every
def test_quotas_inclusions_and_exclusions(name: str, options: dict[str, Any]) -> None:
    of = pool()
    free = choose(name, options, of, Budget(rows=20)).rows
    include, exclude = np.setdiff1d(np.arange(160), free)[:2], free[:3]
    quotas = (Quota("lang", "de", least=0.45), Quota("source", "web", most=8))
    got = choose(name, options, of, Budget(rows=20, quotas=quotas, include=include, exclude=exclude))
    assert len(set(got.rows.tolist())) == 20
    assert set(include.tolist()) <= set(got.rows.tolist()) and not set(exclude.tolist()) & set(got.rows.tolist())
    lang, source = of.groups["lang"], of.groups["source"]
    assert (lang.codes[got.rows] == lang.names.index("de")).sum() >= 9
    assert (source.codes[got.rows] == source.names.index("web")).sum() <= 8
    with pytest.raises(WrongUse):
        over = (Quota("lang", "de", least=0.7), Quota("lang", "fr", least=9))
        choose(name, options, of, Budget(rows=20, quotas=over))


@every
def test_a_budget_of_tokens(name: str, options: dict[str, Any]) -> None:
    of = pool()
    assert of.cost is not None
    got = choose(name, options, of, Budget(tokens=600))
    assert 600 - 60 < of.cost[got.rows].sum() <= 600


@every
def test_rows_in_another_order_are_chosen_all_the_same(name: str, options: dict[str, Any]) -> None:
    row: Pick = PICKS[name]
    if "permute" in row.gaps:
        pytest.skip(row.gaps["permute"])
    of, order = pool(), np.random.default_rng(5).permutation(160)
    got = choose(name, options, of, Budget(rows=20)).rows
    moved = choose(name, options, permuted(of, order), Budget(rows=20)).rows
    assert set(order[moved].tolist()) == set(got.tolist())


@every
def test_a_beginning_answers_a_smaller_budget(name: str, options: dict[str, Any]) -> None:
    row: Pick = PICKS[name]
    if "nested" in row.gaps:
        pytest.skip(row.gaps["nested"])
    large, small = (choose(name, options, pool(), Budget(rows=k)).rows.tolist() for k in (30, 12))
    assert large[:12] == small
