"""The command line where something is wrong: one line, its exit code, and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from saying import QUICK, Said, one_line

import plures
from plures.tensors import safe
from tiny import make_base, write_rows


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["show", "mso"], 2, ["Did you mean 'mos'"]),
        (["show", "mos@7"], 2, ["mos@7"]),
        (["show", "../etc"], 2, ["not allowed"]),
        (["generate", "vara", "-p", "x"], 2, ["Did you mean 'vera'"]),
        (["generate", "mos", "-p", ""], 2, ["empty"]),
        (["export", "full", "out", "--as", "lora"], 2, ["--as merged"]),
        (["export", "mos", "out", "--as", "merge"], 2, ["Did you mean 'merged'"]),
        (["explain", "mso"], 2, ["Did you mean 'mos'"]),
        (["methods", "adpat"], 2, ["Did you mean 'adapt'"]),
        (["recipe", "trian"], 2, ["Did you mean 'train'"]),
        (["recipe", "train", "--check", "gone.yaml"], 4, ["does not exist"]),
        (["alias", "mos", "7"], 2, ["all digits"]),
        (["rm", "mos"], 2, ["says no version"]),
        (["import", "nowhere", "--name", "x"], 4, ["is no folder"]),
        (["import", "bad", "--name", "x"], 4, ["has no adapter_model.safetensors"]),
        (["list", "--fleet", "nowhere.fleet"], 4, ["plures init"]),
        (["init", "acme.fleet", "--base", "BASE"], 2, ["already is a fleet"]),
        (["init", "new.fleet", "--base", "./nothing"], 4, ["neither a folder here nor a hub id"]),
        (["init", "new.fleet", "--base", "org/model"], 4, ["hub is unreachable"]),
        (["score", "mos", "gone.jsonl"], 4, ["does not exist"]),
        (["score", "base", "ROWS", "--at-most", "0.1"], 5, ["above the bar of 0.1"]),
        (["train", "r1.yaml", "r2.yaml"], 2, ["one recipe at a time"]),
        (["train", "gone.yaml"], 4, ["does not exist"]),
    ],
)
def test_errors_are_one_line_with_their_code(
    say: Said, own_fleet: Path, base_folder: Path, text_rows: Path, tmp_path: Path, argv: list[str], code: int,
    words: list[str],
) -> None:  # fmt: skip
    (tmp_path / "bad").mkdir()
    known = {"BASE": str(base_folder), "ROWS": str(text_rows)}
    one_line(say(*(known.get(a, a) for a in argv)), code, *words)


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ("train.stesp=3", 2, ["train.stesp", "Did you mean 'steps'"]),
        ("trian.steps=3", 2, ["trian", "Did you mean 'train'"]),
        ("train.steps=many", 2, ["train.steps", "an integer"]),
        ("train.steps=0", 2, ["at least 1"]),
        ("adapt.rr=3", 2, ["mos.rr is not an option of mos"]),
        ("adapt.method=mso", 2, ["Did you mean 'mos'", "There are: "]),
        ("adapt.r=64", 2, ["larger than the pool"]),
        ("targets=[q_prj]", 2, ["Did you mean 'q_proj'"]),
        ("name=../v", 2, ["not allowed"]),
        ("name=a/b", 2, ["not allowed"]),
        ("fleet=nowhere.fleet", 4, ["plures init"]),
        ("train.device=cuda", 2, ["no CUDA device"]),
        ("train.device=gpu9", 2, ["no device torch knows"]),
        ("data.train=torn.jsonl", 4, ["torn.jsonl, line 2"]),
        ("data.train=other.jsonl", 4, ["other.jsonl, line 1", "'text'"]),
        ("data.train=empty.jsonl", 4, ["is empty"]),
        ("data.train=gone.jsonl", 4, ["does not exist"]),
        ("data.train=org/rows", 4, ["org/rows"]),
        ("data.columns={text: bdy}", 4, ["'bdy'"]),
        ("train.patience=2", 2, ["eval_every"]),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one line is about a machine without CUDA")
def test_a_train_that_cannot_be_is_one_line_and_publishes_nothing(
    say: Said, own_fleet: Path, text_rows: Path, tmp_path: Path, said: str, code: int, words: list[str]
) -> None:
    (tmp_path / "torn.jsonl").write_text('{"text": "fine"}\n{"text": "not\n')
    write_rows(tmp_path / "other.jsonl", [{"txet": "a"}])
    (tmp_path / "empty.jsonl").write_text("")
    argv = ["train", f"fleet={own_fleet}", "name=v", f"data.train={text_rows}", *QUICK, said]
    one_line(say(*argv), code, *words)
    with plures.Store.open(own_fleet) as store:
        assert store.names() == sorted(["mos", "lora", "vera", "full"])
        assert store.fsck().problems == ()


def test_all_that_is_wrong_with_a_recipe_is_said_at_once(say: Said, own_fleet: Path) -> None:
    code, _, err = say("train", f"fleet={own_fleet}", "train.steps=0", "train.lr=fast", "sede=1")
    assert code == 2
    for word in ("5 errors", "train.steps", "train.lr", "'seed'", "name", "data.train"):
        assert word in err
    assert "Traceback" not in err


def test_adapters_that_are_not_what_they_should_be(say: Said, ok: Any, own_fleet: Path, tmp_path: Path) -> None:
    ok("export", "lora", "out")
    weights = tmp_path / "out" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3])
    one_line(say("import", "out", "--name", "x"), 4, "truncated")
    safe.write(weights, {"other": torch.zeros(2)})
    one_line(say("import", "out", "--name", "x"), 4, "tensor")
    torch.save({"a": torch.zeros(2)}, weights)
    one_line(say("import", "out", "--name", "x"), 4, "pickle")
    weights.write_bytes(whole)
    one_line(say("import", "out", "--name", "../x"), 2, "not allowed")
    make_base(tmp_path / "other", seed=1)
    ok("init", "other.fleet", "--base", "other")
    one_line(say("import", "out", "--name", "x", "--fleet", "other.fleet"), 4, "adapter of another base")
    ok("import", "out", "--name", "x", "--fleet", str(own_fleet))


def test_bases_that_are_not_what_they_should_be(say: Said, base_folder: Path, text_rows: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(base_folder, tmp_path / "base"))
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3])
    one_line(say("init", "a.fleet", "--base", "base"), 4, "truncated")
    weights.write_bytes(b"GGUF and so on" * 9)
    one_line(say("init", "a.fleet", "--base", "base"), 4, "not a safetensors file")
    torch.save({}, base / "pytorch_model.bin")
    weights.unlink()
    one_line(say("init", "a.fleet", "--base", "base"), 4, "pickle")
    assert not (tmp_path / "a.fleet").exists()
    safe.write(weights, {"foreign": torch.zeros(2)}, {"format": "pt"})
    assert say("init", "a.fleet", "--base", "base")[0] == 0  # its names are only known once it is loaded
    argv = ["train", "fleet=a.fleet", "name=v", f"data.train={text_rows}", *QUICK]
    one_line(say(*argv), 4, "lacks the weight")


def test_a_damaged_fleet_is_exit_5(say: Said, own_fleet: Path) -> None:
    blob = next(p for p in (own_fleet / "blobs").rglob("*.safetensors"))
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    one_line(say("fsck"), 5, "the fleet is damaged: 1 problems")
    code, out, _ = say("fsck", "--json")
    assert code == 5
    assert len(json.loads(out)["problems"]) == 1


def test_which_fleet(say: Said, own_fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(own_fleet, tmp_path / "second.fleet")
    one_line(say("list"), 2, "2 are here: acme.fleet, second.fleet")
    monkeypatch.setenv("PLURES_FLEET", str(tmp_path / "second.fleet"))
    assert say("list")[0] == 0
    monkeypatch.delenv("PLURES_FLEET")
    monkeypatch.chdir(tmp_path.parent)
    one_line(say("list"), 2, "no *.fleet folder is here")


def test_our_own_bug_is_exit_1_and_says_how_to_see_more(
    say: Said, monkeypatch: pytest.MonkeyPatch, own_fleet: Path
) -> None:
    from plures.store import Store

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(Store, "versions", broken)
    one_line(say("list"), 1, "internal error", "ZeroDivisionError", "PLURES_DEBUG=1")


def test_a_wrong_option_is_exit_2(say: Said) -> None:
    assert say("list", "--flet", "x")[0] == 2
    assert say("lst")[0] == 2
