"""Sweeps: several results of one read, each as a recipe of its own makes it, all there or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import plures
from plures.core.errors import DiskTrouble, PluresError, WrongUse
from plures.flows.combine import combine, soups
from plures.flows.merge import merge, plan, sweep
from plures.flows.merge_recipe import parse
from plures.flows.merge_sweep import points
from plures.store import Store
from plures.tensors import weights
from plures.tensors.weights import Sink, Weights
from tiny import QUICK, make_base

Said = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two models of it, wide enough that tensors have several pieces."""
    root = tmp_path_factory.mktemp("swept")
    base = make_base(root / "base", hidden_size=256, vocab_size=600)
    held = load_file(base / "model.safetensors")
    for i, name in enumerate("ab"):
        shutil.copytree(base, root / name)
        r = torch.Generator().manual_seed(i)
        mine = {k: v + 0.05 * torch.randn(v.shape, generator=r) for k, v in held.items()}
        save_file(mine, root / name / "model.safetensors", {"format": "pt"})
    return root


def said(models: Path, method: str, base: bool, swept: Said, **more: Any) -> Said:
    of: Said = {"merge_method": method, "models": [{"model": str(models / n)} for n in "ab"], "dtype": "float32"}
    return of | ({"base_model": str(models / "base")} if base else {}) | {"sweep": swept} | more


CASES: dict[str, tuple[bool, Said, list[str]]] = {
    "linear": (False, {"weight": 3}, ["weight_1_0", "weight_0.5_0.5", "weight_0_1"]),
    "ties": (True, {"density": [0.2, [0.5, 1]], "lambda": [1, 0.5]},
             ["density_0.2-lambda_1", "density_0.5_1-lambda_0.5"]),
    "slerp": (False, {"t": [0.25, [{"filter": "mlp", "value": 1}, {"value": 0}]]}, ["t_0.25", "2"]),
    "della": (True, {"weight": [[1, 0.5], [0.5, 1]]}, ["weight_1_0.5", "weight_0.5_1"]),
    "cabs": (True, {"m": [8, 96], "n": [4, 32]}, ["m_8-n_4", "m_96-n_32"]),  # pieces of two lengths
}  # fmt: skip


@pytest.mark.parametrize("method", CASES)
def test_every_point_is_what_its_own_recipe_makes(models: Path, tmp_path: Path, method: str) -> None:
    base, swept, names = CASES[method]
    more = {"parameters": {"density": 0.7}} if method == "della" else {}
    told = said(models, method, base, swept, **more)
    if method == "slerp":
        told["base_model"] = str(models / "a")
    recipe = parse(told)
    done = sweep(recipe, tmp_path / "out", workers=2)
    assert [Path(d.out).name for d in done] == names == sorted(names, key=names.index)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names)
    for name, alone in points(recipe).items():
        one = merge(alone, tmp_path / "alone" / name)
        for file in (tmp_path / "alone" / name).iterdir():
            assert (tmp_path / "out" / name / file.name).read_bytes() == file.read_bytes(), file.name
        mine = next(d for d in done if d.out == str(tmp_path / "out" / name))
        assert (mine.cosine, mine.length_over_mean, mine.n_bytes) == (one.cosine, one.length_over_mean, one.n_bytes)
    assert len({(tmp_path / "out" / n / "model.safetensors").read_bytes() for n in names}) == len(names)


def test_a_line_is_the_line(models: Path, tmp_path: Path) -> None:
    sweep(parse(said(models, "linear", False, {"weight": 5})), tmp_path / "out")
    a, b = (load_file(models / n / "model.safetensors") for n in "ab")
    for share in (0, 0.25, 0.5, 0.75, 1):
        got = load_file(tmp_path / "out" / f"weight_{1 - share:g}_{share:g}" / "model.safetensors")
        for name, tensor in got.items():
            want = (1 - share) * a[name].double() + share * b[name].double()
            torch.testing.assert_close(tensor.double(), want, rtol=1e-6, atol=1e-7)


