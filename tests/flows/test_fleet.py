"""The Python face, and the whole way: train, store, load in a new process, generate the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import plures
from plures.core.errors import BadInput, RecipeErrors, WrongUse
from tiny import METHODS, QUICK, make_base, sentences

MOS: dict[str, Any] = {"r": 4, "l": 2, **QUICK}


def test_the_lines_of_the_readme(
    tmp_path: Path, base_folder: Path, text_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, rows = "acme.fleet", text_rows

    fleet = plures.Fleet(path, base=str(base_folder))
    v = fleet.train("support", data=rows, method="mos", steps=4, r=4, l=2, max_tokens=32)
    said = v.generate("The parcel")
    fleet["support@1"].export("out/", as_="lora")

    assert isinstance(said, str)
    assert said == fleet["support"].generate("The parcel") == fleet["support@1"].generate("The parcel")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert repr(v).startswith("<support@1 mos ")
    fleet.close()
    with plures.Fleet(path) as again:  # the base is known by then
        assert [f.version.ref for f in again] == ["support@1"]
        assert again["support"].generate("The parcel") == said


def test_rows_in_memory(make_fleet: Callable[..., Path]) -> None:
    rows, other = ([{"text": t} for t in sentences(20, seed)] for seed in (1, 2))
    with plures.Fleet(make_fleet()) as fleet:
        first = fleet.train("v", rows, held_out=other, **MOS)
        assert fleet.store.lineage("v")["recipe"]["data"]["train"].startswith("rows:")
        assert {s.metric for s in fleet.store.scores("v")} == {"nats_per_token", "bits_per_byte", "perplexity"}
        second = fleet.train("v", other, held_out=rows, **MOS)  # other rows are another run, and another version
        assert (first.version.version, second.version.version) == (1, 2)
        assert first.version.identity != second.version.identity
        with pytest.raises(WrongUse, match="exists"):
            fleet.train("v", rows, held_out=other, **MOS)
        assert fleet.train("v", other, held_out=rows, resume=True, **MOS).version.ref == "v@2"


def test_a_wrong_setting_names_the_nearest_and_all_are_named_at_once(make_fleet: Callable[..., Path]) -> None:
    with plures.Fleet(make_fleet()) as fleet:
        with pytest.raises(RecipeErrors) as caught:
            fleet.train("v", [{"text": "a b"}], stesp=3, alhpa=2.0)
        assert "'steps'" in str(caught.value)
        assert "'alpha'" in str(caught.value)
        with pytest.raises(RecipeErrors, match=r"train\.steps: got .*at least 1"):
            fleet.train("v", [{"text": "a b"}], steps=0)
        with pytest.raises(WrongUse, match="Did you mean 'lora'"):
            fleet.train("v", [{"text": "a b"}], method="lroa")


def test_settings_go_where_they_belong(make_fleet: Callable[..., Path], text_rows: Path) -> None:
    with plures.Fleet(make_fleet()) as fleet:
        made = fleet.train("v", text_rows, method="lora", targets=["q_proj"], seed=5, aliases=["prod"], decay="cosine",
                           packing=False, **(QUICK | {"r": 3, "steps": 2}))  # fmt: skip
        said = fleet.store.lineage("v")["recipe"]
        assert said["adapt"] == {"method": "lora", "r": 3}
        assert (said["train"]["decay"], said["data"]["packing"], said["seed"]) == ("cosine", False, 5)
        assert fleet["v@prod"].version == made.version


def test_a_fleet_of_another_base_is_refused(make_fleet: Callable[..., Path], tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", seed=1)
    with pytest.raises(BadInput, match="is a fleet of"):
        plures.Fleet(make_fleet(), base=str(other))
    with pytest.raises(BadInput, match="make one with `plures init`"):
        plures.Fleet(tmp_path / "nowhere")


def test_unknown_variants_name_the_nearest(own_fleet: Path) -> None:
    with plures.Fleet(own_fleet) as fleet:
        with pytest.raises(WrongUse, match="Did you mean 'vera'"):
            fleet["vara"]
        with pytest.raises(WrongUse):
            fleet["mos@9"]


ELSEWHERE = """
import json, sys
import plures
with plures.Fleet(sys.argv[1]) as fleet:
    refs, prompts = json.loads(sys.argv[2])
    alone = [fleet.generate([(r, p)], max_tokens=12)[0].ids for r in refs for p in prompts]
    batch = [c.ids for c in fleet.generate([(r, p) for r in refs for p in prompts], max_tokens=12)]
