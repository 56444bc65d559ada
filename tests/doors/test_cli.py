"""The command line: every verb does what it says."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from saying import QUICK, Said

from plures.cli.app import verbs


def test_every_verb_is_tried_here() -> None:
    """Here, or in test_cli_access, test_cli_modes, test_serve_command and test_near."""
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
    *_, line = ok("list").splitlines()
    assert line.split()[0] == "support@2" and "text.jsonl (held-out share) +1" in line  # that of its own training
    scores = parsed("list")[0]["scores"]
    assert {(s["dataset"], s["metric"]) for s in scores} >= {(str(text_rows), "bits_per_byte")} and len(scores) == 6
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
