"""Variants of a fleet as sources of a merge, its result as a variant, and a merged model as a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import plures
from merged import ties
from plures.adapt import adapts
from plures.core.errors import PluresError
from plures.flows.extract import extract
from plures.flows.merge import merge, plan
from plures.flows.merge_fleet import publish
from plures.flows.merge_recipe import parse
from plures.store import Store
from plures.tensors.variant import Variant
from tiny import QUICK, make_base

Said = dict[str, Any]


def dense(variant: Variant, site: str) -> torch.Tensor:
    """The delta of a site in float64, from the method's own definition."""
    s = next((s for s in variant.sites if s.name == site), None)
    if s is None:
        return torch.zeros(())
    method = adapts.make(variant.method, **variant.options)
    zero = torch.zeros(s.out, s.into)
    return (method.weight(zero, variant.own[site], variant.pool.get(variant.group_of[site], {})) - zero).double()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, text_rows: Path) -> Path:
    path = tmp_path_factory.mktemp("merged") / "acme.fleet"
    with plures.Fleet(path, base=str(base_folder)) as f:
        f.train("a", str(text_rows), method="mos", r=4, e=2, l=2, lr=3e-2, **QUICK)
        f.train("b", str(text_rows), method="lora", r=3, alpha=7.0, rslora=True, lr=1e-2, seed=1, **QUICK)
        f.train("whole", str(text_rows), method="full", lr=1e-3, **QUICK)
        f.train("dora", str(text_rows), method="dora", r=2, lr=1e-2, **QUICK)
        f.train("snnk", str(text_rows), method="snnk", lr=1e-2, **QUICK)
        f.train("head", str(text_rows), method="lora", r=2, lr=1e-2, modules_to_save=["lm_head"], **QUICK)
    return path


def said(fleet: Path, method: str, names: str = "a b", base: bool = False, given: Said | None = None,
         **more: Any) -> Said:  # fmt: skip
    of: Said = {"merge_method": method, "models": [
        {"model": f"{fleet}::{n}", **({"parameters": given} if given else {})} for n in names.split()]}  # fmt: skip
    return of | ({"base_model": str(fleet)} if base else {}) | more


def loaded(fleet: Path, *refs: str) -> list[Variant]:
    with Store.open(fleet) as store:
        return [store.load(store.resolve(r).ref) for r in refs]


def test_a_mean_of_variants_is_exact(fleet: Path) -> None:
    told = said(fleet, "linear", "a b@1")
    told["models"][0]["parameters"] = {"weight": 3}
    (done,) = publish(parse(told), fleet, "mean", aliases=["new"])
    a, b, made = loaded(fleet, "a", "b", "mean@new")
    assert set(done.version.parents) == {"a@1", "b@1"} and done.error < 1e-4 and done.others == ()
    assert made.provenance["merged_from"] == [f"{fleet}::a", f"{fleet}::b@1"]
    assert made.provenance["recipe"]["method"] == "linear" and made.provenance["rank"] == made.options["r"]
    for site in (s.name for s in made.sites):
        want = 0.75 * dense(a, site) + 0.25 * dense(b, site)
        assert (dense(made, site) - want).norm() < 1e-4 * want.norm()


@pytest.mark.parametrize(("method", "weight"), [("linear", 0.3), ("karcher", 0.7), ("multislerp", 0.3)])
def test_rounding_is_no_change(fleet: Path, method: str, weight: float) -> None:
    """Norms and embeddings that are equal in all models come out so but for their last bits: they have not changed."""
    told = said(fleet, method)
    told["models"][0]["parameters"] = {"weight": weight}
    (done,) = publish(parse(told), fleet.parent / ".." / fleet.parent.name / fleet.name, f"near-{method}")
    assert done.others == () and set(done.version.parents) == {"a@1", "b@1"}


