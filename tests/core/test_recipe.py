"""Recipes: everything wrong at once, the nearest key, overrides, round trips, templates."""

# ruff: noqa: RUF009  (`opt` makes a field, as `dataclasses.field` does)

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from plures.core.errors import BadInput, RecipeErrors, WrongUse
from plures.core.recipe import REQUIRED, dump, load, opt, schema_paths, template, to_dict

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Optim:
    lr: float = opt(1e-3, "peak learning rate", gt=0)
    steps: int = opt(10, "optimizer steps", ge=1)
    decay: Literal["linear", "cosine"] = opt("linear", "fall after the warm-up")
    betas: tuple[float, float] = opt((0.9, 0.999), "decay rates", ge=0, lt=1)
    shape: str = opt("wide", "form", choices=("wide", "deep"))


@dataclass
class Data:
    train: str = opt(REQUIRED, "the rows")
    columns: dict[str, str] = opt({}, "names of columns")


@dataclass(frozen=True)
class Note:
    text: str = opt(help="what to say")


@dataclass(frozen=True)
class Recipe:
    name: str = opt(help="name of the variant")
    data: Data = field(default_factory=Data)
    optim: Optim = opt(Optim, "the optimizer")
    adapt: dict[str, Scalar] = opt(default_factory=lambda: {"method": "mos"}, help="method and options")
    layers: list[int] = opt([], "layer numbers", ge=0)
    targets: str | list[str] = opt("all-linear", "sites")
    run: str | None = opt(None, "folder")
    seed: int = opt(0, "seed", ge=0)
    packing: bool = opt(True, "fill windows")
    note: Note | None = opt(None, "a note")


@dataclass(frozen=True)
class Checked:
    low: int = opt(0, "low")
    high: int = opt(1, "high")

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise WrongUse(f"low must be at most high, got '{self.low}' and '{self.high}'")


@dataclass(frozen=True)
class Holder:
    span: Checked = opt(Checked, "a span")


GOOD: dict[str, Any] = {"name": "a", "data": {"train": "rows.jsonl"}}


