"""Conformance: what every adapter must do, over every row of `rows.ADAPT`."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from plures.adapt import Adapter, Insert, adapts
from plures.adapt._lay import Laid, count_trained, lay
from plures.core.folder import options_of
from rows import ADAPT, sites

START = 1e-6  # float32's rounding of a weight that is taken apart and put together again
CASES = [
    pytest.param(name, options, id=f"{name}-{'-'.join(f'{k}{v}' for k, v in options.items())}")
    for name, row in ADAPT.items()
    for options in (row.options, *row.variants)
]


def awake(laid: Laid, frozen: frozenset[str], seed: int = 0) -> Laid:
    """The same tensors with every trained one random, so that no zero hides a mistake; float64."""
    g = torch.Generator().manual_seed(seed)

    def wake(leaves: Any) -> dict[str, torch.Tensor]:
        return {
            k: t
            if not t.is_floating_point()
            else t.double()
            if k in frozen
            else torch.randn(t.shape, generator=g, dtype=torch.float64)
            for k, t in leaves.items()
        }

    own = {s: wake(v) for s, v in laid.own.items()}
    return Laid(laid.sites, laid.group_of, own, {p: wake(v) for p, v in laid.pool.items()})


def defined(method: Any, W: torch.Tensor, x: torch.Tensor, own: Any, pool: Any) -> torch.Tensor:
    """What the method puts out, by its definition."""
    if hasattr(method, "act"):
        out: torch.Tensor = method.act(x, x @ W.T, own, pool)
        return out
    weight: torch.Tensor = method.weight(W, own, pool)
    return x @ weight.T


def fast(method: Any, W: torch.Tensor, x: torch.Tensor, y: torch.Tensor, own: Any, pool: Any) -> torch.Tensor:
    """What the method puts out, as it is trained; without a fast form, as the bridge does it."""
    run = getattr(method, "act", None) or getattr(method, "forward", None)
    out: torch.Tensor = run(x, y, own, pool) if run else y + x @ (method.weight(W, own, pool) - W).T
    return out


def pool_of(laid: Laid, site: str) -> Any:
    return laid.pool.get(laid.group_of[site], {})


def test_every_method_has_a_row_and_every_row_a_method() -> None:
    assert set(adapts) == set(ADAPT)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_it_is_an_adapter_whose_options_are_scalars_with_help(name: str, options: dict[str, Any]) -> None:
    method = adapts.make(name, **options)
    assert isinstance(method, Adapter) != isinstance(method, Insert), "one definition: weight, or act"
    slow = ADAPT[name].gaps.get("forward")
    assert (hasattr(method, "act") or hasattr(method, "forward")) != bool(slow), "a fast form, or why there is none"
    if hasattr(method, "act"):
        assert not any(hasattr(method, n) for n in ("factors", "shards", "forward")), "no weight stands for it"
    for option, (_, default, text) in options_of(type(method)).items():
        assert isinstance(default, int | float | bool | str), option
        assert text, f"{name}.{option} has no help in the docstring"


@pytest.mark.parametrize(("name", "options"), CASES)
def test_it_starts_as_the_identity(name: str, options: dict[str, Any]) -> None:
    method = adapts.make(name, **options)
    laid = lay(method, sites(), seed=1)
    for site in laid.sites:
        own, pool, x = laid.own[site.name], pool_of(laid, site.name), torch.randn(2, 3, site.into)
        assert site.W is not None
        if hasattr(method, "weight"):
            torch.testing.assert_close(method.weight(site.W, own, pool), site.W, rtol=0, atol=START)
        y = x @ site.W.T
        torch.testing.assert_close(fast(method, site.W, x, y, own, pool), y, rtol=0, atol=10 * START)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_fast_path_equals_the_definition(name: str, options: dict[str, Any]) -> None:
    method = adapts.make(name, **options)
    laid = awake(lay(method, sites(), seed=1), method.frozen)
    for site in laid.sites:
        own, pool = laid.own[site.name], pool_of(laid, site.name)
        assert site.W is not None
        W, x = site.W.double(), torch.randn(2, 3, site.into, dtype=torch.float64)
        y = x @ W.T
        want = defined(method, W, x, own, pool)
        assert (want - y).abs().max() > 1e-3, "the adapter does nothing, so nothing is tested"
        each = torch.stack([fast(method, W, x[i, j], y[i, j], own, pool) for i in range(2) for j in range(3)])
        torch.testing.assert_close(each.view_as(want), want, rtol=1e-9, atol=1e-9)  # each token by itself
        if hasattr(method, "forward"):
            torch.testing.assert_close(method.forward(x, y, own, pool), want, rtol=1e-9, atol=1e-9)
        if hasattr(method, "factors"):
            B, A = method.factors(own, pool)
            torch.testing.assert_close(W + B @ A, method.weight(W, own, pool), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_nothing_is_changed_in_place(name: str, options: dict[str, Any]) -> None:
    method = adapts.make(name, **options)
    laid = awake(lay(method, sites(), seed=1), method.frozen)
    site = laid.sites[0]
    own, pool = laid.own[site.name], pool_of(laid, site.name)
    W, x, y = (
        torch.randn(site.out, site.into).double(),
        torch.randn(5, site.into).double(),
        torch.randn(5, site.out).double(),
    )
    before = [t.clone() for t in (W, x, y, *own.values(), *pool.values())]
    defined(method, W, x, own, pool)
    fast(method, W, x, y, own, pool)
    if hasattr(method, "aux"):
        assert method.aux(x, own, pool).shape == ()
    for now, then in zip((W, x, y, *own.values(), *pool.values()), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_trained_number_that_is_picked_gets_a_gradient_equal_to_the_definitions(
    name: str, options: dict[str, Any]
) -> None:
    method = adapts.make(name, **options)
    laid = awake(lay(method, sites(layers=4), seed=1), method.frozen)
    trained = {
        (where, k): t.requires_grad_()
        for where, leaves in (*laid.own.items(), *laid.pool.items())
        for k, t in leaves.items()
        if t.is_floating_point() and k not in method.frozen
    }
    grads = []
    for path in ("definition", "forward"):
        loss = torch.zeros((), dtype=torch.float64)
        for i, site in enumerate(laid.sites):
            g = torch.Generator().manual_seed(i)
            x = torch.randn(4, site.into, dtype=torch.float64, generator=g)
            assert site.W is not None
            W = site.W.double()
            own, pool = laid.own[site.name], pool_of(laid, site.name)
            by = path == "definition"
            out = defined(method, W, x, own, pool) if by else fast(method, W, x, x @ W.T, own, pool)
            loss = loss + out.square().sum()
        grads.append(torch.autograd.grad(loss, list(trained.values())))
    for key, slow, quick in zip(trained, *grads, strict=True):
        torch.testing.assert_close(quick, slow, rtol=1e-8, atol=1e-8)
        assert slow.abs().sum() > 0, f"{key} gets no gradient"


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_same_seed_gives_the_same_tensors_whatever_the_order_of_the_sites(
    name: str, options: dict[str, Any]
) -> None:
    method, given = adapts.make(name, **options), sites(layers=12 if name == "mos" else 4)
    gap = ADAPT[name].gaps.get("seeds")
    shuffled = random.Random(0).sample(given, len(given))
    one, two, other = lay(method, given, 7), lay(method, shuffled, 7), lay(method, given, 8)
    assert one.sites == two.sites
    differ = False
    for room in ("own", "pool"):
        a, b, c = getattr(one, room), getattr(two, room), getattr(other, room)
        assert a.keys() == b.keys()
        for key, leaves in a.items():
            for k, t in leaves.items():
                assert torch.equal(t, b[key][k])
                differ |= not torch.equal(t, c[key][k])
    assert differ or gap, "another seed must give other tensors"


@pytest.mark.parametrize("name", ADAPT)
def test_the_trained_count_is_the_papers_formula(name: str) -> None:
    row, given = ADAPT[name], sites()
    method = adapts.make(name, **row.options)
    blind = sites(weights=False)
    assert count_trained(method, blind) == lay(method, given, 0).trained(method.frozen) == row.trained(given)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_plan_allocates_nothing(name: str, options: dict[str, Any]) -> None:
    method = adapts.make(name, **options)
    with torch.device("meta"):
        laid = lay(method, sites(weights=False), 0)
    real = lay(method, sites(), 0)
    for room in ("own", "pool"):
        for key, leaves in getattr(laid, room).items():
            for k, t in leaves.items():
                assert t.device.type == "meta"
                assert (t.shape, t.dtype) == (getattr(real, room)[key][k].shape, getattr(real, room)[key][k].dtype)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_groups_are_names_that_a_module_may_bear(name: str, options: dict[str, Any]) -> None:
    method = adapts.make(name, **options)
    for site in sites():
        assert "." not in method.group(site)


@pytest.mark.parametrize("name", ADAPT)
def test_half_precision_stays_near_the_definition(name: str) -> None:
    method = adapts.make(name, **ADAPT[name].options)
    laid = awake(lay(method, sites(), seed=1), method.frozen)
    site = laid.sites[0]
    own, pool = laid.own[site.name], pool_of(laid, site.name)
    assert site.W is not None
    W, x = site.W.double(), torch.randn(6, site.into).double()
    want = fast(method, W, x, x @ W.T, own, pool)
    for dtype, rtol in ((torch.float32, 1e-4), (torch.bfloat16, 0.06)):
        half = {k: t.to(dtype) if t.is_floating_point() else t for k, t in own.items()}
        halves = {k: t.to(dtype) if t.is_floating_point() else t for k, t in pool.items()}
        got = fast(method, W.to(dtype), x.to(dtype), (x @ W.T).to(dtype), half, halves)
        assert got.dtype == dtype
        assert np.abs((got.double() - want).numpy()).max() <= rtol * want.abs().max().item()
