"""What makes Mixture of Shards what it is: pools, draws, privacy, counts, and its ablation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plures.adapt import adapts
from plures.adapt._lay import count_trained, lay
from plures.core.errors import WrongUse
from plures.tensors.site import Site
from rows import sites


def llama(hidden: int, kv: int, ffn: int, layers: int = 32) -> list[Site]:
    return sites(hidden, ffn, layers, kv, weights=False)


@pytest.mark.parametrize(("r", "l", "p"), [(2, 1, 0), (8, 4, 1), (16, 8, 1), (32, 16, 0)])
def test_trained_counts_are_the_authors(r: int, l: int, p: int) -> None:
    """model_param_summary.txt of the authors' repository: the count does not depend on r, l or p."""
    llama2, llama3 = llama(4096, 4096, 11008), llama(4096, 1024, 14336)
    assert count_trained(adapts.make("mos", e=2, r=r, l=l, p=p), llama2) == 4_997_120
    assert count_trained(adapts.make("mos", e=8, r=max(r, 8), l=l, p=p), llama2) == 19_988_480
    assert count_trained(adapts.make("mos", e=2, r=r, l=l, p=p), llama3) == 5_242_880


def test_public_shards_are_drawn_without_replacement_and_private_ones_belong_to_one_site() -> None:
    method = adapts.make("mos", r=5, e=3, l=4, p=2)
    laid = lay(method, sites(layers=6), 0)
    for group in laid.pool:
        members = [s for s in laid.sites if laid.group_of[s.name] == group]
        public, private = (3 - 2) * 6 * 4, 2 * 6 * 4
        for side in (0, 1):
            rows = [laid.own[s.name]["index"][side].tolist() for s in members]
            for picks in rows:
                assert len(picks) == 5 * 4
                assert len(set(picks)) == len(picks), "drawn without replacement"
                assert all(i < public for i in picks[: 3 * 4])
                assert all(i >= public for i in picks[3 * 4 :])
            mine = [i for picks in rows for i in picks[3 * 4 :]]
            assert sorted(mine) == list(range(public, public + private)), "each private shard has one owner"
        assert laid.pool[group]["A"].shape[0] == public + private


def test_the_draw_is_uniform_over_the_public_pool() -> None:
    method = adapts.make("mos", r=3, e=2, l=2, p=1)
    counts = np.zeros(4 * 2)
    for seed in range(600):
        index = lay(method, [Site(f"layers.{i}.q", 4, 4) for i in range(4)], seed).own["layers.0.q"]["index"]
        counts[index[0][: 2 * 2].numpy()] += 1
    want = 600 * 4 / 8
    chi2 = ((counts - want) ** 2 / want).sum()
    assert chi2 < 24, f"chi-squared {chi2:.1f} with 7 degrees of freedom"


def test_dissociation_draws_a_and_b_apart_and_can_be_switched_off() -> None:
    for dissociate, same in ((True, False), (False, True)):
        laid = lay(adapts.make("mos", r=4, l=4, p=1, dissociate=dissociate), sites(), 0)
        alike = [bool(torch.equal(*own["index"])) for own in laid.own.values()]
        assert all(alike) if same else not any(alike)


def test_pure_sharing_gives_every_layer_the_same_whole_pool() -> None:
    method = adapts.make("mos", e=2, l=1, p=0, subset=False)
    laid = lay(method, sites(layers=4), 0)
    g = torch.Generator().manual_seed(0)
    pools = {k: {n: torch.randn(t.shape, generator=g) for n, t in v.items()} for k, v in laid.pool.items()}
    for group, pool in pools.items():
        deltas = [
            method.weight(torch.zeros(s.out, s.into), laid.own[s.name], pool)
            for s in laid.sites
            if laid.group_of[s.name] == group
        ]
        _, A = method.factors(laid.own[laid.sites[0].name], pool)
        assert A.shape[0] == 2 * 4, "the rank is e times the layers"
        assert all(torch.equal(d, deltas[0]) for d in deltas)


