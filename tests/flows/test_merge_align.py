"""Models whose units and heads stand in another order: recovered exactly, merged as one, and how far they agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from plures.cli.app import main
from plures.core.errors import BadInput, PluresError
from plures.flows.merge import merge, plan
from plures.flows.merge_align import align, diagnose
from plures.flows.merge_fleet import publish
from plures.flows.merge_recipe import parse
from plures.flows.merge_sources import opened
from tiny import make_base

Said = dict[str, Any]
LAYERS, Q, KV, WIDTH, FFN = 2, 4, 2, 8, 24


def permuted(of: Path, to: Path, seed: int, noise: float = 0.0) -> Path:
    """A model with its hidden units and heads in a random order, by hand, and some noise."""
    shutil.copytree(of, to)
    held, r = load_file(of / "model.safetensors"), np.random.default_rng(seed)
    for i in range(LAYERS):
        at, units = f"model.layers.{i}.", torch.tensor(r.permutation(FFN))
        for name in ("gate", "up"):
            held[f"{at}mlp.{name}_proj.weight"] = held[f"{at}mlp.{name}_proj.weight"][units]
        held[f"{at}mlp.down_proj.weight"] = held[f"{at}mlp.down_proj.weight"][:, units]
        keys = r.permutation(KV)
        heads = np.concatenate([k * (Q // KV) + r.permutation(Q // KV) for k in keys])
        rows, kv_rows = (torch.tensor([h * WIDTH + j for h in hs for j in range(WIDTH)]) for hs in (heads, keys))
        for tail, index in (("q", rows), ("k", kv_rows), ("v", kv_rows)):
            for kind in ("weight", "bias"):
                if (name := f"{at}self_attn.{tail}_proj.{kind}") in held:
                    held[name] = held[name][index]
        held[f"{at}self_attn.o_proj.weight"] = held[f"{at}self_attn.o_proj.weight"][:, rows]
    g = torch.Generator().manual_seed(seed)
    held = {k: (t + noise * torch.randn(t.shape, generator=g)).contiguous() for k, t in held.items()}
    save_file(held, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def models(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a`; `b` and `c`, which are `a` in other orders; `near`, which is one with some noise. Qwen2 has biases."""
    root = tmp_path_factory.mktemp("aligned")
    a = make_base(root / "a", kind=request.param, num_hidden_layers=LAYERS, num_attention_heads=Q, hidden_size=32,
                  num_key_value_heads=KV, intermediate_size=FFN)  # fmt: skip
    held = load_file(a / "model.safetensors")
    g = torch.Generator().manual_seed(0)
    held = {k: 0.3 * torch.randn(t.shape, generator=g) if k.endswith("bias") else t for k, t in held.items()}
    save_file(held, a / "model.safetensors", {"format": "pt"})
    permuted(a, root / "b", 1)
    permuted(a, root / "c", 2)
    permuted(a, root / "near", 3, 0.02)
    return root


@pytest.fixture
def said(models: Path) -> Callable[..., Said]:
    def make(*names: str, method: str = "linear", base: str = "", **more: Any) -> Said:
        out: Said = {"merge_method": method, "models": [{"model": str(models / n), "parameters": {"weight": 0.5}}
                                                        for n in names], "align": "permutation"} | more  # fmt: skip
        return out | ({"base_model": str(models / base)} if base else {})

    return make


def logits(of: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(of).double().eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 9, 2, 77, 31, 8, 120]])).logits


def tensors(of: Path) -> dict[str, torch.Tensor]:
    return load_file(of / "model.safetensors")


def test_the_orders_of_this_test_change_no_answer(models: Path) -> None:
    torch.testing.assert_close(logits(models / "b"), logits(models / "a"), rtol=0, atol=1e-5)
    assert any(not torch.equal(t, tensors(models / "a")[k]) for k, t in tensors(models / "b").items())


def test_a_permuted_model_is_recovered_exactly(models: Path, said: Callable[..., Said], tmp_path: Path) -> None:
    lines: list[str] = []
    merge(parse(said("a", "b")), tmp_path / "ab", say=lines.append)
    for name, t in tensors(models / "a").items():
        assert torch.equal(tensors(tmp_path / "ab")[name], t), name
    assert any("aligned" in line and f"of {LAYERS * FFN} hidden units" in line for line in lines)
    assert json.loads((tmp_path / "ab" / "plures_merge.json").read_text())["recipe"]["align"] == "permutation"
    merge(parse(said("a", "b") | {"align": ""}), tmp_path / "as-they-are")
    assert (logits(tmp_path / "as-they-are") - logits(models / "a")).abs().max() > 0.1


def test_a_model_that_is_read_in_another_order_answers_as_before(
    models: Path, said: Callable[..., Said], tmp_path: Path
) -> None:
    """With all weight on the model that is permuted."""
    recipe = said("a", "near")
    recipe["models"][0]["parameters"]["weight"], recipe["models"][1]["parameters"]["weight"] = 0.0, 1.0
    merge(parse(recipe), tmp_path / "turned")
    torch.testing.assert_close(logits(tmp_path / "turned"), logits(models / "near"), rtol=0, atol=1e-5)
    one, other = tensors(tmp_path / "turned"), tensors(models / "near")
    assert any(not torch.equal(t, other[k]) for k, t in one.items())
    for k, t in tensors(models / "a").items():  # and is near to the model that stays, which it was not
        assert (one[k] - t).abs().max() < 0.2


