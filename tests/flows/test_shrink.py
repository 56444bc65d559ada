"""A smaller base of a larger one: which numbers it has, that it loads and writes, what cannot be divided."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from plures.core.errors import BadInput, PluresError, WrongUse
from plures.flows import shrink as flow
from plures.flows.shrink import Sizes, shrink
from plures.tensors import pick
from plures.tensors.pick import heads, spread
from plures.tensors.weights import Sink
from tiny import make_base

SMALLER = Sizes(hidden_size=24, intermediate_size=40, layers=2, heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Width 48, 3 layers, 8 heads of 6 numbers that read 4 key heads, in bfloat16."""
    at = make_base(tmp_path_factory.mktemp("base") / "large", hidden_size=48, intermediate_size=96,
                   num_attention_heads=8, num_key_value_heads=4)  # fmt: skip
    save_file({k: v.bfloat16() for k, v in load_file(at / "model.safetensors").items()}, at / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    return at


def weights(at: Path) -> dict[str, torch.Tensor]:
    return load_file(at / "model.safetensors")


def test_places_are_even() -> None:
    assert spread(12, 4).tolist() == [0, 3, 6, 9] and spread(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert spread(10, 4).tolist() == [0, 3, 6, 9] and spread(7, 3).tolist() == [0, 3, 6]
    assert spread(9, 1).tolist() == [0] and spread(8, 3).tolist() == [0, 4, 7]
    for of in range(1, 40):
        for keep in range(1, of + 1):
            got = spread(of, keep)
            assert len(got) == keep and got[0] == 0 and got[-1] < of and (np.diff(got) > 0).all()
            if of % keep and keep > 1:
                assert np.abs(got * (keep - 1) - np.arange(keep) * (of - 1)).max() <= (keep - 1) / 2


def test_heads_stay_whole_and_with_their_keys() -> None:
    """8 query heads in groups of 2 on 4 key heads; one of each group stays, of the key heads 0 and 2."""
    q, kv = heads((8, 2), (4, 2), 3)
    assert kv.reshape(-1, 3).tolist() == [[0, 1, 2], [6, 7, 8]]
    assert q.reshape(-1, 3).tolist() == [[0, 1, 2], [12, 13, 14]]  # heads 0 and 4, of the groups 0 and 2
    q, kv = heads((8, 4), (4, 2), 1)
    assert kv.tolist() == [0, 2] and q.tolist() == [0, 1, 4, 5]


def test_every_number_is_one_of_the_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor by hand: the axes of width, of MLPs and of heads, for the first two layers."""
    monkeypatch.setattr(pick, "CHUNK", 300)
    done = shrink(str(base), SMALLER, tmp_path / "small")
    got, of = weights(tmp_path / "small"), weights(base)
    hidden, inner = torch.arange(0, 48, 2), torch.tensor([int(i * 95 / 39 + 0.5) for i in range(40)])
    kv = torch.tensor([h * 6 + d for h in (0, 2) for d in range(6)])
    q = torch.tensor([h * 6 + d for h in (0, 1, 4, 5) for d in range(6)])
    want = {"model.norm.weight": of["model.norm.weight"][hidden]}
    want |= {k: of[k][:, hidden] for k in ("model.embed_tokens.weight", "lm_head.weight")}
    for i in range(2):
        at = f"model.layers.{i}."
        want |= {f"{at}{n}.weight": of[f"{at}{n}.weight"][hidden] for n in ("input_layernorm",
                                                                          "post_attention_layernorm")}  # fmt: skip
        for n, rows in (("q", q), ("k", kv), ("v", kv)):
            want[f"{at}self_attn.{n}_proj.weight"] = of[f"{at}self_attn.{n}_proj.weight"][rows][:, hidden]
        want[f"{at}self_attn.o_proj.weight"] = of[f"{at}self_attn.o_proj.weight"][hidden][:, q]
        for n in ("gate", "up"):
            want[f"{at}mlp.{n}_proj.weight"] = of[f"{at}mlp.{n}_proj.weight"][inner][:, hidden]
        want[f"{at}mlp.down_proj.weight"] = of[f"{at}mlp.down_proj.weight"][hidden][:, inner]
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == torch.bfloat16 and torch.equal(got[name], tensor), name
    assert done.plan.parameters == sum(t.numel() for t in want.values()) and done.plan.left_out == 9
    assert done.plan.write_bytes == 2 * done.plan.parameters


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_it_loads_writes_and_learns(kind: str, tied: bool, tmp_path: Path) -> None:
    make_base(tmp_path / "large", kind=kind, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
              tie_word_embeddings=tied)  # fmt: skip
    shrink(str(tmp_path / "large"), Sizes(hidden_size=36, layers=1, heads=2), tmp_path / "small")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
            config.head_dim) == (36, 1, 2, 2, 12)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    said = tokenizer("The parcel arrived", return_tensors="pt")
    out = model.generate(**said, max_new_tokens=5, do_sample=False)
    assert out.shape[1] == said["input_ids"].shape[1] + 5
    loss = model(**said, labels=said["input_ids"]).loss
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())
    told = json.loads((tmp_path / "small" / "plures_shrink.json").read_text())
    assert told["method"] == "weight_selection" and told["after"]["hidden_size"] == 36


def test_fewer_layers_alone_are_the_first_layers(base: Path, tmp_path: Path) -> None:
    """Of a base with only its depth cut the hidden states behind the last layer left are the base's."""
    from transformers import AutoModelForCausalLM

    shrink(str(base), Sizes(layers=2), tmp_path / "small")
    large, small = (AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32) for at in (base, tmp_path / "small"))
    tokens = torch.arange(4, 20)[None]
    of, got = (m(tokens, output_hidden_states=True).hidden_states for m in (large, small))
    torch.testing.assert_close(got[1], of[1])
    torch.testing.assert_close(got[2], large.model.norm(of[2]))  # the last one is behind the norm


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (Sizes(), "nothing gets smaller"),
        (Sizes(hidden_size=49), r"hidden_size '49' is not from 1 to 48"),
        (Sizes(layers=4), r"layers '4' is not from 1 to 3"),
        (Sizes(heads=3), r"heads '3' and kv_heads '4': heads are a multiple"),
        (Sizes(heads=8, kv_heads=2), r"heads '8' and kv_heads '2': .* at most 2 times as many"),
        (Sizes(hidden_size=25), "not a multiple of the number of attention heads"),
    ],
)
def test_what_cannot_be_divided(base: Path, tmp_path: Path, asked: Sizes, why: str) -> None:
    with pytest.raises(PluresError, match=why):
        shrink(str(base), asked, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_what_is_not_known(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no 'hidden_size', and it is not known"):
        make_base(tmp_path / "gpt2", kind="gpt2")
        flow.plan(str(tmp_path / "gpt2"), Sizes(layers=1))
    make_base(tmp_path / "phi3", kind="phi3", hidden_size=32, num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(BadInput, match=r"_proj\.weight' goes from .* it is not known which of its numbers"):
        flow.plan(str(tmp_path / "phi3"), Sizes(hidden_size=16, heads=2))
    make_base(tmp_path / "qwen2", kind="qwen2", hidden_size=32, num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(WrongUse, match=r"heads of 8 numbers stay whole.*give heads '2'"):
        flow.plan(str(tmp_path / "qwen2"), Sizes(hidden_size=16))
    assert flow.plan(str(tmp_path / "phi3"), Sizes(layers=2)).left_out == 6
    assert flow.plan(str(tmp_path / "qwen2"), Sizes(hidden_size=16, heads=2)).after.kv_heads == 2
    held = weights(base)
    held.pop("model.norm.weight")
    make_base(tmp_path / "torn", hidden_size=48, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4)
    save_file(held, tmp_path / "torn" / "model.safetensors")
    with pytest.raises(BadInput, match=r"has no tensor 'model\.norm\.weight'"):
        flow.plan(str(tmp_path / "torn"), SMALLER)


def test_nothing_is_there_before_all_is(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, wrote = [0], Sink.raw

    def dies(self: Any, *said: Any) -> None:
        written[0] += 1
        if written[0] == 9:
            raise KeyboardInterrupt
        wrote(self, *said)

    monkeypatch.setattr(Sink, "raw", dies)
    with pytest.raises(KeyboardInterrupt):
        shrink(str(base), SMALLER, tmp_path / "small")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is damaged: it is no JSON of a configuration"),
        ("[1]", "is damaged: it is no JSON of a configuration"),
        ({"num_attention_heads": 0}, "says num_attention_heads '0', and a whole number of at least 1"),
        ({"num_key_value_heads": 3}, "says 8 heads with '3' for keys"),
    ],
)
def test_a_damaged_configuration_is_told(base: Path, tmp_path: Path, text: Any, why: str) -> None:
    at = tmp_path / "torn"
    shutil.copytree(base, at)
    told = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(text if isinstance(text, str) else json.dumps(told | text))
    with pytest.raises(BadInput, match=why):
        flow.plan(str(at), SMALLER)
