"""Recipes of the shapes that mergekit's examples have: they load, run on small models, and give what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import merged
from plures.core.errors import WrongUse
from plures.flows.merge import jobs, merge, sweep
from plures.flows.merge_recipe import load, parse
from plures.flows.merge_sources import opened
from tiny import make_base

# one for each of the six examples (and the one way that a comment in them names), with values and names of our own
RECIPES = {
    "linear": """
        models:
          - model: {root}/a
            parameters:
              weight: 0.9
          - model: {root}/b
            parameters:
              weight: 0.4
        merge_method: linear
        dtype: float16
        """,
    "ties": """
        models:
          - model: {root}/a
            parameters:
              density: [0.9, 0.4, 0.2] # along the layers
              weight: 1.0
          - model: {root}/b
            parameters:
              density: 0.6
              weight: [0, 0.5, 1]
          - model: {root}/c
            parameters:
              density: 0.25
              weight:
                - filter: self_attn
                  value: 0.75
                - value: 0
        merge_method: ties
        base_model: {root}/base
        parameters:
          normalize: true
          int8_mask: true
        dtype: float16
        """,
    "two_ties": """
        models:
          - model: {root}/a
            parameters:
              density: 0.4
              weight: 0.6
          - model: {root}/b
            parameters:
              density: 0.4
              weight: 0.6
        merge_method: ties
        base_model: {root}/base
        parameters:
          normalize: false
          int8_mask: true
        dtype: float16
        """,
    "gradient_slerp": """
        slices:
          - sources:
              - model: {root}/a
                layer_range: [0, 3]
              - model: {root}/b
                layer_range: [0, 3]
        merge_method: slerp
        base_model: {root}/b
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.4, 1]
            - filter: mlp
              value: [1, 0.6, 0]
            - value: 0.3 # all others
        dtype: float16
        """,
    "same_slerp": """
        models:
          - model: {root}/a
          - model: {root}/b
        merge_method: slerp
        base_model: {root}/b
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.4, 1]
            - filter: mlp
              value: [1, 0.6, 0]
            - value: 0.3
        dtype: float16
        """,
    "more_layers": """
        slices:
          - sources:
            - model: {root}/a
              layer_range: [0, 2]
          - sources:
            - model: {root}/b
              layer_range: [1, 3]
        merge_method: passthrough
        dtype: float16
        """,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("recipes")
    held = load_file(make_base(at / "base") / "model.safetensors")
    for i, name in enumerate("abc"):
        shutil.copytree(at / "base", at / name)
        r = torch.Generator().manual_seed(i)
        mine = {k: v + 0.05 * torch.randn(v.shape, generator=r) for k, v in held.items()}
        save_file(mine, at / name / "model.safetensors", {"format": "pt"})
    return at


def run(root: Path, out: Path, name: str) -> dict[str, torch.Tensor]:
    file = out.parent / f"{name}.yml"
    file.write_text(RECIPES[name].replace("{root}", str(root)))
    merge(load(file), out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(t.dtype == torch.float16 for t in load_file(out / "model.safetensors").values())
    assert model.config.vocab_size == 300 and (out / "tokenizer.json").exists()
    return load_file(out / "model.safetensors")


def tensors(root: Path, *names: str) -> list[dict[str, np.ndarray[Any, Any]]]:
    return [{k: v.double().numpy() for k, v in load_file(root / n / "model.safetensors").items()} for n in names]


def near(got: torch.Tensor, want: Any) -> None:
    """To the rounding of float16."""
    np.testing.assert_allclose(got.double().numpy(), want, rtol=1.1e-3, atol=1e-6)


def far(name: str) -> float:
    return int(name.split(".")[2]) / 2 if ".layers." in name else 0.0


def test_a_linear_recipe(root: Path, tmp_path: Path) -> None:
    a, b = tensors(root, "a", "b")
    for name, tensor in run(root, tmp_path / "out", "linear").items():
        near(tensor, (0.9 * a[name] + 0.4 * b[name]) / 1.3)


@pytest.mark.parametrize("name", ["ties", "two_ties"])
def test_ties_recipes(root: Path, tmp_path: Path, name: str) -> None:
    base, *models = tensors(root, "base", *("abc" if name == "ties" else "ab"))
    for key, tensor in run(root, tmp_path / "out", name).items():
        t = far(key)
        if name == "ties":
            density = [float(np.interp(t, [0, 0.5, 1], [0.9, 0.4, 0.2])), 0.6, 0.25]
            weight = [1.0, t, 0.75 if "self_attn" in key else 0.0]
        else:
            density, weight = [0.4, 0.4], [0.6, 0.6]
        W = np.stack([m[key].ravel() for m in models])
        given = {"weight": np.array(weight), "density": np.array(density)}
        with np.errstate(all="ignore"):
            want = merged.ties(W, base[key].ravel(), given, tensor.shape, {"normalize": name == "ties"})
        near(tensor, want.reshape(tensor.shape))


def test_slerp_recipes_of_both_kinds(root: Path, tmp_path: Path) -> None:
    a, b = tensors(root, "a", "b")
    got = run(root, tmp_path / "out", "gradient_slerp")
    for name, tensor in got.items():
        points = [0, 0.4, 1] if "self_attn" in name else [1, 0.6, 0] if "mlp" in name else [0.3] * 3
        want = merged.arc(b[name].ravel(), a[name].ravel(), float(np.interp(far(name), [0, 0.5, 1], points)))
        near(tensor, want.reshape(tensor.shape))  # from the base, whichever stands first
    run(root, tmp_path / "same", "same_slerp")
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "same"))
    assert one == two


def test_a_recipe_of_more_layers(root: Path, tmp_path: Path) -> None:
    a, b = tensors(root, "a", "b")
    got = run(root, tmp_path / "out", "more_layers")
    for out, (source, layer) in enumerate(((a, 0), (a, 1), (b, 1), (b, 2))):
        near(got[f"model.layers.{out}.mlp.down_proj.weight"], source[f"model.layers.{layer}.mlp.down_proj.weight"])
    near(got["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    near(got["model.norm.weight"], b["model.norm.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4


def test_numbers_run_along_each_slice(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.yml"
    slices = [{"sources": [{"model": str(root / n), "layer_range": [0, k]} for n in ("base", "a")]} for k in (3, 1)]
    said = {"merge_method": "task_arithmetic", "base_model": str(root / "base"), "slices": slices,
            "parameters": {"weight": [0, 1], "lambda": 1}}  # fmt: skip
    file.write_text(yaml.safe_dump(said))
    recipe = load(file)
    with opened(recipe) as sources:
        made = {j.name: j for j in jobs(recipe, sources, 0)}
    key = "model.layers.{}.mlp.up_proj.weight"
    assert [made[key.format(i)].given["weight"].tolist() for i in range(4)] == [[0], [0.5], [1], [1]]
    assert made["lm_head.weight"].given["weight"].tolist() == [0]
    assert all(j.models == (str(root / "a"),) for j in made.values())  # the base adds nothing to itself


def test_a_base_with_layers_of_its_own(root: Path, tmp_path: Path) -> None:
    """What models add is added to the base's layer that the slice names."""
    said = {"merge_method": "task_arithmetic", "base_model": str(root / "base"), "dtype": "float32", "slices": [
        {"sources": [{"model": str(root / "a"), "layer_range": [0, 1]}, {"model": str(root / "base"),
                                                                         "layer_range": [2, 3]}]},
        {"sources": [{"model": str(root / "base"), "layer_range": [1, 2]}]}]}  # fmt: skip
    (tmp_path / "r.yml").write_text(yaml.safe_dump(said))
    merge(load(tmp_path / "r.yml"), tmp_path / "out")
    got, (a, base) = load_file(tmp_path / "out" / "model.safetensors"), tensors(root, "a", "base")
    recipe, key = load(tmp_path / "r.yml"), "model.layers.{}.mlp.up_proj.weight"
    with opened(recipe) as sources:
        job = next(j for j in jobs(recipe, sources, 0) if j.name == key.format(0))
        row = np.empty(32, np.float32)
        assert job.base is not None
        job.base(0, row)
    np.testing.assert_array_equal(row, base[key.format(2)].ravel()[:32])
    near(got[key.format(0)], a[key.format(0)])  # base + 1 (a - base)
    near(got[key.format(1)], base[key.format(1)])