def test_ties_of_variants_is_the_formula_cut_to_a_rank(fleet: Path, base_folder: Path) -> None:
    told = said(fleet, "ties", base=True, given={"weight": 0.5, "density": 0.3})
    (whole,) = publish(parse(told), fleet, "whole-ties", rank=64)
    (cut,) = publish(parse(told), fleet, "cut-ties", rank=3)
    a, b, made, small = loaded(fleet, "a", "b", "whole-ties", "cut-ties")
    held = load_file(base_folder / "model.safetensors")
    lost = total = 0.0
    assert len(made.sites) == 21 and whole.error < 1e-4
    for site in (s.name for s in made.sites):
        base = held[f"{site}.weight"].double()
        W = np.stack([(base + dense(v, site)).float().double().numpy().ravel() for v in (a, b)])
        given = {"weight": np.array([0.5, 0.5]), "density": np.array([0.3, 0.3])}
        want = torch.from_numpy(ties(W, base.numpy().ravel(), given, tuple(base.shape), {})).reshape(base.shape) - base
        assert (dense(made, site) - want).norm() < 1e-3 * want.norm()
        values = torch.linalg.svdvals(want)
        best = float(values[3:].square().sum())
        assert float((dense(small, site) - want).square().sum()) <= 1.02 * best
        lost, total = lost + best, total + float(values.square().sum())
    assert 0.1 < cut.error == pytest.approx((lost / total) ** 0.5, rel=0.02) and cut.worst >= cut.error


@pytest.mark.parametrize("names", ["a head", "whole dora"])
def test_variants_as_sources_are_their_merged_models(fleet: Path, tmp_path: Path, names: str) -> None:
    with plures.Fleet(fleet) as f:
        for name in names.split():
            f[name].export(tmp_path / name, as_="merged")
    told = said(fleet, "linear", names, dtype="float32")
    done = merge(parse(told), tmp_path / "one")
    files = {"merge_method": "linear", "models": [{"model": str(tmp_path / n)} for n in names.split()]}
    merge(parse(files), tmp_path / "two")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert set(one) == set(two) and done.cosine < 0.99
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name].float(), rtol=1e-5, atol=1e-5)
    assert plan(parse(told)).models == tuple(f"{fleet}::{n}" for n in names.split())


def test_a_mean_with_a_variant_without_factors_is_published_at_a_rank(fleet: Path) -> None:
    (done,) = publish(parse(said(fleet, "linear", "dora b")), fleet, "both", rank=32)
    assert done.error < 1e-4 and set(done.version.parents) == {"dora@1", "b@1"}


def test_whole_parameters_are_refused_kept_or_dropped(fleet: Path) -> None:
    recipe = parse(said(fleet, "linear", "a head"))
    with pytest.raises(PluresError, match=r"also changed 1 parameters that no adapter has, 'lm_head\.weight'"):
        publish(recipe, fleet, "x")
    (kept,), (dropped,) = (publish(recipe, fleet, f"x-{r}", rest=r) for r in ("keep", "drop"))  # type: ignore[arg-type]
    assert kept.others == dropped.others == ("lm_head.weight",)
    assert [list(v.extra) for v in loaded(fleet, "x-keep", "x-drop")] == [["lm_head.weight"], []]


def test_a_sweep_of_variants(fleet: Path) -> None:
    told = said(fleet, "task_arithmetic", base=True, sweep={"weight": [[1, 0], [0.5, -0.5]], "lambda": [1, 2]})
    done = publish(parse(told), fleet, "arc")
    assert [d.version.name for d in done] == ["arc-weight_1_0-lambda_1", "arc-weight_0.5_-0.5-lambda_2"]
    a, b, made = loaded(fleet, "a", "b", done[1].version.ref)
    for site in (s.name for s in made.sites):
        want = dense(a, site) - dense(b, site)
        assert (dense(made, site) - want).norm() < 1e-3 * want.norm()
    with Store.open(fleet) as store:
        before = {v.ref for v in store.versions(all=True)}
    bad = said(fleet, "task_arithmetic", base=True, sweep={"weight": [[1, 1], [0, 0]]})  # the second is the base
    with pytest.raises(PluresError, match="'bad-weight_0_0' is the fleet's base"):
        publish(parse(bad), fleet, "bad")
    with Store.open(fleet) as store:
        assert {v.ref for v in store.versions(all=True)} == before