def test_random_scaling_differs_by_layer_and_is_never_trained() -> None:
    method = adapts.make("mos", e=2, l=1, p=0, subset=False, random_scale=1.0)
    laid = lay(method, sites(), 0)
    scales = [own["scale"] for own in laid.own.values()]
    assert "scale" in method.frozen
    assert not torch.equal(scales[0], scales[1])
    assert abs(torch.cat(scales).mean().item() - 1) < 0.25
    assert count_trained(method, sites()) == count_trained(adapts.make("mos", e=2, l=1, p=0, subset=False), sites())


def test_the_start_is_the_papers() -> None:
    laid = lay(adapts.make("mos", r=8, l=4), llama(64, 64, 96, layers=12), 0)
    for group, pool in laid.pool.items():
        into = int(group.rpartition("x")[2])
        assert not pool["B"].any()
        bound = into**-0.5  # Kaiming uniform with a = sqrt 5 and the fan-in of the whole vector, not of a shard
        assert 0.9 * bound < pool["A"].abs().max() <= bound
        assert abs(pool["A"].std().item() / (bound / 3**0.5) - 1) < 0.05


def test_layers_of_one_type_with_other_shapes_get_pools_of_their_own_at_the_same_count() -> None:
    given = [Site(f"layers.{i}.mlp.up", 8 if i % 2 else 16, 8) for i in range(6)]
    method = adapts.make("mos", r=3, e=2, l=2, p=1)
    laid = lay(method, given, 0)
    assert sorted(laid.pool) == ["layers-mlp-up_16x8", "layers-mlp-up_8x8"]
    assert laid.trained(method.frozen) == 2 * sum(s.out + s.into for s in given)


def test_indices_take_the_narrowest_integer() -> None:
    small = lay(adapts.make("mos", r=2, l=2, e=2, p=0), sites(), 0)
    assert next(iter(small.own.values()))["index"].dtype == torch.uint8
    forty = [Site(f"l.{i}.q", 8, 8) for i in range(40)]
    wide = lay(adapts.make("mos", r=2, l=4, e=2, p=0), forty, 0)
    assert next(iter(wide.own.values()))["index"].dtype == torch.int16
    assert (
        count_trained(adapts.make("mos", r=2, l=4, e=2, p=0), [Site(f"l.{i}.q", 8, 8) for i in range(40)])
        == 2 * 16 * 40
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 0}, "mos.r must be at least 1"),
        ({"l": 0}, "mos.l must be at least 1"),
        ({"e": 0}, "mos.e must be above 0"),
        ({"p": 3}, r"mos.p must be in \[0"),
        ({"p": 2, "r": 4}, "leaves no public shards"),
        ({"subset": False}, "needs p = 0"),
        ({"random_scale": -1.0}, "random_scale must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options: dict[str, float], says: str) -> None:
    with pytest.raises(WrongUse, match=says):
        adapts.make("mos", **options)


def test_a_rank_larger_than_the_pool_says_what_is_possible() -> None:
    with pytest.raises(WrongUse, match=r"mos.r = 9 is larger than the pool: 4 layers .* so r is at most 5"):
        lay(adapts.make("mos", r=9, e=2, l=4, p=1), sites(layers=4), 0)


def test_a_width_that_the_shards_do_not_divide_names_a_divisor() -> None:
    with pytest.raises(WrongUse, match=r"mos.l = 5 does not divide .* choose a divisor, for instance 4"):
        lay(adapts.make("mos", r=2, l=5, p=0), sites(), 0)


def test_a_fractional_equivalent_rank_must_make_whole_vectors() -> None:
    with pytest.raises(WrongUse, match=r"times 4 layers is 1\.2 vectors"):
        lay(adapts.make("mos", r=1, e=0.3, l=1, p=0), sites(layers=4), 0)
