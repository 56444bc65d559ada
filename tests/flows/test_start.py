"""Runs that start from a variant: shared pools learned once, and variants that hold little of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plures.core.errors import WrongUse
from plures.core.recipe import load
from plures.flows.recipes import TrainRecipe
from plures.flows.train import plan, train
from plures.store import Store

FREEZE = ["start.take=[A, B, index, gate]", "start.freeze=[A, B]"]


@pytest.fixture
def recipe(make_fleet: Callable[..., Path], text_rows: Path) -> Callable[..., TrainRecipe]:
    fleet = make_fleet()

    def make(*said: str) -> TrainRecipe:
        data = {"train": str(text_rows), "max_tokens": 24}
        quick = {"steps": 4, "batch_rows": 2, "lr": 0.05, "save_every": 2}
        adapt = {"method": "fleet_mos", "r": 4, "e": 2, "l": 2, "p": 1}
        return load(TrainRecipe, {"fleet": str(fleet), "name": "v", "data": data, "train": quick, "adapt": adapt}, said)

    return make


def test_variants_that_start_from_one_hold_its_pool_once(recipe: Callable[..., TrainRecipe]) -> None:
    shared = train(recipe("name=shared")).version
    made = [train(recipe(f"name=tenant{i}", "start.variant=shared", *FREEZE, f"seed={i}")).version for i in range(3)]
    with Store.open(Path(recipe().fleet)) as store:
        whole = store.load("shared")
        for version in made:
            mine = store.load(version.ref)
            assert version.parents == (shared.ref,)
            assert mine.provenance["start"] == {"variant": "shared@1", "identity": shared.identity}
            for group, leaves in whole.pool.items():
                assert all(torch.equal(mine.pool[group][k], t) for k, t in leaves.items())
            same = [torch.equal(mine.own[s][k], t) for s, own in whole.own.items() for k, t in own.items()]
            assert not all(same)
        pools = sum(t.nbytes for leaves in whole.pool.values() for t in leaves.values())
        own = sum(t.nbytes for leaves in whole.own.values() for t in leaves.values())
        assert all(v.trained == plan(recipe("start.variant=shared", *FREEZE)).trained for v in made)
        on_disk = sum(p.stat().st_size for p in (Path(recipe().fleet) / "blobs").rglob("*.safetensors"))
        assert on_disk < pools + 4 * own + 4 * 25_000  # of four variants: the pool once, and headers


def test_a_start_that_takes_everything_goes_on_where_it_was(recipe: Callable[..., TrainRecipe]) -> None:
    train(recipe("name=shared"))
    again = train(recipe("name=more", "start.variant=shared@1", "train.lr=1e-12", "seed=5"))
    with Store.open(Path(recipe().fleet)) as store:
        before, after = store.load("shared"), store.load(again.version.ref)
    for key, t in before.flat().items():
        torch.testing.assert_close(after.flat()[key], t, rtol=0, atol=1e-6)


def test_ranks_of_earlier_tasks_are_kept_and_frozen(recipe: Callable[..., TrainRecipe]) -> None:
    train(recipe("name=task", "adapt={method: moram, r: 2}"))
    train(recipe("name=task", "adapt={method: moram, r: 2, old: 2}", "start.variant=task@1"))
    with Store.open(Path(recipe().fleet)) as store:
        first, second = store.load("task@1"), store.load("task@2")
        assert store.resolve("task@2").parents == ("task@1",)
    for site, own in second.own.items():
        assert torch.equal(own["A_old"], first.own[site]["A"]) and torch.equal(own["B_old"], first.own[site]["B"])
        assert not torch.equal(own["B"], first.own[site]["B"])
    with pytest.raises(WrongUse, match="set old to 4"):
        train(recipe("name=task", "adapt={method: moram, r: 2, old: 2}", "start.variant=task@2", "seed=3"))


def test_a_resumed_start_is_of_the_same_variant(recipe: Callable[..., TrainRecipe]) -> None:
    train(recipe("name=shared", "aliases=[prod]"))

    class Stop:
        def __call__(self, kind: str, fields: object) -> None:
            if kind == "checkpoint":
                raise KeyboardInterrupt

    said = ("name=tenant", "start.variant=shared@prod", *FREEZE)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(*said), sinks=(Stop(),))
    whole = train(recipe("name=other", "start.variant=shared@prod", *FREEZE))
    resumed = train(recipe(*said), resume=True)
    assert resumed.version.identity == whole.version.identity
    with pytest.raises(KeyboardInterrupt):
        train(recipe(*said, "seed=9"), sinks=(Stop(),))
    train(recipe("name=shared", "aliases=[prod]", "seed=3"))
    with pytest.raises(Exception, match="started_from"):
        train(recipe(*said, "seed=9"), resume=True)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (["start.variant=shared", "start.freeze=[C]"], "no tensors called 'C'"),
        (["start.freeze=[A]"], "name it in start.variant"),
        (["start.variant=shared", "start.freeze=[A, B, a, b, gate]"], "nothing to train"),
        (["start.variant=shared", "adapt.p=2"], "the same method and options"),
        (["start.variant=shared", "layers=[0, 1]"], "train the same layers"),
        (["start.variant=nobody"], "nobody"),
    ],
)
def test_a_start_that_does_not_fit_is_told(recipe: Callable[..., TrainRecipe], said: list[str], why: str) -> None:
    train(recipe("name=shared"))
    with pytest.raises(WrongUse, match=why):
        train(recipe("name=tenant", *said))