def besides(root: Path, method: str, names: str, base: str, **parameters: Any) -> dict[str, Any]:
    """A recipe whose base_model is `base`; models in capitals have a weight of their own."""
    models = [{"model": str(root / n.lower()), "parameters": {"weight": 0.5} if n.isupper() else {}} for n in names]
    return {"merge_method": method, "models": models, "base_model": str(root / base), "dtype": "float32",
            "parameters": parameters}  # fmt: skip


def test_a_base_model_besides_the_models_is_one_more(root: Path, tmp_path: Path) -> None:
    """As in mergekit, where the method does not work on what models add to it."""
    a, b, base = tensors(root, "a", "b", "base")
    for i, (said, want) in enumerate([
        (besides(root, "linear", "ab", "base", weight=0.4), lambda k: (a[k] + b[k] + base[k]) / 3),
        (besides(root, "linear", "ab", "a", weight=0.4), lambda k: (a[k] + b[k]) / 2),
        (besides(root, "slerp", "a", "base", t=0.25), lambda k: merged.arc(base[k].ravel(), a[k].ravel(), 0.25)),
        (besides(root, "karcher", "ab", "base", max_iter=60),
         lambda k: merged.sphere(np.stack([m[k].ravel() for m in (a, b, base)]), np.ones(3), 60)),
    ]):  # fmt: skip
        merge(parse(said), tmp_path / str(i))
        for name, tensor in load_file(tmp_path / str(i) / "model.safetensors").items():
            np.testing.assert_allclose(tensor.double().numpy().ravel(), want(name).ravel(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "names", "why"),
    [
        ("linear", "AB", "base_model '.*base' is one more model of linear, and it is not said how much it counts"),
        ("slerp", "ab", "slerp takes 2 models, and '3' are given"),
        ("passthrough", "a", "passthrough takes one model, and '2' are given"),
    ],
)
def test_a_base_model_that_is_one_too_many(root: Path, tmp_path: Path, method: str, names: str, why: str) -> None:
    with pytest.raises(WrongUse, match=why):
        merge(parse(besides(root, method, names, "base")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_spheres_around_a_base_model(root: Path, tmp_path: Path, method: str) -> None:
    """Where the recipe names one, these work on what models add to it, as in mergekit."""
    a, b, base = tensors(root, "a", "b", "base")
    merge(parse(besides(root, method, "ab", "base", weight=0.4)), tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        low = base[name].ravel()
        D = np.stack([a[name].ravel() - low, b[name].ravel() - low])
        want = low + merged.MERGINGS[method].oracle(D, low, {"weight": [0.4, 0.4]}, tensor.shape, {})
        np.testing.assert_allclose(tensor.double().numpy().ravel(), want, rtol=1e-5, atol=1e-6)


ROWS = {"nuslerp_flatten": False}
BY_FILTER = [{"filter": "mlp", "value": True}, {"value": False}]


@pytest.mark.parametrize(
    ("method", "said"),
    [("nuslerp", ROWS), ("nuslerp", ROWS | {"nuslerp_row_wise": True}), ("nuslerp", {"nuslerp_row_wise": True}),
     ("nuslerp", ROWS | {"nuslerp_row_wise": BY_FILTER}), ("nuslerp", {"nuslerp_flatten": BY_FILTER}),
     ("model_stock", {"filter_wise": True}), ("model_stock", {"filter_wise": BY_FILTER}),
     ("multislerp", {"eps": "1e-1"}), ("multislerp", {"eps": ["1e-2", 0.1, "5E-2"]}),
     ("breadcrumbs", {"density": 0.9, "gamma": "2e-1"}), ("breadcrumbs_ties", {"density": 0.9, "gamma": 0.2}),
     ("breadcrumbs", {"density": 0.9, "gamma": 0.2, "scope": "row"})],
)  # fmt: skip
def test_lines_and_edges_that_recipes_ask_for(root: Path, tmp_path: Path, method: str, said: dict[str, Any]) -> None:
    """From YAML, for which 1e-1 is a word: tensor by tensor the oracle, to the byte whatever the workers and shards."""
    a, b, base = tensors(root, "a", "b", "base")
    for name in ("a", "b"):  # a model in two files
        held = load_file(root / name / "model.safetensors")
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((root / name / "config.json").read_bytes())
        files = {k: f"{1 + i % 2}.safetensors" for i, k in enumerate(held)}
        for file in set(files.values()):
            save_file({k: v for k, v in held.items() if files[k] == file}, tmp_path / name / file)
        (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    outs = []
    for at, workers in ((root, 1), (tmp_path, 3)):
        recipe = {"merge_method": method, "base_model": str(root / "base"), "dtype": "float32", "parameters": said,
                  "models": [{"model": str(at / n)} for n in "ab"]}  # fmt: skip
        (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe).replace("'", ""))
        merge(load(tmp_path / "r.yml"), tmp_path / f"out{workers}", workers=workers)
        outs.append((tmp_path / f"out{workers}" / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]
    for name, tensor in load_file(tmp_path / "out1" / "model.safetensors").items():
        low, W = base[name].ravel(), np.stack([a[name].ravel(), b[name].ravel()])

        def at_layer(v: Any, name: str = name) -> Any:
            if v is BY_FILTER:
                return "mlp" in name
            return np.interp(far(name), [0, 0.5, 1], [float(x) for x in v]) if isinstance(v, list) else v

        here = {k: at_layer(v) for k, v in said.items()}
        given = {"weight": np.ones(2)} | {k: np.full(2, float(here.pop(k))) for k in ("density", "gamma") if k in here}
        here = {k: float(v) if k == "eps" else v for k, v in here.items()}
        on_base = method in ("nuslerp", "multislerp")
        with np.errstate(all="ignore"):
            want = merged.MERGINGS[method].oracle(W - low if on_base else W, low, given, tensor.shape, here)
        np.testing.assert_allclose(tensor.double().numpy().ravel(), want + low if on_base else want, rtol=2e-5,
                                   atol=1e-6)  # fmt: skip


@pytest.mark.parametrize(
    ("method", "said", "why"),
    [("nuslerp", "nuslerp_rowwise: true", "no parameter 'nuslerp_rowwise'. Did you mean 'nuslerp_row_wise'"),
     ("ties", "filter_wise: true", "ties has no parameter 'filter_wise'"),
     ("model_stock", "filterwise: true", "Did you mean 'filter_wise'"),
     ("multislerp", "eps: -1e-8", "multislerp.eps must be at least 0, got '-1e-08'; 1e-8 is usual"),
     ("multislerp", "eps: 1e-", "eps is '1e-'; a number")],
)  # fmt: skip
def test_lines_and_edges_that_cannot_be_meant(root: Path, tmp_path: Path, method: str, said: str, why: str) -> None:
    (tmp_path / "r.yml").write_text(f"merge_method: {method}\nbase_model: {root}/base\nparameters: {{{said}}}\n"
                                    f"models: [{{model: {root}/a}}, {{model: {root}/b}}]\n")  # fmt: skip
    with pytest.raises(WrongUse, match=why):
        merge(load(tmp_path / "r.yml"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lines_and_wholes_of_one_read(root: Path, tmp_path: Path) -> None:
    """A sweep over an option that sets the pieces: each result is what a recipe of its own makes."""
    for flatten, down in ((True, False), (False, False), (False, True)):
        said = besides(root, "nuslerp", "ab", "base", weight=0.4, nuslerp_flatten=flatten, nuslerp_row_wise=down)
        merge(parse(said), tmp_path / f"{flatten}{down}")
    said = besides(root, "nuslerp", "ab", "base", weight=0.4)
    swept = {"nuslerp_flatten": [True, False, False], "nuslerp_row_wise": [False, False, True]}
    sweep(parse(said | {"sweep": swept}), tmp_path / "all", workers=2)
    made = sorted((tmp_path / "all").glob("*/model.safetensors"))
    ones = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("FalseFalse", "FalseTrue", "TrueFalse")]
    assert len(made) == 3 and {m.read_bytes() for m in made} == set(ones) and len(set(ones)) == 3


def test_the_method_that_is_not_there(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.yml"
    file.write_text(yaml.safe_dump({"models": [{"model": str(root / "a")}, {"model": str(root / "b")}],
                                    "merge_method": "arcee_fusion", "base_model": str(root / "a")}))  # fmt: skip
    with pytest.raises(WrongUse, match="no merge method named 'arcee_fusion'"):
        merge(load(file), tmp_path / "out")