def test_the_models_are_read_once(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    raw = Weights.raw
    monkeypatch.setattr(Weights, "raw", lambda s, name, start, n: counts.append(n) or raw(s, name, start, n))
    one, many = said(models, "linear", False, {}), said(models, "linear", False, {"weight": 9})
    del one["sweep"]
    read = []
    for i, told in enumerate((one, many)):
        plans = plan(parse(told))
        counts.clear()
        (sweep if told.get("sweep") else merge)(parse(told), tmp_path / str(i))
        size = sum(t.numel() for t in load_file(models / "a" / "model.safetensors").values())
        assert plans.read_bytes == 2 * 4 * size and plans.write_bytes == (9 if i else 1) * 4 * size
        read.append(sum(counts))
    assert read[1] == read[0] < 4 * size  # all of both, and a few pieces again to say how they lie
    assert len(plans.outputs) == 9 and "9 results: weight_1_0" in plans.lines()[1]


def test_all_are_there_or_none(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse(said(models, "linear", False, {"weight": 3}))
    written, wrote = [0], Sink.close

    def dies(self: Any, sync: bool) -> None:
        written[0] += sync
        if written[0] == 3:
            raise KeyboardInterrupt
        wrote(self, sync)

    monkeypatch.setattr(Sink, "close", dies)
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, tmp_path / "out")
    assert written[0] >= 3 and list(tmp_path.iterdir()) == []
    size = sum(t.numel() for t in load_file(models / "a" / "model.safetensors").values()) * 4
    room = shutil.disk_usage(tmp_path)._replace(free=2 * size)  # enough for one or two of three
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: room)
    with pytest.raises(DiskTrouble, match="nothing was written"):
        sweep(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("swept", "why"),
    [
        ({"wieght": [1, 2]}, r"sweep: linear has no parameter 'wieght'\. Did you mean 'weight'"),
        ({"weight": 1}, "'weight' has 1; a list of at least two values"),
        ({"weight": [[1, 0]]}, "a list of at least two values"),
        ({"weight": [[1, 0, 0], [0, 1]]}, r"'weight' has the value \[1, 0, 0\], and 2 models are there"),
        ({"weight": [[1, 0], [1.0, 0.0]]}, "two of its points are 'weight_1_0'"),
        ({"weight": 3, "normalize": [True, False]}, "sweep has 3 values of 'weight', 2 values of 'normalize'"),
        ({"normalize": 3}, "'normalize' has 3, which is meant for the weights of two models"),
        ([1, 2], "sweep names parameters with a list"),
        ({"weight": [["much", 0], [0, 1]]}, "weight of .* is 'much'"),
    ],
)
def test_what_a_sweep_cannot_mean(models: Path, swept: Any, why: str) -> None:
    with pytest.raises(PluresError, match=why):
        plan(parse(said(models, "linear", False, swept)))


def test_merge_and_sweep_are_told_apart(models: Path, tmp_path: Path) -> None:
    told = said(models, "linear", False, {"weight": 3})
    with pytest.raises(WrongUse, match=r"the recipe has a sweep"):
        merge(parse(told), tmp_path / "x")
    del told["sweep"]
    with pytest.raises(WrongUse, match="the recipe has no sweep"):
        sweep(parse(told), tmp_path / "x")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, text_rows: Path) -> Path:
    path = tmp_path_factory.mktemp("soups") / "acme.fleet"
    with plures.Fleet(path, base=str(base_folder)) as f:
        f.train("a", str(text_rows), method="mos", r=4, e=2, l=2, lr=3e-2, **QUICK)
        f.train("b", str(text_rows), method="lora", r=3, alpha=7.0, lr=1e-2, seed=1, **QUICK)
    return path


def test_soups_of_two_variants(fleet: Path) -> None:
    done = soups(fleet, ["a", "b"], "soup", 5)
    assert [d.version.ref for d in done] == [f"soup-{s}@1" for s in ("0", "0.25", "0.5", "0.75", "1")]
    assert all(d.error == 0 and set(d.version.parents) == {"a@1", "b@1"} for d in done)
    one = combine(fleet, {"a": 0.75, "b": 0.25}, "one")
    assert one.version.identity == done[1].version.identity  # the same tensors, by the single way
    with Store.open(fleet) as store:
        assert store.load("soup-0.25").provenance["combined"] == {"a@1": 0.75, "b@1": 0.25}
    assert soups(fleet, ["a", "b"], "cut", 2, rank=1)[1].error > 0
    for wrong, why in ((["a"], "between two variants, and 1"), (["a", "a"], "between two"), (["a", "x"], "'x'")):
        with pytest.raises(PluresError, match=why):
            soups(fleet, wrong, "soup", 3)
    for many, why in ((1, "at least 2 points, got 1"),):
        with pytest.raises(WrongUse, match=why):
            soups(fleet, ["a", "b"], "soup", many)


def test_a_sweep_says_where_each_is_from(models: Path, tmp_path: Path) -> None:
    sweep(parse(said(models, "linear", False, {"weight": [[1, 2], 0.5]})), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "weight_1_2" / "plures_merge.json").read_text())
    assert [m["parameters"]["weight"] for m in told["recipe"]["models"]] == [1, 2]