def test_three_models_come_together_and_a_base_is_what_stays(
    models: Path, said: Callable[..., Said], tmp_path: Path
) -> None:
    merge(parse(said("b", "a", "c")), tmp_path / "bac", workers=2)
    for name, t in tensors(models / "b").items():
        torch.testing.assert_close(tensors(tmp_path / "bac")[name], t, rtol=0, atol=1e-6)
    merge(parse(said("b", "c", method="task_arithmetic", base="a")), tmp_path / "of-a")
    for name, t in tensors(models / "a").items():
        torch.testing.assert_close(tensors(tmp_path / "of-a")[name], t, rtol=0, atol=1e-6)


def test_the_order_does_not_depend_on_pieces(models: Path, said: Callable[..., Said], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from plures.engine import merging

    merge(parse(said("a", "near")), tmp_path / "whole")
    monkeypatch.setattr(merging, "CHUNK", 50)
    merge(parse(said("a", "near")), tmp_path / "pieces")
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "pieces")
    assert all(torch.equal(t, other[k]) for k, t in one.items())


def test_what_was_moved_is_told_and_equal_models_stay(said: Callable[..., Said], models: Path) -> None:
    recipe = parse(said("a", "b"))
    with opened(recipe) as sources:
        (line,) = align(recipe, sources)
        assert line.startswith(f"aligned {models / 'b'}: ")
        moved = [n for n, s in sources.items() if s.turned]
        assert moved == [str(models / "b")]
    twice = parse(said("a", "a", base="a", method="task_arithmetic"))
    with opened(twice) as sources:
        assert align(twice, sources) == [] and not any(s.turned for s in sources.values())


def test_overlaps_of_leading_directions(models: Path, said: Callable[..., Said]) -> None:
    for told in (diagnose(parse(said("a", "near"))), diagnose(parse(said("a", "near") | {"align": ""}))):
        assert all(0 <= o.overlap <= 1 and 0 < o.chance < 1 for o in told)
        assert {o.k for o in told} <= {8, 12, 16}
    aligned, before = ({o.name: o for o in diagnose(parse(said("a", "b") | {"align": how}))}
                       for how in ("permutation", ""))  # fmt: skip
    assert min(o.overlap for o in aligned.values()) == pytest.approx(1.0, abs=1e-4)
    name = "model.layers.0.mlp.up_proj.weight"
    a, b = (tensors(models / n)[name].double().numpy() for n in "ab")
    k = before[name].k
    (ua, _, va), (ub, _, vb) = np.linalg.svd(a), np.linalg.svd(b)
    want = (np.square(ua[:, :k].T @ ub[:, :k]).sum() + np.square(va[:k] @ vb[:k].T).sum()) / (2 * k)
    assert before[name].overlap == pytest.approx(want, abs=1e-3) and want < 0.9
    assert before[name].chance == pytest.approx((k / a.shape[0] + k / a.shape[1]) / 2)
    assert before["model.embed_tokens.weight"].overlap == pytest.approx(1.0, abs=1e-4)
    # of what models add to a base: nothing where one adds nothing
    assert diagnose(parse(said("b", "c", method="task_arithmetic", base="a"))) == []


def test_the_command_says_how_far_they_agree(said: Callable[..., Said], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(said("a", "near")))
    told = []
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as end:
            main(["merge", str(tmp_path / "r.yaml"), "--diagnose", *more])
        assert not end.value.code
        told.append(capsys.readouterr().out)
    assert "mean overlap" in told[0] and "by chance" in told[0]
    assert {"name", "overlap", "chance", "k"} == set(json.loads(told[1])[0])


def test_what_cannot_be_aligned_is_told(models: Path, said: Callable[..., Said], tmp_path: Path) -> None:
    with pytest.raises(PluresError, match="align 'permutations' is not 'permutation'"):
        parse(said("a", "b") | {"align": "permutations"})
    slices = [{"sources": [{"model": str(models / n), "layer_range": [0, 2]} for n in "ab"]}]
    sliced = parse({"merge_method": "linear", "slices": slices, "align": "permutation", "parameters": {"weight": 1}})
    with pytest.raises(PluresError, match="a recipe with slices has no align"):
        plan(sliced)
    with pytest.raises(PluresError, match="of slices there is nothing"):
        diagnose(sliced)
    with pytest.raises(PluresError, match="a fleet's base and its variants have in one order"):
        publish(parse(said("a", "b")), tmp_path / "x.fleet", "x")
    with pytest.raises(PluresError, match="the recipe has one"):
        diagnose(parse(said("a")))
    shutil.copytree(models / "b", tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    recipe = parse(said("a", str(tmp_path / "odd")))
    for change, why in (({"model_type": "gpt2"}, "is 'gpt2'"), ({"num_key_value_heads": 4}, "with 4")):
        (tmp_path / "odd" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(PluresError, match=why):
            plan(recipe)
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    held = tensors(models / "b")
    shutil.copytree(models / "a", tmp_path / "too")
    for folder, of in (("odd", held), ("too", tensors(models / "a"))):
        more = of | {"model.layers.0.mlp.extra.weight": torch.ones(2, 2)}
        save_file(more, tmp_path / folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"'model\.layers\.0\.mlp\.extra\.weight' is of a part that is permuted"):
        plan(parse(said(str(tmp_path / "too"), str(tmp_path / "odd"))))


@pytest.mark.parametrize(
    "wrong", [{"num_attention_heads": None}, {"num_attention_heads": 0}, {"num_key_value_heads": 3, "x": 1}]
)
def test_a_damaged_configuration_is_told(models: Path, tmp_path: Path, wrong: Said) -> None:
    shutil.copytree(models / "b", tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | wrong))
    said = {"merge_method": "linear", "align": "permutation",
            "models": [{"model": str(models / "a")}, {"model": str(tmp_path / "b")}]}  # fmt: skip
    with pytest.raises(BadInput, match=r"align: the configuration of '.*b' .*fetch it again"):
        plan(parse(said))
