"""The command line: every verb, every exit code, one line for every error."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import plures
from plures.cli.app import verbs
from plures.tensors import safe
from tiny import make_base, write_rows

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ok(say: Said) -> Callable[..., str]:
    def run(*argv: str) -> str:
        code, out, err = say(*argv)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def parsed(ok: Callable[..., str]) -> Callable[..., Any]:
    return lambda *argv: json.loads(ok(*argv, "--json"))


QUICK = ["train.steps=2", "train.batch_rows=2", "data.max_tokens=24", "adapt.r=2", "adapt.l=2"]


# ---- the happy path of every verb


def test_every_verb_is_tried_here() -> None:
    assert set(verbs()) - {"demo"} == {
        "alias", "bench", "chat", "doctor", "embed", "evolve", "explain", "export", "extract", "forget", "fsck", "gc",
        "generate", "import_", "init", "key", "list", "merge", "methods", "near", "pack", "rate", "recipe", "rm",
        "score", "select", "serve", "show", "shrink", "tenant", "train", "weigh",
    }  # fmt: skip


def test_a_comparison(ok: Any, say: Said, base_folder: Path, text_rows: Path, tmp_path: Path) -> None:
    rows = {part: str(text_rows) for part in ("train", "valid", "test")}
    said = {"base": str(base_folder), "tenants": [{"name": n} | rows for n in "ab"], "steps": 2, "seeds": 1, "rates": 1,
            "most_rates": 1, "max_tokens": 24, "contenders": [{"method": "lora", "options": {"r": 1}}]}  # fmt: skip
    (tmp_path / "bench.yaml").write_text(json.dumps(said))
    told = ok("bench", "bench.yaml", "workers=1", "out=compared")
    assert "* lora" in told and (tmp_path / "compared" / "report.html").exists()
    assert say("bench", "bench.yaml", "on=1")[0] == 2
    assert say("bench", "bench.yaml", "--on", "dask")[0] == 2


def test_rows_are_chosen(ok: Any, say: Said, parsed: Any, text_rows: Path, tmp_path: Path) -> None:
    told = ok("select", str(text_rows), "--budget", "20%", "--method", "cover", "--out", "some.jsonl", "neighbours=8")
    assert "12 of 60 rows in some.jsonl" in told and "of the best possible value" in told
    recipe = tmp_path / "select.yaml"
    recipe.write_text(f"{{pool: [{text_rows}], budget: 5, select: {{method: random}}, out: r.jsonl}}")
    assert parsed("select", str(recipe), "seed=3", "--budget", "7")["rows"] == 7
    code, _, err = say("select", str(text_rows), "--method", "covr")
    assert code == 2 and "Did you mean 'cover'" in err


def test_rows_are_embedded_planned_and_compared(ok: Any, say: Said, parsed: Any, text_rows: Path) -> None:
    told = ok("embed", str(text_rows), "width=32", "-o", "v.emb")
    assert "vectors of 32 numbers (f16, hashed n-grams, 32 wide, column text) in v.emb" in told
    assert parsed("embed", str(text_rows), "-o", "w.emb", "kind=int8")["about"]["kind"] == "int8"
    common = [str(text_rows), "--budget", "20%", "features=v.emb", "neighbours=8"]
    assert "by cover, in memory" in ok("select", *common, "--plan")
    assert parsed("select", *common, "--plan")["cells"] == 0
    ok("select", *common, "--out", "a.jsonl", "--report", "a.html")
    ok("select", *common, "--out", "b.jsonl", "--objective", "logdet + 0.1*typical")
    assert "<svg" in Path("a.html").read_text()
    assert "in both (Jaccard" in ok("select", "diff", "a.jsonl", "b.jsonl")
    assert parsed("select", "diff", "a.jsonl", "a.jsonl")["jaccard"] == 1.0
    code, _, err = say("select", *common, "--objective", "cover", "--method", "top")
    assert code == 2 and "leave --method out" in err
    code, _, err = say("select", *common, "--objective", "cover cover")
    assert code == 2 and "cannot read" in err


def test_a_base_is_shrunk(ok: Any, say: Said, parsed: Any, base_folder: Path, tmp_path: Path) -> None:
    assert "layers 2 of 3" in ok("shrink", str(base_folder), "--layers", "2", "--plan")
    assert parsed("shrink", str(base_folder), "--layers", "2", "--plan")["after"]["layers"] == 2
    assert "parameters in small" in ok("shrink", str(base_folder), "small", "--layers", "2")
    assert (tmp_path / "small" / "config.json").exists()
    assert parsed("shrink", str(base_folder), "less", "--layers", "1")["plan"]["left_out"] > 0
    for wrong, why in ((["small", "--layers", "1"], "is there already"), (["--layers", "1"], "name the folder"),
                       (["new", "--layers", "9"], "layers '9' is not from 1 to 3")):  # fmt: skip
        code, _, err = say("shrink", str(base_folder), *wrong)
        assert code == 2 and why in err


def test_models_are_merged(ok: Any, say: Said, parsed: Any, base_folder: Path, tmp_path: Path) -> None:
    said = {"merge_method": "linear", "models": [{"model": str(base_folder)}] * 2}
    (tmp_path / "m.yaml").write_text(json.dumps(said))
    assert "linear of" in ok("merge", "m.yaml", "--plan") and parsed("merge", "m.yaml", "--plan")["tensors"] > 10
    told = ok("merge", "m.yaml", "merged", "--workers", "2")
    assert "bytes in merged" in told and "mean cosine" not in told  # without a base there is nothing to differ from
    assert (tmp_path / "merged" / "model.safetensors").exists()
    code, _, err = say("merge", "m.yaml", "merged")
    assert code == 2 and "is there already" in err
    code, _, err = say("merge", "m.yaml")
    assert code == 2 and "name the folder" in err
    for wrong, why in ((["a=x", "--name", "s"], "no variant with a weight"), (["a=1"], "name the sum with --name")):
        code, _, err = say("merge", *wrong)
        assert code == 2 and why in err


def test_a_fleet_is_packed(ok: Any, say: Said, parsed: Any, base_folder: Path, text_rows: Path) -> None:
    ok("init", "acme.fleet", "--base", str(base_folder))
    for name, seed in (("a", "1"), ("b", "2")):
        ok("train", f"data.train={text_rows}", "fleet=acme.fleet", f"name={name}", f"seed={seed}", "adapt.method=lora",
           *(q for q in QUICK if not q.startswith("adapt.")))  # fmt: skip
    assert "2 variants, 2 of them low-rank" in ok("pack", "acme.fleet", "--plan")
    assert parsed("pack", "acme.fleet", "--plan")["variants"] == 2
    told = ok("pack", "acme.fleet", "--error", "0.2", "--compare")
    assert "2 variants in acme.packed.fleet" in told and "beside it int4" in told and "2 by klt" in told
    done = parsed("pack", "acme.fleet", "--out", "other.fleet", "--method", "rtn", "pack.bits=8")
    assert [line["how"] for line in done["lines"]] == ["rtn", "rtn"] and done["lines"][0]["error"] < 0.02
    assert "all 2 variants are in" in ok("pack", "acme.fleet", "--error", "0.2")
    assert "packed" in ok("list", "--fleet", "acme.packed.fleet")
    assert "a@1" in ok("show", "a", "--fleet", "acme.packed.fleet")
    for wrong, why in ((["acme.fleet", "--out", "acme.fleet"], "packed into itself"),
                       (["acme.fleet", "--method", "klr"], "Did you mean 'klt'"),
                       (["acme.fleet", "--error", "2", "--out", "x"], "klt.error must be"),
                       (["acme.fleet", "other.fleet"], "one fleet or recipe at a time")):  # fmt: skip
        code, _, err = say("pack", *wrong)
        assert code == 2 and why in err, err


def test_variants_are_searched(ok: Any, parsed: Any, base_folder: Path, text_rows: Path, tmp_path: Path) -> None:
    ok("init", "acme.fleet", "--base", str(base_folder))
    for name, seed in (("a", "1"), ("b", "2")):
        ok("train", f"data.train={text_rows}", "fleet=acme.fleet", f"name={name}", f"seed={seed}", *QUICK)
    lines = text_rows.read_text().splitlines(keepends=True)
    for name, part in (("one", lines[::2]), ("two", lines[1::2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    said = ["fleet=acme.fleet", "name=both", "variants=[a, b]", "tasks=[one.jsonl, two.jsonl]", "generations=2"]
    told = ok("evolve", *said)
    assert "2 generations" in told and "both@1" in told
    done = parsed("evolve", *said)
    assert {"one", "two"} == set(done["elites"])


def test_merges_sweep_and_become_variants(ok: Any, say: Said, parsed: Any, base_folder: Path, text_rows: Path,
                                          tmp_path: Path) -> None:  # fmt: skip
    ok("init", "acme.fleet", "--base", str(base_folder))
    for name, seed in (("a", "1"), ("b", "2")):
        ok("train", f"data.train={text_rows}", "fleet=acme.fleet", f"name={name}", f"seed={seed}", *QUICK)
    told = parsed("merge", "a", "b", "--name", "soup", "--sweep", "3")
    assert [t["ref"] for t in told] == ["soup-0@1", "soup-0.5@1", "soup-1@1"] and told[1]["error"] == 0
    assert ok("merge", "a", "b", "--name", "s", "--sweep", "2", "--rank", "1").count("published s-") == 2
    said = {"merge_method": "ties", "base_model": "acme.fleet", "parameters": {"density": 0.5},
            "models": [{"model": f"acme.fleet::{n}"} for n in "ab"]}  # fmt: skip
    (tmp_path / "m.yml").write_text(json.dumps(said))
    assert 0 < parsed("merge", "m.yml", "--name", "ab", "--rank", "1")[0]["error"] < 1
    assert "published ab@2: " in ok("merge", "m.yml", "--name", "ab", "--fleet", "acme.fleet")
    (tmp_path / "s.yml").write_text(json.dumps(said | {"sweep": {"lambda": [0.5, 1]}}))
    assert "2 results: lambda_0.5, lambda_1" in ok("merge", "s.yml", "--plan")
    assert ok("merge", "s.yml", "swept").count("mean cosine") == 2
    assert (tmp_path / "swept" / "lambda_0.5" / "model.safetensors").exists()
    assert [t["ref"] for t in parsed("merge", "s.yml", "--name", "x")] == ["x-lambda_0.5@1", "x-lambda_1@1"]
    ok("init", "next.fleet", "--base", "swept/lambda_1")
    for wrong, why in (
        (["a", "b", "--sweep", "3"], "name the sums with --name"),
        (["a", "--sweep", "3", "--name", "s"], "between two"),
        (["m.yml", "--name", "x", "--rest", "kep", "-f", "acme.fleet"], "'kep' is not one of"),
        (["nothing.yml", "--name", "x", "-f", "acme.fleet"], "nothing.yml"),
    ):  # fmt: skip
        code, _, err = say("merge", *wrong, *(["-f", "acme.fleet"] if "-f" not in wrong else []))
        assert code != 0 and why in err


def test_a_tuned_model_becomes_a_variant(ok: Any, say: Said, parsed: Any, base_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base_folder, tmp_path / "tuned")
    held = load_file(tmp_path / "tuned" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    held[name] = held[name] + 0.1
    save_file(held, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    ok("init", "acme.fleet", "--base", str(base_folder))
    assert "a LoRA of rank 2" in ok("extract", "tuned", "--name", "up", "--rank", "2")
    assert parsed("extract", "tuned", "--name", "up", "--rank", "1")["error"] < 1e-4
    assert say("extract", "tuned", "--name", "up", "--rest", "keeep")[0] == 2


def test_rows_are_rated(ok: Any, say: Said, parsed: Any, base_folder: Path, text_rows: Path, tmp_path: Path) -> None:
    ok("init", "acme.fleet", "--base", str(base_folder))
    told = ok("rate", str(text_rows), "--want", "tokens", "--want", "loss", "-o", "r.parquet", "max_tokens=24")
    assert "60 rows with loss, tokens in r.parquet" in told and "loss: 7." in told
    (tmp_path / "rate.yaml").write_text(f"{{fleet: acme.fleet, rows: {text_rows}, want: [tokens]}}")
    assert parsed("rate", "rate.yaml", "out=t.jsonl")["columns"] == ["tokens"]
    code, _, err = say("rate", str(text_rows), "--variant", "v")
    assert code == 2 and "'v'" in err


def test_tasks_train_together(ok: Any, parsed: Any, base_folder: Path, text_rows: Path, tmp_path: Path) -> None:
    ok("init", "acme.fleet", "--base", str(base_folder))
    lines = [json.loads(line) for line in text_rows.read_text().splitlines()]
    rows = "".join(json.dumps(row | {"who": ("x", "y")[i % 2]}) + "\n" for i, row in enumerate(lines))
    (tmp_path / "rows.jsonl").write_text(rows)
    said = ["data.train=rows.jsonl", "fleet=acme.fleet", "name=t", "tasks.key=who", *QUICK]
    assert ok("train", *said).split() == ["t-x@1", "t-y@1"]
    told = parsed("train", *said, "name=u")
    assert [t["ref"] for t in told] == ["u-x@1", "u-y@1"] and told[0]["bits_per_byte"] > 0


def test_shards_answer_together_and_forget(
    ok: Any, parsed: Any, base_folder: Path, text_rows: Path, tmp_path: Path
) -> None:
    ok("init", "acme.fleet", "--base", str(base_folder))
    recipe = ("fleet=acme.fleet", "name=v", f"data.train={text_rows}", "shards.count=3", "shards.reach=1", *QUICK)
    assert "this for each of 3 variants, v-0 to v-2" in ok("train", *recipe, "--plan")
    assert [done["ref"] for done in parsed("train", *recipe)] == ["v-0@1", "v-1@1", "v-2@1"]
    together = parsed("score", "v-0", str(text_rows), "--with", "v-1", "--route", "drm", "--max-tokens", "24")
    assert together["ref"] == "v-0 + v-1 by drm"
    assert ok("generate", "v-0", "v-1", "-p", "The parcel", "--route", "mean", "--max-tokens", "3").count("\n") == 1
    lost = tmp_path / "lost.jsonl"
    lost.write_text(text_rows.read_text().splitlines()[0])
    told = parsed("forget", "v", "--rows", str(lost))
    assert (told["found"], len(told["gone"]), told["done"]) == (1, 1, False)
    assert f"removed {told['gone'][0]}" in ok("forget", "v", "--rows", str(lost), "--yes")
    assert len(parsed("list")) == 2


def test_from_init_to_gc(ok: Any, parsed: Any, base_folder: Path, text_rows: Path, tmp_path: Path) -> None:
    begun = parsed("init", "acme.fleet", "--base", str(base_folder))
    assert begun["base"] == str(base_folder)
    assert len(begun["hash"]) == 64
    # the only *.fleet folder here is found without being named
    assert parsed("list") == []
    (done,) = parsed("train", "fleet=acme.fleet", "name=support", f"data.train={text_rows}", "aliases=[prod]", *QUICK)
    assert (done["ref"], done["version"]) == ("support@1", 1)
    assert ok("train", "fleet=acme.fleet", "name=support", f"data.train={text_rows}", "seed=1", *QUICK) == "support@2\n"
    assert [v["ref"] for v in parsed("list")] == ["support@2"]
    listed = parsed("list", "support", "--all")
    assert [(v["ref"], v["aliases"]) for v in listed] == [("support@1", ["prod"]), ("support@2", [])]
    assert {"r": 2, "l": 2}.items() <= listed[0]["options"].items()
    table = ok("list", "--all")
    assert "support@1" in table
    assert "bits/byte" in table
    shown = parsed("show", "support@prod")
    assert shown["identity"] == done["identity"]
    assert {s["metric"] for s in shown["scores"]} == {"nats_per_token", "bits_per_byte", "perplexity"}
    assert shown["lineage"]["recipe"]["name"] == "support"
    assert "method   mos" in ok("show", "support")
    answers = parsed("generate", "support", "base", "-p", "The parcel", "--max-tokens", "5")
    assert [a["ref"] for a in answers] == ["support", "base"]
    assert ok("generate", "support", "base", "-p", "The parcel", "--max-tokens", "5").count("--- ") == 2
    scored = parsed("score", "support", str(text_rows), "--max-tokens", "24")
    assert scored["bits_per_byte"] > 0
    assert "bits/byte" in ok("score", "base", str(text_rows), "--at-most", "99")
    assert parsed("alias", "support@2", "next") == {"ref": "support@2", "alias": "next", "deleted": False}
    assert ok("alias", "support@2", "next", "--delete") == "support@next is gone\n"
    assert ok("alias", "support@2", "prod") == "support@prod -> support@2\n"
    exported = parsed("export", "support@prod", "out")
    assert "plures.json" in exported["files"]
    assert parsed("import", "out", "--name", "copy", "--alias", "a", "--alias", "b")[0]["aliases"] == ["a", "b"]
    assert "copy@1" in ok("import", "out", "--name", "copy")
    assert "as lora in" in ok("export", "support", "plain", "--as", "lora")
    assert ok("rm", "support@1") == "removed support@1\n"
    assert parsed("rm", "copy", "--all", "--force") == {"removed": ["copy@1"]}
    whole = parsed("fsck")
    assert whole["problems"] == []
    assert whole["n_versions"] == 1
    assert ok("fsck", "--quick").startswith("clean; ")
    assert "would free" in ok("gc", "--plan")
    assert parsed("gc")["freed_bytes"] > 0
    assert "freed 0 B" in ok("gc")


def test_methods_explain_recipe_doctor(ok: Any, parsed: Any, tmp_path: Path) -> None:
    cards = parsed("methods")
    assert {"mos", "lora", "vera", "full"} <= {c["name"] for c in cards}
    assert "use:" in ok("methods", "adapt")
    assert parsed("explain", "mos")["options"]["r"]["type"] == "int"
    assert "arXiv:2410.00938" in ok("explain", "mos")
    template = ok("recipe", "train")
    assert "max_tokens: 512" in template
    (tmp_path / "small.yaml").write_text("fleet: f\nname: n\ndata: {train: t.jsonl}\n")
    assert "warmup_share: 0.05" in ok("recipe", "train", "--check", "small.yaml")
    checks = parsed("doctor")
    assert {"python", "torch", "cores"} <= {c["what"] for c in checks}


def test_chat_goes_on_until_an_empty_line(
    say: Said, own_fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAgain\n\nnever asked\n"))
    code, out, _ = say("chat", "mos", "--max-tokens", "3")
    assert code == 0
    assert out.count("> ") == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert say("chat", "base", "--max-tokens", "3")[0] == 0


def test_generate_reads_standard_input(ok: Any, own_fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The parcel"))
    asked = ok("generate", "mos", "-p", "-", "--max-tokens", "6")
    assert asked == ok("generate", "mos", "-p", "The parcel", "--max-tokens", "6")


def test_a_recipe_file_with_overrides(parsed: Any, own_fleet: Path, text_rows: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"fleet: {own_fleet}\nname: filed\ndata: {{train: {text_rows}, max_tokens: 24}}\n"
        "adapt: {method: lora, r: 2}\ntrain: {steps: 9, batch_rows: 2}\n"
    )
    assert parsed("train", "r.yaml", "train.steps=2")[0]["steps"] == 2


def test_a_plan_loads_no_weights(ok: Any, parsed: Any, tmp_path: Path, base_folder: Path, text_rows: Path) -> None:
    base = Path(shutil.copytree(base_folder, tmp_path / "base"))
    ok("init", "a.fleet", "--base", str(base))
    (base / "model.safetensors").unlink()
    argv = ["train", "fleet=a.fleet", "name=v", f"data.train={text_rows}", *QUICK, "--plan"]
    planned = parsed(*argv)
    assert planned["trained"] == 2 * 3 * (64 + 48 + 48 + 64 + 3 * 96)
    assert planned["n_bytes"] == 4 * planned["trained"]
    assert len(planned["sites"]) == 21
    assert "trained numbers" in ok(*argv)
    assert not (tmp_path / "a.fleet" / "runs").exists()


def test_resume_by_flag(say: Said, ok: Any, own_fleet: Path, text_rows: Path) -> None:
    argv = ["train", f"fleet={own_fleet}", "name=v", f"data.train={text_rows}", *QUICK]
    ok(*argv)
    assert say(*argv)[0] == 2
    assert ok(*argv, "--resume") == "v@1\n"


# ---- errors: one line each


def one_line(got: tuple[int, str, str], code: int, *words: str) -> None:
    assert got[0] == code, got[2]
    errors = [line for line in got[2].splitlines() if line.startswith("plures: ")]
    assert len(errors) == 1, got[2]
    assert got[2].splitlines()[-1] == errors[0]
    assert "Traceback" not in got[2]
    for word in words:
        assert word in errors[0]


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


# ---- as processes


def process(*argv: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "plures", *argv], capture_output=True, text=True, check=False, **how)


def test_errors_of_the_process_itself(own_fleet: Path, tmp_path: Path) -> None:
    done = process("show", "mso", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("plures: ")
    assert done.stderr.count("\n") == 1
    assert process("list", "--fleet", "gone", cwd=tmp_path).returncode == 4


def test_a_ctrl_c_is_exit_130_and_the_run_can_be_resumed(ok: Any, own_fleet: Path, text_rows: Path) -> None:
    argv = ["train", f"fleet={own_fleet}", "name=long", f"data.train={text_rows}", *QUICK, "train.steps=3000",
            "train.save_every=0"]  # fmt: skip
    command = [sys.executable, "-m", "plures", *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("step 20/"):
                child.send_signal(signal.SIGINT)
                break
        rest = child.stderr.read()
    assert child.returncode == 130
    assert "Traceback" not in rest
    run = next((own_fleet / "runs").glob("long-*"))
    progress = json.loads(safe.metadata(run / "checkpoint.safetensors")["progress"])
    assert 20 <= progress["step"] < 3000


HEAVY = """
import sys
sys.argv = ["plures", *{argv!r}]
import runpy
try:
    runpy.run_module("plures", run_name="__main__")
