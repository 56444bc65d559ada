"""The documents say what the code does: generated pages in step, links, commands, recipes and Python blocks."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import plures
from pages import fenced
from plures.adapt import adapts
from plures.cli.app import app, verbs
from plures.core.folder import options_of
from plures.core.recipe import load
from plures.flows.capabilities import folders
from plures.flows.recipes import TrainRecipe
from plures.loss import losses

ROOT = Path(__file__).resolve().parents[2]
TOP = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
CARD = ROOT / "src" / "plures" / "demo" / "base" / "README.md"
PAGES = sorted([*TOP, *(ROOT / "docs").rglob("*.md"), CARD])


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(language: str) -> list[Any]:
    """Every fenced block of a language, in every page."""
    out = []
    for page in PAGES:
        for i, (_, _, found) in enumerate(fenced(page, language)):
            out.append(pytest.param(found, id=f"{named(page)}-{i}"))
    return out


def commands() -> list[Any]:
    """Every `plures …` line of the bash blocks."""
    return [
        pytest.param(line, id=f"{str(block.id).rpartition('-')[0]}: {line}")
        for block in blocks("bash")
        for line in block.values[0].splitlines()
        if line.startswith("plures ")
    ]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    """tools/write_docs.py, which is no package."""
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "tools" / "write_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_in_step(writer: ModuleType) -> None:
    assert writer.stale(writer.pages()) == [], "run `make docs`"


def test_a_missing_result_is_said_to_be_missing(writer: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(writer, "RESULTS", tmp_path)
    assert writer.measured(brief=True).count("not measured yet") == len(writer.BENCHMARKS)


def test_a_full_comparison_leaves_the_readme_short_enough(writer: ModuleType) -> None:
    row = {
        "trained": 61440, "bits_per_byte": 1.3, "sd_over_seeds": 0.001, "gain_over_lora_at_equal_parameters": None,
        "wins_over_lora_at_equal_parameters": None,
    }  # fmt: skip
    names = [*(f"lora-r{r}" for r in (1, 2, 4, 8, 16)), *(f"mos-e{i}" for i in range(5)), "full", "pure-sharing"]
    said = {"about": "a base", "tenants": ["a", "b"], "seeds": 3, "steps": 120, "base_bits_per_byte": {"a": 1, "b": 2},
            "contenders": dict.fromkeys(names, row)}  # fmt: skip
    brief = writer.equal_budget(said, brief=True)
    assert "pure-sharing" not in brief
    assert "pure-sharing" in writer.equal_budget(said, brief=False)
    now = writer.pages()[Path("README.md")].splitlines()
    room = brief.count("\n") if "not measured yet" in now else 0
    assert len(now) + room <= 150


def test_pages_keep_to_their_length() -> None:
    limits = {"README.md": 150, "ARCHITECTURE.md": 200}
    limits |= {named(p): 40 for p in (ROOT / "docs" / "decisions").glob("*.md")}
    long = {n: len((ROOT / n).read_text().splitlines()) for n in limits}
    assert {n: k for n, k in long.items() if k > limits[n]} == {}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{named(page)} links to {target!r}, which is not there"
        if anchor:
            assert anchor in anchors(there), f"{named(page)} links to {target!r}, which has no such heading"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def test_every_page_is_linked() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s:]+)\)", page.read_text(encoding="utf-8"))
    }
    alone = [named(p) for p in PAGES if p not in linked and p.name != "README.md" and "decisions" not in p.parts]
    assert alone == []


def test_every_verb_stands_in_a_heading_or_block_of_a_page_written_by_hand(writer: ModuleType) -> None:
    top: Any = typer.main.get_command(app)
    shown = top.list_commands(top.make_context("plures", [], resilient_parsing=True))
    hand = [p for p in (ROOT / "docs").glob("*.md") if writer.MARK not in p.read_text(encoding="utf-8")]
    heads = [line for p in hand for line in re.findall(r"^#+ .+$", p.read_text(encoding="utf-8"), re.MULTILINE)]
    shows = "\n".join([*heads, *(text for p in hand for _, _, text in fenced(p))])
    assert shown, "the app has verbs"
    assert [verb for verb in shown if not re.search(rf"\bplures {verb}(?![\w-])", shows)] == []


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    words = shlex.split(line.partition(" > ")[0], comments=True)[1:]  # without where its output goes
    top: Any = typer.main.get_command(app)
    context = top.make_context("plures", [], resilient_parsing=True)
    verb = top.get_command(context, words[0])
    assert verb is not None, f"no verb {words[0]!r}"
    parsed = verb.make_context(words[0], words[1:], parent=context)
    if words[0] == "train":
        overrides = [w for w in parsed.params["recipe"] if "=" in w]
        method(load(TrainRecipe, {}, ["fleet=f", "name=n", "data.train=t", *overrides]))


def method(recipe: TrainRecipe) -> Any:
    """The recipe's method, so that its options and its loss's are checked."""
    loss, how = recipe.objective()
    losses.make(loss, **how)
    name, options = recipe.method()
    return adapts.make(name, **options)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_load(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    given = [k for k in ("fleet", "name") if re.search(rf"^{k}: \S", text, re.MULTILINE)]
    rest = [f"{k}={k}" for k in ("fleet", "name") if k not in given]
    method(load(TrainRecipe, path, [*rest, "data.train=rows.jsonl"]))


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks_compile(text: str) -> None:
    compile(text, "block", "exec")
    for name in re.findall(r"\bplures\.([A-Za-z_]\w*)", text):
        assert name in plures.__all__ or importlib.util.find_spec(f"plures.{name}"), f"plures.{name} is not there"
    for names in re.findall(r"^from plures import (.+)$", text, re.MULTILINE):
        assert set(names.split(", ")) <= set(plures.__all__)


def test_the_worked_example_of_mos_prints_what_it_says() -> None:
    text = (ROOT / "docs" / "mos.md").read_text(encoding="utf-8")
    code, said = re.search(r"```python\n(.*?)```\n\n```output\n(.*?)```", text, re.DOTALL).groups()  # type: ignore[union-attr]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == said


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, folder in folders().items() for name in folder])
def test_methods_have_their_sections(kind: str, name: str, writer: ModuleType) -> None:
    cls = folders()[kind][name]
    doc = writer.sections(cls.__doc__ or "")
    options = options_of(cls)
    wanted = ["", *(["Options"] if options else []), *(["Shapes"] if kind in ("adapt", "loss") else []), "Paper",
              "Departs from the paper"]  # fmt: skip
    assert [s for s in wanted if not doc.get(s, "").strip()] == []
    assert [k for k, (_, _, text) in options.items() if not text] == [], "an option without a line under Options"
    if "WrongUse" in inspect.getsource(cls):
        assert "WrongUse" in doc.get("Raises", ""), "it raises WrongUse and does not say so"
    for attribute in ("group", "pool", "own", "weight", "forward", "factors", "count", "summed"):
        if hasattr(cls, attribute):
            assert getattr(cls, attribute).__doc__, f"{name}.{attribute} has no docstring"


def test_public_names_exist() -> None:
    assert [n for n in plures.__all__ if not hasattr(plures, n)] == []
    assert len(plures.__all__) <= 25


def test_no_page_promises_a_verb_that_is_not_there() -> None:
    have = {v.rstrip("_") for v in verbs()}
    for page in PAGES:
        for verb in re.findall(r"`plures ([a-z]+)", page.read_text(encoding="utf-8")):
            assert verb in have, f"{named(page)} says `plures {verb}`"