def problems(source: Any, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        load(Recipe, source, overrides or [])
    assert caught.value.exit_code == 2
    assert not any("\n" in p for p in caught.value.problems)
    assert all(p in str(caught.value) for p in caught.value.problems)
    return caught.value.problems


def one(source: Any, *overrides: str) -> str:
    found = problems(source, list(overrides))
    assert len(found) == 1, found
    return found[0]


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_mapping_and_a_file_give_the_same_recipe(tmp_path: Path) -> None:
    path = written(tmp_path, "name: a\ndata: {train: rows.jsonl}\noptim: {lr: 1e-3, betas: [0.5, 0.9]}\n")
    want = Recipe("a", Data("rows.jsonl"), Optim(betas=(0.5, 0.9)))
    assert load(Recipe, path) == load(Recipe, str(path)) == want
    assert load(Recipe, {**GOOD, "optim": {"lr": 0.001, "betas": [0.5, 0.9]}}) == want


def test_defaults_are_copies() -> None:
    load(Recipe, GOOD).layers.append(3)
    load(Recipe, GOOD).adapt["r"] = 3
    assert load(Recipe, GOOD) == Recipe("a", Data("rows.jsonl"))


def test_the_source_is_left_as_it_was() -> None:
    source = {"name": "a", "data": {"train": "x"}}
    load(Recipe, source, ["data.train=y", "adapt.r=3"])
    assert source == {"name": "a", "data": {"train": "x"}}


def test_all_errors_at_once_each_on_one_line_with_its_path() -> None:
    wrong = {
        "nmae": "a",
        "data": {"train": 3, "columns": {"text": 1}},
        "optim": {"lr": "fast", "steps": True, "decay": "cosin", "betas": [0.1, 2.0], "shape": "wid", "stepz": 1},
        "layers": [0, "one"],
        "seed": -1,
        "packing": 1,
        "note": {},
    }
    found = {p.partition(":")[0]: p for p in problems(wrong)}
    assert set(found) == {
        "name", "nmae", "data.train", "data.columns.text", "optim.lr", "optim.steps", "optim.decay", "optim.betas",
        "optim.shape", "optim.stepz", "layers[1]", "seed", "packing", "note.text",
    }  # fmt: skip
    assert "Did you mean 'name'?" in found["nmae"]
    assert "There are: name, data, optim" in found["nmae"]
    assert found["name"] == "name: is required, a string (name of the variant)"
    assert found["data.train"] == "data.train: got '3'; it must be a string"
    assert found["optim.lr"] == "optim.lr: got 'fast' (text); it must be a number, above 0"
    assert found["optim.steps"] == "optim.steps: got 'true'; it must be an integer, at least 1"
    assert found["optim.decay"].endswith("it must be one of 'linear', 'cosine'. Did you mean 'cosine'?")
    assert found["optim.betas"].endswith("at least 0, below 1")
    assert found["optim.shape"].endswith("one of 'wide', 'deep'. Did you mean 'wide'?")
    assert "Did you mean 'steps'?" in found["optim.stepz"]
    assert found["seed"] == "seed: got '-1'; it must be an integer, at least 0"
    assert found["packing"] == "packing: got '1'; it must be true or false"
    assert found["note.text"].startswith("note.text: is required")


def test_an_absent_section_names_what_is_required_in_it() -> None:
    assert one({"name": "a"}).startswith("data.train: is required, a string")


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("seed='10'", "seed: got '10' (text); it must be an integer"),
        ("seed=true", "seed: got 'true'"),
        ("seed=1.0", "seed: got '1.0'"),
        ("seed=1e3", "seed: got '1000.0'"),
        ("seed=null", "seed: got 'null'"),
        ("optim.lr='0.1'", "optim.lr: got '0.1' (text); it must be a number, above 0"),
        ("optim.lr=true", "optim.lr: got 'true'"),
        ("optim.lr=0", "optim.lr: got '0'; it must be a number, above 0"),
        ("optim.lr=1e999", "optim.lr: got 'inf'; it must be finite"),
        ("optim.steps=0", "optim.steps: got '0'; it must be an integer, at least 1"),
        ("optim.betas=[0.1]", "optim.betas: got '[0.1]'; it must be a list of 2"),
        ("optim.betas=[0.1, 1]", "optim.betas: got '[0.1, 1]'"),
        ("layers=[1, -1]", "layers: got '[1, -1]'; it must be a list, each an integer, at least 0"),
        ("layers=3", "layers: got '3'; it must be a list"),
        ("name=3", "name: got '3'; it must be a string"),
        ("name=", "name: is required"),
        ("packing=yes", "packing: got 'yes' (text); it must be true or false"),
        ("optim=null", "optim: got 'null'; it must be a mapping with the keys lr"),
        ("targets=1.5", "targets: got '1.5'; it must be a string or a list, each a string"),
        ("adapt.r=[1]", "adapt.r: got '[1]'; it must be true or false or an integer"),
        ("lr=3", "lr: '3' is given to a key that does not exist. Did you mean 'optim.lr'?"),
        ("optim.stps=3", "Did you mean 'steps'?"),
        ("seed.x=3", "seed: got '{'x': 3}'"),
        ("seed", "'seed' is not an override; write one as path.to.key=value"),
        ("=3", "'=3' is not an override"),
        ("optim..lr=3", "is not an override"),
        ("name='a", "name: \"'a\" is not a YAML value: line 1"),
        ("name={a: 1, a: 2}", "the key 'a' is there twice"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(override: str, want: str) -> None:
    assert want in one(GOOD, override)


def test_an_override_cannot_go_through_a_value() -> None:
    found = problems({**GOOD, "seed": 3, "zzz": 1}, ["seed.x=1", "optim.steps=0"])
    assert found[0] == "seed.x: cannot be set, because seed is '3' and not a mapping"
    assert any(p.startswith("zzz: ") for p in found)
    assert any(p.startswith("optim.steps: ") for p in found)
    assert len(found) == 3


def test_overrides_reach_sections_dicts_lists_and_optional_sections() -> None:
    got = load(Recipe, GOOD, [
        "optim.lr=1e-4", "adapt.r=4", "adapt.a.b=x", "layers=[1, 2]", "name=b", "name=c # d", "run=~", "note.text='1'",
        "data.columns.text=body: x", "optim.lr = 2",
    ])  # fmt: skip
    assert got.optim.lr == 2.0
    assert isinstance(got.optim.lr, float)
    assert got.adapt == {"method": "mos", "r": 4, "a.b": "x"}  # the default's other keys stay
    assert got.layers == [1, 2]
    assert got.name == "c # d"
    assert got.run is None
    assert got.note == Note("1")
    assert got.data.columns == {"text": "body: x"}


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    adapt = "{a: 1e-3, b: 010, c: 0x10, d: on, e: true, f: 1_000, g: '1', h: 1:30}"
    got = load(Recipe, written(tmp_path, f"name: no\ndata: {{train: 2024-01-01}}\nadapt: {adapt}\n"))
    assert got.name == "no"
    assert got.data.train == "2024-01-01"
    assert got.adapt == {"a": 0.001, "b": 10, "c": 16, "d": "on", "e": True, "f": 1000, "g": "1", "h": "1:30"}
    assert [type(v) for v in got.adapt.values()] == [float, int, int, str, bool, int, str, str]


def test_a_whole_number_is_fine_for_a_float() -> None:
    lr = load(Recipe, {**GOOD, "optim": {"lr": 1}}).optim.lr
    assert lr == 1.0
    assert isinstance(lr, float)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a: 1\nb: [1\nc: 2\n", "line 3, column"),
        ("name: a\nname: b\n", "line 2, column 1: the key 'name' is there twice"),
        ("data:\n  train: a\n  train: b\n", "line 3, column 3: the key 'train' is there twice"),
        ("- a\n- b\n", "must be a mapping of keys to values"),
        ("just words", "must be a mapping of keys to values, got 'just words' (text)"),
        ("a: &x [*x]\n", "aliases are not allowed"),
        ("a: 1\n---\nb: 2\n", "line 2"),
        ("!!python/object/apply:os.system [id]\n", "line 1"),
        ("a: \x07\n", "is not YAML"),
        ("a: [" * 3000, "is not YAML"),
        ("seed: " + "9" * 5000, "is not YAML"),
        (b"name: a\nrun: \xff\n", "is not UTF-8 text: line 2"),
    ],
)
def test_a_malformed_file_is_bad_input_in_one_line(tmp_path: Path, text: str | bytes, want: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(BadInput) as caught:
        load(Recipe, path)
    assert caught.value.exit_code == 4
    assert want in str(caught.value)
    assert repr(str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_is_a_folder_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.yaml': it does not exist") as caught:
        load(Recipe, tmp_path / "none.yaml")
    assert caught.value.exit_code == 4
    with pytest.raises(BadInput, match="cannot read"):
        load(Recipe, tmp_path)


@pytest.mark.parametrize("source", ["name: a\nseed: 3\n", 3, None, ["a"], "a\0b"])
def test_a_source_of_another_kind_is_wrong_use(source: Any) -> None:
    with pytest.raises(WrongUse, match="neither a path nor a mapping") as caught:
        load(Recipe, source, where="train")
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("train: ")


def test_an_empty_file_names_what_is_required(tmp_path: Path) -> None:
    found = problems(written(tmp_path, "# nothing\n"))
    assert [p.partition(":")[0] for p in found] == ["name", "data.train"]


def test_messages_name_the_file_and_where(tmp_path: Path) -> None:
    path = written(tmp_path, "name: 3\ndata: {train: x}\n")
    with pytest.raises(RecipeErrors) as caught:
        load(Recipe, path, where="train")
    assert str(caught.value) == f"train {str(path)!r}: name: got '3'; it must be a string"


def test_keys_and_values_that_are_not_yamls_own_are_named() -> None:
    assert "the key '1' must be a string" in one({**GOOD, "adapt": {1: "x"}})
    assert one({**GOOD, "seed": {1, 2}}).startswith("seed: got '{1, 2}'; it must be text, a number")


def test_a_path_in_a_mapping_is_text() -> None:
    assert load(Recipe, {"name": "a", "data": {"train": Path("x/y")}}).data.train == "x/y"


def test_what_a_dataclass_checks_itself_comes_with_its_path() -> None:
    with pytest.raises(RecipeErrors) as caught:
        load(Holder, {"span": {"low": 3}})
    assert caught.value.problems == ["span: low must be at most high, got '3' and '1'"]
    with pytest.raises(RecipeErrors) as caught:
        load(Checked, {"low": 3})
    assert caught.value.problems == ["low must be at most high, got '3' and '1'"]


AWKWARD = Recipe(
    "no", Data("1e-3", {"text": "a: b", "x": "é😀\nnew"}), Optim(lr=1e-7, betas=(0.0, 0.5)),
    {"method": "x", "r": 4, "e": 0.5, "on": True, "s": "true", "n": "0x1F", "d": "1:30", "w": " a "},
    [1, 2], ["a", "null"], "2024-01-01", note=Note("#"),
)  # fmt: skip


@pytest.mark.parametrize("recipe", [Recipe("a", Data("b")), AWKWARD])
def test_dump_loads_back_equal_and_keeps_order(tmp_path: Path, recipe: Recipe) -> None:
    text = dump(recipe)
    assert load(Recipe, written(tmp_path, text)) == recipe
    keys = [line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()]
    assert keys == list(to_dict(recipe)) == [p for p in schema_paths(Recipe) if "." not in p]


def test_to_dict_is_plain() -> None:
    got = to_dict(AWKWARD)
    assert got["optim"]["betas"] == [0.0, 0.5]
    assert type(got["data"]) is dict
    assert load(Recipe, got) == AWKWARD


def test_template_has_help_type_limits_and_marks_and_loads_once_filled(tmp_path: Path) -> None:
    text = template(Recipe)
    assert "# name of the variant\n# required; a string\nname:\n" in text
    assert "  # peak learning rate\n  # a number, above 0\n  lr: 0.001\n" in text
    assert "# seed\n# an integer, at least 0\nseed: 0\n" in text
    assert "  # one of 'linear', 'cosine'\n  decay: linear\n" in text
    assert "note: null\n" in text
    assert "#   text:" in text
    path = written(tmp_path, text)
    assert [p.partition(":")[0] for p in problems(path)] == ["name", "data.train"]
    assert load(Recipe, path, ["name=a", "data.train=b"]) == Recipe("a", Data("b"))
    filled = text.replace("name:\n", "name: a\n").replace("  train:\n", "  train: b\n")
    assert load(Recipe, written(tmp_path, filled)) == Recipe("a", Data("b"))


def test_schema_paths_are_dotted_and_complete() -> None:
    assert schema_paths(Recipe) == [
        "name", "data", "data.train", "data.columns", "optim", "optim.lr", "optim.steps", "optim.decay", "optim.betas",
        "optim.shape", "adapt", "layers", "targets", "run", "seed", "packing", "note", "note.text",
    ]  # fmt: skip


def test_opt_refuses_unknown_limits_and_defaults_that_break_their_own() -> None:
    with pytest.raises(AssertionError, match="limits are"):
        opt(1, "x", least=3)
    with pytest.raises(AssertionError, match="breaks its own limits"):
        opt(0, "x", ge=1)
    with pytest.raises(AssertionError, match="give the class Optim"):
        opt(Optim(lr=3), "x")


def test_importing_the_module_is_cheap() -> None:
    code = (
        "import sys, plures.core.recipe; "
        "assert not {'yaml', 'pydantic', 'numpy', 'torch'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
