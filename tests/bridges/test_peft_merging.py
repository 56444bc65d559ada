"""Merging, weighted sums of adapters, and their deltas against formulas and PEFT's own LoRA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from plugged import LOW_RANK, TARGETS, adapted, base, config, crowd, logits, merging, sites
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from plures.bridges.peft import PluresLayer
from plures.core.errors import WrongUse

# Merging. -----------------------------------------------------------------------------------------------------------


@merging
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(method: str, safe_merge: bool) -> None:
    model, weights = adapted(method), {k: v.clone() for k, v in base().state_dict().items()}
    before = logits(model)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    for name, layer in sites(model).items():
        torch.testing.assert_close(layer.base_layer.weight.data, weights[f"{name}.weight"], rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base()), rtol=1e-4, atol=1e-5)
    plain = model.merge_and_unload(safe_merge=safe_merge)
    assert isinstance(plain, LlamaForCausalLM)
    assert not any(isinstance(m, PluresLayer) for m in plain.modules())
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-5)


@merging
def test_several_adapters_merge_as_they_act(method: str) -> None:
    model = adapted(method)
    model.add_adapter("other", config("full", seed=2))
    model.base_model.set_adapter(["default", "other"])
    before = logits(model.eval())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@merging
def test_a_broken_adapter_is_not_merged_safely(method: str) -> None:
    model = adapted(method)
    weights = {k: v.clone() for k, v in base().state_dict().items()}
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    for name, layer in sites(model).items():
        assert torch.equal(layer.base_layer.weight, weights[f"{name}.weight"])


def summed(model: PeftModel, parts: dict[str, float]) -> dict[str, Tensor]:
    """The weighted sum of the deltas of `parts` at every site, in float64, from the tensors themselves."""
    out: dict[str, Tensor] = {}
    for adapter, weight in parts.items():
        for name, layer in sites(model, adapter).items():
            rooms = layer.tensors(adapter)
            own, pool = ({k: t.double() if t.is_floating_point() else t for k, t in room.items()} for room in rooms)
            W = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
            out[name] = out.get(name, 0) + weight * layer.methods[adapter].weight(W, own, pool).detach()
    return out


@pytest.mark.parametrize(
    "parts", [{"mos": 1.0, "lora": -0.5}, {"vera": 2.0, "mos": 0.25}, {"full": 1.0, "lora": 3.0}, {"mos": -1.0}]
)
def test_a_weighted_sum_is_exact(parts: dict[str, float], tmp_path: Path) -> None:
    model = crowd()
    model.add_weighted_adapter(list(parts), list(parts.values()), "sum")
    want = summed(model, parts)
    assert sites(model, "sum").keys() == want.keys()
    for name, layer in sites(model, "sum").items():
        torch.testing.assert_close(layer.get_delta_weight("sum").double(), want[name], rtol=1e-5, atol=1e-6)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(base(), tmp_path / "sum").eval()
    torch.testing.assert_close(logits(again), logits(model.eval()), rtol=0, atol=0)


def test_a_truncated_sum_is_the_best_of_its_rank() -> None:
    model = crowd()
    model.add_weighted_adapter(["mos", "lora"], [1.0, -0.5], "best", combination_type="svd", svd_rank=3)
    for name, layer in sites(model, "best").items():
        exact = summed(model, {"mos": 1.0, "lora": -0.5})[name].numpy()
        got = layer.get_delta_weight("best").double().numpy()
        tail = np.linalg.svd(exact, compute_uv=False)[3:]
        assert np.linalg.matrix_rank(got, tol=1e-5) <= 3
        assert np.linalg.norm(got - exact) == pytest.approx(np.linalg.norm(tail), rel=1e-4, abs=1e-5)
    model.add_weighted_adapter(["mos", "lora"], [1.0, 1.0], "largest", combination_type="svd")
    assert model.peft_config["largest"].options["r"] == 4


def test_sums_without_meaning_are_refused() -> None:
    model = crowd()
    with pytest.raises(WrongUse, match="'linear' is not one of 'cat'"):
        model.add_weighted_adapter(["mos", "lora"], [1.0, 1.0], "sum", combination_type="linear")
    with pytest.raises(ValueError, match="Adapter nobody does not exist"):
        model.add_weighted_adapter(["mos", "nobody"], [1.0, 1.0], "sum")
    with pytest.raises(WrongUse, match="2 adapters and 1 weights"):
        model.add_weighted_adapter(["mos", "lora"], [1.0], "sum")
    model.add_adapter("head", config("lora", modules_to_save=["lm_head"]))
    with pytest.raises(WrongUse, match="'head' has modules_to_save"):
        model.add_weighted_adapter(["mos", "head"], [1.0, 1.0], "sum")
    assert "sum" not in model.peft_config


# Oracles. -----------------------------------------------------------------------------------------------------------


def test_the_delta_of_mos_is_the_papers_formula(tmp_path: Path) -> None:
    """From the file alone, in float64 numpy: A and B join rows i::l of the picked shards along the features."""
    model = adapted("mos", r=3)
    model.save_pretrained(tmp_path)
    stored = {k: v.double().numpy() for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    options = {"alpha": 16.0, **PeftConfig.from_pretrained(tmp_path).options}
    r, l = options["r"], options["l"]
    for kind in TARGETS:
        keys = sorted(k for k in stored if f".{kind}.plures_own.index" in k)
        (pool_a,) = (v for k, v in stored.items() if f".{kind}.plures_pool.A" in k)
        (pool_b,) = (v for k, v in stored.items() if f".{kind}.plures_pool.B" in k)
        private = [stored[k].astype(int)[:, -options["p"] * l :] for k in keys]
        assert not set(private[0].ravel()) & set(private[1].ravel())
        for key in keys:
            index = stored[key].astype(int)
            factors = []
            for picks, pool in zip(index, (pool_a, pool_b), strict=True):
                factors.append(np.concatenate([pool[picks[i::l]] for i in range(l)], axis=1))
            A, B = factors
            assert A.shape[0] == B.shape[0] == r
            layer = sites(model)[key.removeprefix("base_model.model.").removesuffix(".plures_own.index")]
            got = layer.get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(got, options["alpha"] / r * B.T @ A, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", LOW_RANK)
def test_exported_factors_in_pefts_own_lora_give_the_same_logits(method: str) -> None:
    model = adapted(method)
    one = next(iter(sites(model).values()))
    rank = one.methods["default"].factors(*one.tensors("default"))[1].shape[0]
    plain = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
    lora = get_peft_model(base(), plain).eval()
    with torch.no_grad():
        for name, layer in sites(model).items():
            B, A = layer.methods["default"].factors(*layer.tensors("default"))
            theirs = lora.get_submodule(f"base_model.model.{name}")
            theirs.lora_A["default"].weight.copy_(A)
            theirs.lora_B["default"].weight.copy_(B)
    torch.testing.assert_close(logits(model), logits(lora), rtol=1e-6, atol=1e-6)