except SystemExit as done:
    assert not done.code, done.code
heavy = [m for m in ("torch", "numpy", "transformers", "peft", "safetensors") if m in sys.modules]
sys.exit(" ".join(heavy) or 0)
"""


@pytest.mark.parametrize(
    "argv", [["--help"], ["list", "--help"], ["train", "--help"], ["methods"], ["recipe", "train"], ["--version"]]
)
def test_what_needs_nothing_heavy_imports_nothing_heavy(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = sum(os.times()[2:4])  # of children: not told by the load of the machine
    done = subprocess.run([sys.executable, "-c", HEAVY.format(argv=argv)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    with capsys.disabled():
        print(f" [plures {' '.join(argv)}: {sum(os.times()[2:4]) - before:.2f} s CPU]", end="")


# ---- who is served


NOT_SO = [
    (["tenant", "acm"], ["no tenant 'acm'", "Did you mean 'acme'"]),
    (["tenant", "acm", "--remove"], ["Did you mean 'acme'"]),
    (["tenant", "acme", "--remove"], ["1 live keys", "force"]),
    (["tenant", "acme", "--remove", "--weight", "2"], ["--remove stands alone"]),
    (["tenant", "acme", "--force"], ["--force with --remove"]),
    (["tenant", "--weight", "2"], ["which tenant"]),
    (["tenant", "--remove"], ["which tenant"]),
    (["tenant", "acme", "--weight", "0"], ["weight must be above 0"]),
    (["tenant", "acme", "--weight", "nan"], ["weight must be above 0"]),
    (["tenant", "acme", "--concurrency", "9" * 400], ["concurrency must be 0"]),
    (["tenant", "acme", "--rate", "-1"], ["rate must be 0"]),
    (["tenant", "a/b", "--weight", "1"], ["not allowed"]),
    (["tenant", "ACME", "--weight", "1"], ["letter case"]),
    (["key", "acm"], ["Did you mean 'acme'"]),
    (["key", "acme", "--admin"], ["belongs to no tenant"]),
    (["key", "--note", "x"], ["a key that is made"]),
    (["key", "acme", "--revoke", "x"], ["--revoke ID stands alone"]),
    (["key", "--revoke", "0123456789abcdef"], ["no live key"]),
]


def test_tenants_are_set_in_part_shown_listed_and_removed(ok: Any, parsed: Any, make_fleet: Any) -> None:
    make_fleet()
    assert parsed("tenant") == []
    made = parsed("tenant", "acme", "--variants", "acme-*, support", "--rate", "2.5")
    assert made == {"name": "acme", "variants": ["acme-*", "support"], "base": True, "weight": 1.0, "concurrency": 0,
                    "rate": 2.5, "tokens_per_minute": 0.0}  # fmt: skip
    changed = parsed("tenant", "acme", "--no-base", "--weight", "3", "--concurrency", "8")
    assert changed == made | {"base": False, "weight": 3.0, "concurrency": 8}
    assert parsed("tenant", "acme", "--tokens-per-minute", "1000")["tokens_per_minute"] == 1000
    assert parsed("tenant", "acme", "--base", "--rate", "0", "--variants", "")["variants"] == []
    shown = parsed("tenant", "acme")
    assert shown == changed | {"base": True, "rate": 0.0, "tokens_per_minute": 1000.0, "variants": []}
    ok("tenant", "beta", "--weight", "0.5")
    assert [t["name"] for t in parsed("tenant")] == ["acme", "beta"]
    listed = ok("tenant").splitlines()
    assert listed[0].split()[:3] == ["tenant", "variants", "base"]
    assert listed[2].split() == ["beta", "*", "yes", "0.5", "-", "-", "-"]
    assert ok("tenant", "acme").splitlines()[1].split() == ["acme", "-", "yes", "3", "8", "-", "1000"]
    assert ok("tenant", "beta", "--remove") == "removed beta\n"
    ok("key", "acme")
    assert parsed("tenant", "acme", "--remove", "--force") == {"removed": "acme"}
    assert parsed("tenant") == []


def test_a_key_s_secret_is_printed_once(say: Said, ok: Any, parsed: Any, make_fleet: Any) -> None:
    from plures.store.access import Access

    fleet = make_fleet()
    assert parsed("key") == []
    ok("tenant", "acme", "--weight", "1")
    code, out, err = say("key", "acme", "--note", "of Ann")
    assert (code, out.count("\n"), err.count("\n")) == (0, 1, 1)
    assert "not shown again" in err and out.strip() not in err
    made = parsed("key", "--admin")
    assert made["kind"] == "admin" and made["tenant"] == ""
    with Access.open(fleet) as access:
        user, admin = access.who(out.strip()), access.who(made["secret"])
        assert user is not None and admin is not None
        assert (user.tenant, user.note, admin.id) == ("acme", "of Ann", made["id"])
        assert {line["by"] for line in access.log()} == {"command line"}
    listed = parsed("key")
    assert {k["id"]: k["kind"] for k in listed} == {user.id: "user", admin.id: "admin"}
    assert "secret" not in listed[0] and "hash" not in listed[0]
    assert out.strip().split("-", 2)[2] not in ok("key")
    assert ok("key", "--revoke", user.id) == f"revoked {user.id}\n"
    assert parsed("key", "--revoke", admin.id) == {"revoked": admin.id}
    assert ok("key").count("revoked ") == 2
    with Access.open(fleet) as access:
        assert access.who(out.strip()) is None


def test_what_no_tenant_and_no_key_may_be(say: Said, ok: Any, make_fleet: Any) -> None:
    make_fleet()
    ok("tenant", "acme", "--weight", "1")
    ok("key", "acme")
    for argv, words in NOT_SO:
        one_line(say(*argv), 2, *words)