print(json.dumps([alone, batch]))
"""


def test_train_store_load_in_a_new_process_generate_the_same_tokens(trained_fleet: Path) -> None:
    refs, prompts = [None, *METHODS], ["The parcel", "A teapot broke near the old garden and"]
    with plures.Fleet(trained_fleet) as fleet:
        alone = [fleet.generate([(r, p)], max_tokens=12)[0].ids for r in refs for p in prompts]
        batch = [c.ids for c in fleet.generate([(r, p) for r in refs for p in prompts], max_tokens=12)]
    assert len(set(alone)) == len(alone)  # every variant answers in its own way, and so does the base
    assert batch == alone  # rows of one batch, of different lengths, each by its own variant
    argv = [sys.executable, "-c", ELSEWHERE, str(trained_fleet), json.dumps([refs, prompts])]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = [[tuple(ids) for ids in some] for some in json.loads(done.stdout)]
    assert theirs == [alone, alone]


def test_a_variant_in_memory_answers_as_the_one_just_trained(make_fleet: Callable[..., Path], text_rows: Path) -> None:
    """What `capture` took off the trained model is what the model was."""
    from plures.bridges.on_model import attach
    from plures.engine.model import load_base

    with plures.Fleet(make_fleet()) as fleet:
        made = fleet.train("v", text_rows, lr=3e-2, modules_to_save=["lm_head"], **MOS)
        run = next((fleet.path / "runs").iterdir())
        from safetensors.torch import load_file

        held = load_file(run / "checkpoint.safetensors")
        variant = made.load()
        pools = {k: t for k, t in held.items() if k.startswith("p/") and "plures_pool" in k}
        assert pools
        assert sum(t.numel() for t in pools.values()) == made.version.trained - 300 * 32  # but the head
        head = next(t for k, t in held.items() if k.startswith("p/") and "lm_head" in k)
        assert torch.equal(variant.extra["lm_head.weight"], head)
        base = load_base(fleet.store.base)
        ids = torch.arange(2, 20)[None]
        with torch.no_grad():
            plain = base.model(input_ids=ids).logits
            assert not torch.allclose(attach(base.model, variant, "v0").eval()(input_ids=ids).logits, plain, atol=1e-3)


def test_the_score_is_recorded_and_equals_that_of_training(make_fleet: Callable[..., Path], tmp_path: Path) -> None:
    held = [{"text": t} for t in sentences(12, 7)]
    with plures.Fleet(make_fleet()) as fleet:
        made = fleet.train("v", [{"text": t} for t in sentences(30)], held_out=held, **MOS)
        kept = {s.metric: s.value for s in fleet.store.scores("v")}
        again = made.score(held, max_tokens=32)
        assert again.nats_per_token == pytest.approx(kept["nats_per_token"], rel=1e-5)
        assert fleet.score(None, held, max_tokens=32).nats_per_token != pytest.approx(again.nats_per_token, rel=1e-3)
        assert len({s.dataset for s in fleet.store.scores("v")}) == 1  # the same rows are the same dataset


def test_prompts_with_completions_and_chats_train(make_fleet: Callable[..., Path], answer_rows: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "Yes."}]}
             for t in sentences(8)]  # fmt: skip
    with plures.Fleet(make_fleet()) as fleet:
        fleet.train("answers", answer_rows, **(MOS | {"max_tokens": 64}))
        chat = fleet.train("chat", chats, **(MOS | {"max_tokens": 64}))
        assert isinstance(chat.generate([{"role": "user", "content": "The parcel?"}], max_tokens=5), str)
