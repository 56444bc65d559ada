"""Packing in a metric: second moments, errors as the metric counts them, and the search for the coarsest step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from packed import FINE, SITES, Variant, error, errors, fitted, fleet
from plures.core.errors import BadInput
from plures.engine.data import Example
from plures.engine.model import Base, find_sites, load_base, reference
from plures.flows import pack_metric
from plures.flows.pack_search import FINEST, TRIES, coarsest, share
from plures.pack import packs
from plures.pack._metric import LEAVES, Metric, codec, finer, fit, metric
from plures.tensors import basis
from plures.tensors.site import Site
from plures.tensors.turn import turns
from plures.tensors.warp import DAMPING, USUAL, Warp, kept, weighed

MANY = 1e6


def uneven(width: int, seed: int, fall: float = 1.2) -> Tensor:
    """A second moment whose directions have sizes from 1 down."""
    Q = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double()).Q
    return ((Q * torch.exp(-fall * torch.arange(width) ** 0.5)) @ Q.T).float()


def moments(sites: list[Site] = SITES) -> list[tuple[Tensor, Tensor]]:
    return [(uneven(s.out, 2 * i), uneven(s.into, 2 * i + 1)) for i, s in enumerate(sites)]


def damped(moment: Tensor) -> Tensor:
    """By a quarter of the mean of all but the largest twentieth of its eigenvalues."""
    values = torch.linalg.eigvalsh(moment.double())
    return moment.double() + DAMPING * values[: max(1, round(USUAL * len(values)))].mean() * torch.eye(len(moment))


def warp_of(moment: Tensor, rows: float) -> Warp:
    basis, scale, sizes = weighed(moment, rows)
    return Warp(next(turns([len(moment)], [len(scale)], basis.reshape(-1), scale)), sizes)


def test_rows_are_as_long_as_the_moment_says() -> None:
    moment, rows = uneven(40, 7), torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    warp = warp_of(moment, MANY)
    want = torch.einsum("ni,ij,nj->n", rows.double(), damped(moment), rows.double())
    assert torch.allclose(warp.there(rows).double().square().sum(1), want, rtol=0.02)
    assert torch.allclose(warp.back(warp.there(rows)), rows, atol=1e-5)


def test_of_few_rows_no_direction_is_worth_its_bits() -> None:
    moment = uneven(40, 7)
    warp = warp_of(moment, 1.0)
    rows = torch.eye(40)
    assert warp.turn.k == 0
    want = damped(moment).trace() / 40  # one mean weight for all
    assert torch.allclose(warp.there(rows).square().sum(1).double(), want.expand(40), rtol=1e-4)


def test_directions_that_few_rows_do_not_measure_are_not_free() -> None:
    few = torch.randn(3, 200, generator=torch.Generator().manual_seed(2))
    warp = warp_of(few.T @ few, MANY)  # of rank 3 of 200: less than the twentieth that is not usual
    Q = torch.linalg.qr(few.T, mode="complete").Q.T
    sizes = warp.there(Q).square().sum(1)
    assert sizes[3:].max() / sizes[3:].min() < 1.05  # alike, and at a fifth of those that were measured
    assert 0.1 < sizes[3:].mean() / sizes[:3].mean() < 0.3


@pytest.mark.parametrize("rows", [1.0, 200.0, 1000.0, 1e5])
def test_as_many_directions_are_kept_as_cost_least(rows: float) -> None:
    sizes = np.exp(-np.arange(30) / 3.0) + 0.02
    bits = []
    for k in range(31):  # log2(m) / 2 for each number of a kept direction, that of the mean for the others
        rest = 0.5 * (30 - k) * np.log2(sizes[k:].mean()) if k < 30 else 0.0
        bits.append(rows * (0.5 * np.log2(sizes[:k]).sum() + rest) + k * (8 * 30 + 48))
    k, rest = kept(sizes, rows)
    assert k == int(np.argmin(bits)) and (k == 30 or rest == pytest.approx(sizes[k:].mean()))
    assert (k > 0) == (rows > 1)


def test_errors_count_as_both_moments_say() -> None:
    pairs, variant = moments(), fleet("random", 1)[0]
    there = Metric(SITES, metric(pairs, MANY)).there(variant)
    found, want = [], []
    for site, (G, C) in zip(SITES, pairs, strict=True):
        (B, A), (b, a) = variant[site.name], there[site.name]
        D = B.double() @ A.double()
        found.append(float((b.double() @ a.double()).square().sum()))
        want.append(float((damped(G) @ D @ damped(C) @ D.T).trace()))
    ratio = np.array(found) / want
    assert ratio.std() / ratio.mean() < 0.02  # the unit is free, and one for all sites


def test_a_site_of_which_nothing_was_measured_stays_as_it_is() -> None:
    pairs, variant = moments(), fleet("random", 1)[0]
    pairs[0] = torch.zeros_like(pairs[0][0]), torch.zeros_like(pairs[0][1])
    there = Metric(SITES, metric(pairs, MANY)).there(variant)
    assert all(torch.equal(x, y) for x, y in zip(there[SITES[0].name], variant[SITES[0].name], strict=True))
    assert not torch.allclose(there[SITES[1].name][0], variant[SITES[1].name][0])


@pytest.mark.parametrize("name", list(FINE))
def test_every_packer_codes_in_it_and_comes_back(name: str) -> None:
    variants, leaves = fleet("trained"), metric(moments(), MANY)
    packer = packs.make(name, **FINE[name][-1])
    shared = fit(packer, lambda: iter(variants), SITES, leaves)
    coder, to = codec(packer, SITES, shared), Metric(SITES, leaves)
    code = coder.encode(variants[0])
    back = coder.decode(code)
    near = error(to.there(variants[0]), to.there(back))
    assert near < (0.9 if name == "jd" else 0.5)
    inner = packer.fit(lambda: (to.there(v) for v in variants), SITES)  # what it is told of, told by hand
    assert torch.equal(code, packer.codec(SITES, inner).encode(to.there(variants[0])))


def test_it_costs_fewer_bits_at_one_error_of_what_matters() -> None:
    variants, leaves = fleet("random", 16), metric(moments(), MANY)
    to, packer = Metric(SITES, leaves), packs.make("klt", error=0.2, expect=10_000)
    within = codec(packer, SITES, fit(packer, lambda: iter(variants), SITES, leaves))
    sizes = [len(within.encode(v)) for v in variants]
    lost = [error(to.there(v), to.there(within.decode(within.encode(v)))) for v in variants]
    assert max(lost) <= 0.2 * 1.01
    for plain in (fitted("klt", variants, error=e, expect=10_000) for e in (0.2, 0.15, 0.1, 0.07)):
        off = [error(to.there(v), to.there(plain.decode(plain.encode(v)))) for v in variants]
        if max(off) <= 0.2 * 1.01:
            assert sum(sizes) < 0.9 * sum(len(plain.encode(v)) for v in variants)
            return
    pytest.fail("no plain code was as near")


def test_without_a_metric_nothing_is_changed() -> None:
    variants, packer = fleet("trained"), packs.make("klt")
    shared = fit(packer, lambda: iter(variants), SITES, {})
    assert shared.keys() == packer.fit(lambda: iter(variants), SITES).keys() and not set(LEAVES) & set(shared)
    assert torch.equal(codec(packer, SITES, shared).encode(variants[0]), fitted("klt", variants).encode(variants[0]))


def test_a_codec_by_a_finer_packer_is_that_packers() -> None:
    variants, leaves = fleet("trained"), metric(moments(), MANY)
    for given in ({}, leaves):
        packer = packs.make("klt", error=0.3)
        shared = fit(packer, lambda: iter(variants), SITES, given)
        wide, way = codec(packer, SITES, shared), packer.finer(0.5)
        assert way is not None
        before, code = wide.encode(variants[0]), finer(wide, way).encode(variants[0])
        assert torch.equal(code, codec(way, SITES, shared).encode(variants[0])) and len(code) > len(before)
        assert torch.equal(wide.encode(variants[0]), before)


def test_a_damaged_metric_is_told() -> None:
    leaves = metric(moments(), MANY)
    packer = packs.make("rtn", bits=8)
    with pytest.raises(BadInput, match="is not of these 5 sites"):
        codec(packer, SITES[:5], leaves)
    with pytest.raises(BadInput, match="is not of these 6 sites"):
        codec(packer, SITES, {k: v for k, v in leaves.items() if k != LEAVES[1]})
    with pytest.raises(BadInput, match="not above 0"):
        codec(packer, SITES, leaves | {LEAVES[3]: leaves[LEAVES[3]] * 0})


# ---------------------------------------------------------------------- what is measured


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Base:
    return load_base(reference(str(base_folder)))


def rows_of(base: Base, *texts: str) -> list[Example]:
    from plures.engine.data import encode, read_rows

    return list(encode(read_rows([{"text": t} for t in texts]), base.tokenizer, max_tokens=64))


def by_offsets(base: Base, site: Site, rows: list[Example]) -> tuple[Tensor, Tensor]:
    """The moments of one site, of offsets that are added to its output, row by row and without padding."""
    module = base.model.get_submodule(site.name)
    grads, inputs = torch.zeros(site.out, site.out), torch.zeros(site.into, site.into)
    for row in rows:
        offset = torch.zeros(1, len(row.ids), site.out, requires_grad=True)
        seen: list[Tensor] = []

        def hook(_: Any, given: Any, out: Tensor, offset: Tensor = offset, seen: list[Tensor] = seen) -> Tensor:
            seen.append(given[0].detach()[0])
            return out + offset

        handle = module.register_forward_hook(hook)
        ids = torch.tensor([row.ids])
        logits = base.model(input_ids=ids).logits[0, :-1]
        handle.remove()
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        assert offset.grad is not None
        grads += offset.grad[0].T @ offset.grad[0]
        inputs += seen[0].T @ seen[0]
    return grads, inputs


def test_moments_are_those_of_gradients_and_inputs(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(base, "The parcel arrived near the garden.", "The teapot melted.", "A ladder broke, then it fell.",
                   "The window.", "The printer rattled near the engine all day long.")  # fmt: skip
    sites = find_sites(base.model, ["q_proj", "down_proj"])
    wanted = [p.requires_grad for p in base.model.parameters()]
    found = list(pack_metric.moments(base, sites, rows))
    for site, (G, C) in zip(sites, found, strict=True):
        g, c = by_offsets(base, site, rows)
        assert torch.allclose(G, g, rtol=1e-3, atol=1e-5 * float(g.abs().max()))
        assert torch.allclose(C, c, rtol=1e-3, atol=1e-5 * float(c.abs().max()))
    assert [p.requires_grad for p in base.model.parameters()] == wanted
    said: list[str] = []
    monkeypatch.setattr(basis, "MOST_MOMENTS", 1)  # a pass for every site
    again = list(pack_metric.moments(base, sites, rows, said.append))
    assert len(said) == len(sites)
    assert all(torch.equal(x, y) for one, other in zip(found, again, strict=True)
               for x, y in zip(one, other, strict=True))  # fmt: skip


def test_rows_are_taken_of_all_in_turn(base: Base, tmp_path: Path) -> None:
    for name, text in (("a", "The parcel arrived."), ("b", "The garden melted.")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{text}"}}\n' * 10)
    one = rows_of(base, "The parcel arrived.")[0]
    found = pack_metric.examples(base, str(tmp_path / "{name}.jsonl"), ["a", "b"], 4 * len(one.ids))
    words = [base.tokenizer.decode(e.ids) for e in found]
    assert 3 <= len(found) <= 5 and ["parcel" in w for w in words] == [True, False, True, False, True][: len(words)]


# ---------------------------------------------------------------------- searches


def looked(left: Any, least: float, first: int = 0) -> tuple[int | None, int]:
    seen: list[int] = []

    def at(step: int) -> float:
        seen.append(step)
        assert 0 <= step <= FINEST
        return float(left(step))

    return coarsest(at, least, first), len(seen)


@pytest.mark.parametrize("first", [0, 5, FINEST])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("lost", [0.001, 0.02, 0.05, 0.2])
def test_the_coarsest_step_that_does_is_found(lost: float, power: float, first: int) -> None:
    def left(step: int) -> float:
        return 1 - lost * share(step) ** power

    want = next((s for s in range(FINEST + 1) if left(s) >= 0.985), None)
    found, looks = looked(left, 0.985, first)
    assert found == want and looks <= TRIES
    if power == 2:
        assert looks <= 4


def jumpy() -> Iterator[dict[int, float]]:
    rng = np.random.default_rng(0)
    for _ in range(200):
        yield {s: 1 - 0.1 * share(s) ** 2 * float(rng.lognormal(0, 0.5)) for s in range(FINEST + 1)}


def test_where_the_loss_jumps_about_what_is_found_does() -> None:
    for of in jumpy():
        found, looks = looked(of.get, 0.985, 6)
        assert looks <= TRIES and (found is None or of[found] >= 0.985)
        if found is None:
            assert of[FINEST] < 0.985


def test_a_gain_that_grew_is_enough() -> None:
    assert looked(lambda _: 1.2, 0.993, 9)[0] == 0
    assert looked(lambda _: float("-inf"), 0.993)[0] is None and looked(lambda _: float("nan"), 0.993)[0] is None


def test_variants_come_back_alike_from_any_kind_of_fleet() -> None:
    leaves = metric(moments(), MANY)
    for kind in ("random", "shared", "trained"):
        variants: list[Variant] = fleet(kind)
        packer = packs.make("klt", error=0.02)
        coder = codec(packer, SITES, fit(packer, lambda v=variants: iter(v), SITES, leaves))
        to = Metric(SITES, leaves)
        inner = errors(coder, variants)
        assert max(inner) < 0.2
        assert max(error(to.there(v), to.there(coder.decode(coder.encode(v)))) for v in variants) <= 0.0202
