"""What a command's words mean: overrides, the fleet that is found, plans that write nothing, what is refused."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plures.cli.output import quoted, read_recipe, say_json, say_text, split_said
from plures.core.errors import RecipeErrors, WrongUse
from plures.flows.recipes import EmbedRecipe, PackRecipe, TrainRecipe
from plures.store import Store
from tiny import write_rows

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(say: Run) -> Run:
    return say


@pytest.fixture
def planned(run: Run) -> Callable[..., Any]:
    """The plan of a command, as JSON; it is the same for people, and neither writes a file."""

    def one(*argv: str) -> Any:
        before = files()
        code, out, err = run(*argv, "--plan")
        assert code == 0 and out.strip(), err
        code, out, err = run(*argv, "--plan", "--json")
        assert code == 0, err
        assert files() == before
        return json.loads(out)

    return one


def files() -> dict[str, int]:
    """Every file here with its size, but those that SQLite and locks leave."""
    left = ("-wal", "-shm", "lock", "gate")
    return {str(p): p.stat().st_size for p in Path().rglob("*") if p.is_file() and not p.name.endswith(left)}


def refs(fleet: Path) -> list[str]:
    with Store.open(fleet) as store:
        return [v.ref for v in store.versions(all=True)]


def test_words_are_files_or_overrides_by_one_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("seed=3").touch()
    said = ["a.jsonl", "width=32", "data.train=b.jsonl", "what is 1 + 1 = 2?", "x/y=1.parquet", "seed=3",
            "adapt={r: 1}"]  # fmt: skip
    assert split_said(said) == (["a.jsonl", "what is 1 + 1 = 2?", "x/y=1.parquet", "seed=3"],
                                ["width=32", "data.train=b.jsonl", "adapt={r: 1}"])  # fmt: skip
    assert split_said(["a" * 5000]) == (["a" * 5000], [])


@pytest.mark.parametrize("text", ["{name}.jsonl", "[a]", "it's", 'a "b"', "1e3", "no: yes # x", "é 𝄞   \x85 \n",
                                  "true", "null", "~", "- a", "*x", "&x", "%", "@"])  # fmt: skip
def test_options_are_values_whatever_is_in_them(text: str) -> None:
    assert read_recipe(PackRecipe, "pack", [], {"fleet": "f", "held_out": text}).held_out == text
    assert read_recipe(EmbedRecipe, "embed", [text], {}, others="pool").pool == [text]
    assert quoted(text).isprintable() and quoted(text).isascii()


def test_rows_to_score_on_may_name_the_variant(run: Run, own_fleet: Path) -> None:
    code, _, err = run("pack", str(own_fleet), "--held-out", "{name}.jsonl")
    assert code == 2 and "held_out = '{name}.jsonl': 'full.jsonl' is not there" in err


def test_a_recipe_file_has_less_to_say_than_the_options_and_these_than_overrides(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("{pool: [a.jsonl], out: a, width: 64}")
    read = read_recipe(EmbedRecipe, "embed", [str(path), "out=c"], {"out": "b", "model": ""}, others="pool")
    assert (read.pool, read.out, read.width) == (["a.jsonl"], "c", 64)
    with pytest.raises(WrongUse, match="one recipe at a time"):
        read_recipe(EmbedRecipe, "embed", [str(path), "b.yml"], {}, others="pool")


TRAIN = ["name=v", "data.train=t.jsonl"]


def test_the_fleet_is_found_for_recipes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_fleet: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeErrors, match=r"fleet: which fleet\? no \*.fleet folder is here; say fleet=PATH"):
        read_recipe(TrainRecipe, "train", TRAIN)
    make_fleet("one.fleet")
    assert read_recipe(TrainRecipe, "train", TRAIN).fleet == "one.fleet"
    assert read_recipe(PackRecipe, "pack", []).fleet == "one.fleet"
    assert read_recipe(TrainRecipe, "train", [*TRAIN, "fleet=other"]).fleet == "other"
    Path("r.yaml").write_text("fleet: said.fleet")
    assert read_recipe(TrainRecipe, "train", ["r.yaml", *TRAIN]).fleet == "said.fleet"
    make_fleet("two.fleet")
    with pytest.raises(RecipeErrors, match=r"2 are here: one.fleet, two.fleet"):
        read_recipe(TrainRecipe, "train", TRAIN)
    monkeypatch.setenv("PLURES_FLEET", "two.fleet")
    assert read_recipe(TrainRecipe, "train", TRAIN).fleet == "two.fleet"
    assert read_recipe(TrainRecipe, "train", ["r.yaml", *TRAIN]).fleet == "said.fleet"


def test_all_that_is_wrong_is_still_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeErrors) as caught:
        read_recipe(TrainRecipe, "train", ["train.steps=0"])
    assert len(caught.value.problems) == 4 and sum("which fleet?" in p for p in caught.value.problems) == 1


def test_four_verbs_find_the_only_fleet_here(run: Run, planned: Any, own_fleet: Path, text_rows: Path) -> None:
    assert planned("pack")["variants"] == 4
    assert planned("train", "name=x", f"data.train={text_rows}", "adapt.method=lora")["trained"] > 0
    rows = [json.loads(line) for line in text_rows.read_text().splitlines()]
    write_rows(Path("two.jsonl"), ({**row, "who": "ab"[i % 2]} for i, row in enumerate(rows)))
    told = planned("weigh", "rows=two.jsonl", "key=who", f"held_out={text_rows}", "steps=3", "batch_rows=2",
                   "adapt.method=lora")  # fmt: skip
    assert told["rows"] == {"a": 30, "b": 30} and told["windows"] == 10 and not Path("weights.json").exists()
    code, _, err = run("evolve", "name=x", "variants=[mos, gone]", f"tasks=[{text_rows}, {text_rows}]")
    assert code == 2 and "no variant named 'gone' in this fleet" in err


def test_a_recipe_s_fleet_comes_before_the_environment_s(
    run: Run, own_fleet: Path, text_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("r.yaml").write_text(json.dumps({"fleet": str(own_fleet), "rows": str(text_rows), "want": ["tokens"]}))
    monkeypatch.setenv("PLURES_FLEET", "nowhere.fleet")
    assert run("rate", "r.yaml", "--plan")[0] == 0
    assert run("rate", "r.yaml", "--plan", "--fleet", "gone.fleet")[0] == 4


# ---- merge


def test_a_planned_sum_publishes_nothing(planned: Any, run: Run, own_fleet: Path) -> None:
    before = refs(own_fleet)
    told = planned("merge", "lora=.5", "mos=.5", "--name", "s")
    assert told["names"] == ["s"] and told["variants"] == ["lora@1", "mos@1"] and told["rank"] == sum(told["ranks"])
    swept = planned("merge", "lora", "mos", "--name", "w", "--sweep", "2")
    assert swept["names"] == ["w-0", "w-1"]
    assert refs(own_fleet) == before
    for argv, name in ((["lora=.5", "mos=.5", "--name", "s"], "s"),
                       (["lora", "mos", "--name", "w", "--sweep", "2"], "w-1")):  # fmt: skip
        assert run("merge", *argv)[0] == 0
        with Store.open(own_fleet) as store:
            made = store.resolve(name)
            assert (made.options["r"], made.n_bytes) == (told["rank"], told["n_bytes"])
    assert planned("merge", "lora=.5", "mos=.5", "--name", "s", "--rank", "1")["rank"] == 1


def test_a_planned_publication_is_of_variants(planned: Any, run: Run, own_fleet: Path) -> None:
    said = {"merge_method": "task_arithmetic", "base_model": "acme.fleet",
            "models": [{"model": f"acme.fleet::{n}", "parameters": {"weight": 1}} for n in ("lora", "mos")]}
    Path("m.yml").write_text(json.dumps(said))
    told = planned("merge", "m.yml", "--name", "s")
    assert run("merge", "m.yml", "--name", "s")[0] == 0
    with Store.open(own_fleet) as store:
        made = store.resolve("s")
    assert told["names"] == ["s"] and (told["rank"], told["n_bytes"]) == (made.options["r"], made.n_bytes)


UNUSED = [
    (["lora=.5", "mos=.5", "--name", "s", "--seed", "1"], "--seed"),
    (["lora=.5", "--name", "s", "--workers", "2"], "--workers"),
    (["lora=.5", "--name", "s", "--rest", "keep"], "--rest"),
    (["lora=.5", "--name", "s", "--diagnose"], "--diagnose"),
    (["lora", "mos", "--name", "s", "--sweep", "2", "--seed", "0", "--workers", "1"], "--seed, --workers"),
    (["m.yml", "--name", "s", "--workers", "2"], "--workers"),
    (["m.yml", "out", "--rank", "2"], "--rank"),
    (["m.yml", "out", "--rest", "drop"], "--rest"),
    (["m.yml", "--diagnose", "--plan"], "--plan"),
    (["m.yml", "--diagnose", "--name", "s"], "--name"),
    (["m.yml", "out", "--diagnose"], "'out'"),
    (["m.yml", "out", "--name", "s"], "'out'"),
    (["m.yml", "lora=.5"], "'lora=.5'"),
    (["lora=.5", "lora=.2", "--name", "s"], "'lora' is named twice"),
    (["lora=nan", "--name", "s"], "'lora=nan'"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "said"), UNUSED)
def test_merge_refuses_what_it_would_not_read(run: Run, own_fleet: Path, argv: list[str], said: str) -> None:
    Path("m.yml").write_text("{merge_method: linear, models: [{model: acme.fleet}]}")
    before = refs(own_fleet)
    code, _, err = run("merge", *argv)
    assert code == 2 and said in err and refs(own_fleet) == before


# ---- plans


def test_plans_say_what_is_then_written(planned: Any, run: Run, own_fleet: Path, text_rows: Path) -> None:
    for kind in ("f16", "int8"):
        told = planned("embed", str(text_rows), "-o", f"{kind}.emb", "width=32", f"kind={kind}")
        assert run("embed", str(text_rows), "-o", f"{kind}.emb", "width=32", f"kind={kind}")[0] == 0
        size = sum(p.stat().st_size for p in Path(f"{kind}.emb").iterdir() if p.name != "about.json")
        assert (told["rows"], told["n_bytes"]) == (60, size)
    told = planned("rate", str(text_rows), "--want", "loss", "--want", "tokens", "-o", "r.parquet", "--variant", "mos")
    assert told["columns"] == ["loss", "tokens"] and told["variants"] == ["mos@1"] and told["runs"] == 1
    assert planned("rate", str(text_rows), "--want", "tokens")["base_bytes"] == 0
    assert run("rate", str(text_rows), "--variant", "gone", "--plan")[0] == 2
    assert run("embed", str(text_rows), "-o", str(own_fleet), "--plan")[0] == 2


def test_a_planned_extraction(planned: Any, run: Run, own_fleet: Path) -> None:
    assert run("export", "mos", "whole", "--as", "merged")[0] == 0
    told = planned("extract", "whole", "--name", "x", "--rank", "2")
    assert run("extract", "whole", "--name", "x", "--rank", "2")[0] == 0
    with Store.open(own_fleet) as store:
        assert store.resolve("x").n_bytes == told["n_bytes"]
    assert told["sites"] == 21 and told["others"] > 0
    assert run("extract", "whole", "--name", "a/b", "--plan")[0] == 2


def test_a_planned_comparison(planned: Any, run: Run, base_folder: Path, text_rows: Path) -> None:
    rows = {part: str(text_rows) for part in ("train", "valid", "test")}
    said = {"base": str(base_folder), "tenants": [{"name": n} | rows for n in "abc"], "steps": 2, "seeds": 2,
            "rates": 1, "most_rates": 3, "max_tokens": 24, "workers": 1, "out": "compared",
            "contenders": [{"method": "lora", "options": {"r": 1}}, {"method": "vera"}]}  # fmt: skip
    Path("bench.yaml").write_text(json.dumps(said))
    told = planned("bench", "bench.yaml")
    assert (told["search"], told["search_most"], told["score"], told["done"], told["cpu_s"]) == (2, 6, 8, 0, None)
    cells = [{"contender": "lora", "cpu_s": 3.0}] * 4
    Path("compared").mkdir()
    Path("compared/cells.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cells) + '{"torn')
    told = planned("bench", "bench.yaml")
    assert (told["done"], told["cpu_s"]) == (4, 18.0)
    assert planned("bench", "out=of-the-demo")["tenants"] == ["topics", "bytecode"]
    assert not Path("of-the-demo").exists()


def test_pack_and_gc_plans(planned: Any, run: Run, own_fleet: Path) -> None:
    told = planned("pack", "acme.fleet")
    assert set(told) >= {"variants", "low_rank", "sites", "numbers", "n_bytes", "out"} and told["low_rank"] == 3
    assert run("pack", "acme.fleet", "--plan", "--method", "klr")[0] == 2
    assert run("rm", "mos", "--all")[0] == 0
    before = json.loads(run("gc", "--plan", "--json")[1])
    assert before["plan"] and before["freed_bytes"] > 0 and run("gc", "--dry")[0] == 2
    assert json.loads(run("gc", "--json")[1])["freed_bytes"] == before["freed_bytes"]


# ---- bounds


BOUNDS = [["demo", "--seeds", "0"], ["demo", "--steps", "0"], ["demo", "--workers", "-1"], ["serve", "--port", "-1"],
          ["serve", "--admin-port", "65536"], ["serve", "--rows", "0"], ["serve", "--slots", "0"],
          ["serve", "--replicas", "0"], ["serve", "--grace", "-1"], ["serve", "--threads", "-1"],
          ["serve", "--kv-tokens", "-1"], ["serve", "--on", "rays"], ["bench", "--on", "dask"],
          ["extract", "t", "--name", "x", "--rest", "all"], ["generate", "mos", "-p", "x", "--max-tokens", "0"],
          ["score", "mos", "x", "--max-tokens", "1"], ["chat", "mos", "--max-tokens", "0"],
          ["near", "x", "y", "-k", "0"], ["merge", "m.yml", "--sweep", "1"]]  # fmt: skip


@pytest.mark.parametrize("argv", BOUNDS, ids=" ".join)
def test_numbers_that_cannot_be_are_refused_before_anything_is_done(run: Run, tmp_path: Path, argv: list[str]) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / ".plures-demo").touch()
    (tmp_path / "demo" / "kept").touch()
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and argv[-2] in err and "internal error" not in err
    assert (tmp_path / "demo" / "kept").exists()


def test_a_demo_that_cannot_be_keeps_the_earlier_one(tmp_path: Path) -> None:
    from plures.demo.tour import run as tour

    (tmp_path / ".plures-demo").touch()
    (tmp_path / "kept").touch()
    for wrong in ({"seeds": 0}, {"steps": 0}, {"workers": -1}):
        with pytest.raises(WrongUse, match="must be at least"):
            tour(str(tmp_path), quiet=True, **wrong)
    assert (tmp_path / "kept").exists()


# ---- JSON, and text on a terminal


def test_json_has_no_numbers_that_json_has_not(run: Run, text_rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def strict(text: str) -> Any:
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    code, out, err = run("select", str(text_rows), "--method", "random", "--budget", "5", "-o", "r.jsonl", "--json")
    assert code == 0, err
    told = strict(out)
    assert (told["rows"], told["coverage"], told["value"], told["bound"]) == (5, None, None, None)
    assert strict(Path("r.jsonl.json").read_text())["result"]["coverage"] is None
    say_json({"a": [float("inf"), {"b": float("nan")}], "p": Path("x")})
    assert strict(capsys.readouterr().out) == {"a": [None, {"b": None}], "p": "x"}
    with pytest.raises(TypeError, match="has no form in JSON"):
        say_json({"a": object()})


def test_one_language_for_versions(run: Run, own_fleet: Path) -> None:
    assert run("export", "lora", "out")[0] == 0
    said = {"merge_method": "linear", "models": [{"model": "acme.fleet::lora"}]}
    Path("m.yml").write_text(json.dumps(said))
    lists = [["list", "--all"], ["import", "out", "--name", "n"], ["merge", "lora=1", "--name", "n"],
             ["merge", "m.yml", "--name", "n"]]  # fmt: skip
    for argv in lists:
        code, out, err = run(*argv, "--json")
        assert code == 0, err
        told = json.loads(out)
        assert isinstance(told, list) and all(v["ref"] == f"{v['name']}@{v['version']}" for v in told), argv
        assert all(isinstance(v["n_bytes"], int) and v["identity"] for v in told)
    one = json.loads(run("show", "n", "--json")[1])
    assert (one["ref"], one["version"]) == ("n@3", 3)


def test_what_models_say_steers_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say_text("a\x1b[2Jb\n")
    assert capsys.readouterr().out == "a\x1b[2Jb\n\n"  # into a pipe as it is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    say_text("a\x1b[2Jb\n")
    assert capsys.readouterr().out == "a\\x1b[2Jb\n\n"


# ---- the others


def test_doctor_checks_what_the_package_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from plures.flows import doctor

    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert {*doctor.EXTRAS, "dev"} == set(project["project"]["optional-dependencies"])
    monkeypatch.setattr(doctor, "requires", lambda _: [
        "numpy>=1", "torch>=99", "gone", "odd; sys_platform == 'no'", 'nowhere>=1; extra == "near"',
        'x; extra == "dev"'])  # fmt: skip
    found = {c.what: c for c in doctor.packages()}
    assert list(found) == ["numpy", "torch", "gone", "nowhere"]
    assert [c.good for c in found.values()] == [True, False, False, False]
    assert ">=99 is wanted" in found["torch"].found and found["torch"].needed
    assert not found["nowhere"].needed and "plures[near]" in found["nowhere"].use
    assert run("doctor")[0] == 5


def test_a_fleet_begins_and_its_base_moves(make_fleet: Any, base_folder: Path, tmp_path: Path) -> None:
    import shutil

    from plures.flows.begin import begin

    first = begin(tmp_path / "new.fleet", str(base_folder))
    assert first.was is None and first.base.name == str(base_folder.resolve())
    with pytest.raises(WrongUse, match="already is a fleet"):
        begin(tmp_path / "new.fleet", str(base_folder))
    shutil.copytree(base_folder, tmp_path / "moved")
    second = begin(tmp_path / "new.fleet", str(tmp_path / "moved"))
    assert second.was == first.base
    with Store.open(tmp_path / "new.fleet") as store:
        assert store.base == second.base


def test_methods_have_names_of_their_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from plures.flows import capabilities

    real = capabilities.folders()
    names = [n for folder in real.values() for n in folder]
    assert sorted(set(names)) == sorted(names)
    assert run("explain", "adapt/mos")[0] == 0
    assert "Did you mean 'adapt/mos'" in run("explain", "adapt/mso")[2]
    monkeypatch.setattr(capabilities, "folders", lambda: {**real, "other": real["route"]})
    code, _, err = run("explain", "drm")
    assert code == 2 and "route/drm, other/drm" in err
    assert run("explain", "route/drm")[1].startswith("drm (route, ")


def test_a_comparison_of_choices_has_no_other_options(run: Run, text_rows: Path) -> None:
    for name in ("a", "b"):
        assert run("select", str(text_rows), "--method", "random", "--budget", "5", "-o", f"{name}.jsonl")[0] == 0
    code, _, err = run("select", "diff", "a.jsonl", "b.jsonl", "--budget", "5", "--at-most", "x=y:1", "--plan")
    assert code == 2 and "--budget, --at-most, --plan say nothing" in err


def test_features_that_are_neither_column_nor_folder(run: Run, tmp_path: Path, text_rows: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    pool.write_bytes(text_rows.read_bytes())
    code, _, err = run("select", "pool.jsonl", "features=pool.emb", "--plan")
    assert code == 4 and "no column 'pool.emb'" in err and "no folder of vectors beside it" in err
    assert run("embed", "pool.jsonl", "-o", "pools.emb")[0] == 0
    code, _, err = run("select", "pool.jsonl", "features=pool.emb", "--plan")
    assert code == 4 and "Did you mean 'pools.emb'" in err
