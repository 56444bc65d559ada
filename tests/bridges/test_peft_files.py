"""What PEFT saves of every method comes back; which modules are adapted, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from plugged import POOLED, adapted, backward, base, config, every, logits, merging, sites
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from plures.bridges.peft import PluresConfig, PluresLayer, config_for
from plures.core.errors import WrongUse

# Files. -------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_is_bit_equal(method: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = adapted(method, seed=5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(again), logits(model))
    stored, now = model.state_dict(), again.state_dict()
    assert stored.keys() == now.keys()
    assert all(torch.equal(stored[k], now[k]) and stored[k].dtype == now[k].dtype for k in stored)
    assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    want = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == want


def test_auto_model_finds_its_base(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config("mos")).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", POOLED)
def test_a_pool_is_saved_once(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    groups = {layer.methods["default"].group(layer.sites["default"]) for layer in sites(model).values()}
    pooled = [k for k in stored if ".plures_pool." in k]
    assert len(pooled) == 2 * len(groups)  # A and B
    unique = {id(t): t.numel() for layer in sites(model).values() for t in layer.tensors("default")[1].values()}
    assert sum(stored[k].numel() for k in pooled) == sum(unique.values())
    assert len(stored) == len(pooled) + sum(len(layer.tensors("default")[0]) for layer in sites(model).values())


def test_a_missing_tensor_is_told(tmp_path: Path) -> None:
    adapted("mos").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    stored.pop(next(k for k in stored if k.endswith("plures_pool.A")))
    save_file(stored, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(base(), tmp_path)


@merging
def test_modules_to_save_and_trained_tokens_round_trip(method: str, tmp_path: Path) -> None:
    model = adapted(method, modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [1, 5]})
    grads = backward(model.train())
    assert any("modules_to_save.default" in n for n in grads)
    assert any("trainable_tokens_delta" in n or "token_adapter" in n for n in grads)
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1).step()
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(again.merge_and_unload()), logits(model), rtol=1e-4, atol=1e-4)


@every
def test_config_round_trip(method: str, tmp_path: Path) -> None:
    one = config(method, seed=7, dropout=0.1, layers_to_transform=[0], exclude_modules=["lm_head"])
    one.save_pretrained(tmp_path)
    two = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(two, PluresConfig)
    assert {**one.to_dict(), "inference_mode": two.inference_mode} == two.to_dict()
    assert two.make() == one.make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rr": 3}, "'rr' is neither an option of mos nor a setting of its PEFT config"),
        ({"target_module": ["q_proj"]}, "Did you mean 'target_modules'"),
        ({"alhpa": 3.0}, "Did you mean 'alpha'"),
        ({"r": "many"}, "mos.r must be int"),
        ({"p": 9}, "mos.p"),
        ({"dropout": 1.5}, "dropout must be in"),
        ({"format_version": 99}, "format_version 99"),
    ],
)
def test_a_wrong_config_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongUse, match=message):
        config_for("mos", **settings)


def test_an_unknown_option_or_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(WrongUse, match="alpha"):
        PluresConfig(method="mos", options={"alhpa": 3.0})
    with pytest.raises(WrongUse, match="mos"):
        PluresConfig(method="moss")


# Targets. -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r".*\.layers\.1\..*(q|k)_proj"}, 2),
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 12),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, 1),
        ({"target_modules": None}, 4),
    ],
)
@every
def test_targets(method: str, settings: dict[str, Any], count: int, tmp_path: Path) -> None:
    model = adapted(method, **settings)
    assert len(sites(model)) == count
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), logits(model))


def test_a_target_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="not found in the base model"):
        adapted("mos", target_modules=["query"])


def test_a_target_that_is_no_linear_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'model.embed_tokens' is no linear map"):
        adapted("mos", target_modules=["embed_tokens"])


def test_the_output_of_torchs_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"MultiheadAttention.*no effect"):
        get_peft_model(nn.Sequential(nn.MultiheadAttention(16, 2)), config("lora", target_modules=["out_proj"]))


def test_a_failed_injection_leaves_no_trace() -> None:
    model = base()
    with pytest.raises(WrongUse, match=r"mos\.l = 5"):
        get_peft_model(model, config("mos", l=5))
    assert not any(isinstance(m, PluresLayer) for m in model.modules())
    good = get_peft_model(model, config("mos"))
    before = logits(good.eval())
    with pytest.raises(WrongUse, match=r"mos\.l = 5"):
        good.add_adapter("bad", config("mos", l=5))
    assert list(good.peft_config) == ["default"]
    assert torch.equal(logits(good), before)
    good.add_adapter("bad", config("mos", l=2))
    assert len(sites(good, "bad")) == len(sites(good))


@merging
def test_conv1d_of_gpt2(method: str, tmp_path: Path) -> None:
    def gpt2() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()

    plain = logits(gpt2())
    model = get_peft_model(gpt2(), config(method, target_modules=["c_attn", "c_proj"])).eval()
    with_adapter = logits(model)
    assert not torch.allclose(with_adapter, plain)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path).eval()), with_adapter)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), with_adapter, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), with_adapter, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), with_adapter, rtol=1e-4, atol=1e-5)


@merging
def test_layers_of_one_type_and_several_shapes(method: str) -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ModuleList(nn.Linear(a, b) for a, b in ((16, 16), (16, 16), (16, 32), (32, 16)))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.up:
                x = layer(x).tanh()
            return x

    torch.manual_seed(0)
    tower, x = Tower(), torch.randn(3, 16)
    settings = {"target_modules": r"up\.\d", "task_type": None}
    model = get_peft_model(tower, config(method, **settings))
    y = model(x)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-4, atol=1e-6)