def test_a_merged_model_is_a_base(fleet: Path, text_rows: Path, tmp_path: Path) -> None:
    merge(parse(said(fleet, "slerp", "a b", base_model=f"{fleet}::a", dtype="float32")), tmp_path / "merged")
    with plures.Fleet(tmp_path / "new.fleet", base=str(tmp_path / "merged")) as f:
        f.train("c", str(text_rows), method="lora", r=2, lr=1e-2, **QUICK)
        (answer,) = f.generate([("c", "The parcel")], max_tokens=4)
        assert answer.text is not None and f.store.base.name == str((tmp_path / "merged").resolve())
    recipe = parse(said(tmp_path / "new.fleet", "linear", "c"))
    (done,) = publish(recipe, tmp_path / "new.fleet", "again")
    assert done.version.parents == ("c@1",) and done.error < 1e-4
    with pytest.raises(PluresError, match="'y' is the fleet's base: there is nothing to extract"):
        publish(parse(said(fleet, "linear") | {"models": [{"model": str(fleet)}]}), fleet, "y", rank=1)


def test_what_cannot_be_published(fleet: Path, base_folder: Path, tmp_path: Path) -> None:
    wide = make_base(tmp_path / "wide", hidden_size=48)
    wrong: list[tuple[Said, int, str]] = [
        (said(fleet, "linear", "nobody"), 0, "'nobody'"),
        (said(fleet, "linear", "whole"), 0, "no source .* has a rank"),
        (said(fleet, "linear", "snnk"), 4, "acts on each token by itself"),
        (said(fleet, "linear") | {"models": [{"model": str(base_folder)}]}, 0, "no source .* has a rank"),
        (said(fleet, "linear"), -1, "rank must be at least 0, got -1"),
        (said(fleet, "linear") | {"models": [{"model": str(wide)}]}, 4, r"is \[300, 48\] in it and \[300, 32\] in the"),
        (said(fleet, "linear", tokenizer={"source": "base", "pad_to_multiple_of": 64}), 0, "a vocabulary of its own"),
        (said(tmp_path / "no.fleet", "linear"), 0, "no.fleet"),
    ]  # fmt: skip
    for told, rank, why in wrong:
        with pytest.raises(PluresError, match=why):
            publish(parse(told), fleet, "x", rank=rank)
    with plures.Fleet(tmp_path / "own.fleet", base=str(tmp_path / "wide")):
        held = load_file(wide / "model.safetensors")
        save_file({k: v + 1 for k, v in held.items()}, wide / "model.safetensors", {"format": "pt"})
    with pytest.raises(PluresError, match=r"own\.fleet' was made for: its weights have changed"):
        plan(parse(said(fleet, "linear") | {"models": [{"model": str(tmp_path / "own.fleet")}]}))


def test_weights_that_lie_the_other_way_round(text_rows: Path, tmp_path: Path) -> None:
    """GPT-2 keeps its weights as `[into, out]`."""
    base = make_base(tmp_path / "gpt2", kind="gpt2")
    fleet = tmp_path / "g.fleet"
    with plures.Fleet(fleet, base=str(base)) as f:
        f.train("a", str(text_rows), method="lora", r=2, lr=1e-1, **QUICK)
        f["a"].export(tmp_path / "a", as_="merged")
        f.train("d", str(text_rows), method="dora", r=2, lr=1e-1, **QUICK)
        f["d"].export(tmp_path / "d", as_="merged")
    merge(parse(said(fleet, "linear", "d", dtype="float32")), tmp_path / "dora")
    for name, tensor in load_file(tmp_path / "d" / "model.safetensors").items():
        found = load_file(tmp_path / "dora" / "model.safetensors")[name]
        torch.testing.assert_close(found, tensor.float(), rtol=1e-4, atol=1e-4)
    merge(parse(said(fleet, "linear", "a", dtype="float32")), tmp_path / "out")
    got, want = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "a"))
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor.float(), rtol=1e-4, atol=1e-4)
    assert extract(fleet, str(tmp_path / "a"), "back", rank=2).error < 1e-3
    a, back = loaded(fleet, "a", "back")
    for site in (s.name for s in back.sites):
        torch.testing.assert_close(dense(back, site), dense(a, site), rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"
