"""The registry: cards without importing, messages with the nearest name, options, plug-ins."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from plures.adapt import adapts
from plures.core.errors import RecipeErrors, WrongUse
from plures.core.folder import Folder, first_line, method, option_help, options_of


@method(paper="none", title="A plug-in", when="never")
@dataclass(frozen=True)
class Plug:
    """Does nothing.

    Options:
        size: how large; it may say more
            over a second line.
        mode: which of two.

    Raises: nothing.
    """

    size: int = 3
    share: float = 0.5
    mode: Literal["a", "b"] = "a"
    flag: bool = False
    word: str = "x"


@dataclass(frozen=True)
class Entry:
    """Stands for an entry point."""

    name: str
    target: Any
    value: str = "elsewhere.plug:Plug"

    def load(self) -> Any:
        return self.target


def plug_in(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries if group == "plures.adapt" else ())


def test_cards_import_no_method() -> None:
    code = (
        "import sys; from plures.adapt import adapts; cards = adapts.cards(); "
        "assert {'lora', 'mos'} <= {c.name for c in cards}; assert 'mos' in adapts and len(adapts) == len(cards); "
        "loaded = [m for m in sys.modules if m.startswith('plures.adapt.')]; assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_module_is_a_method_and_its_card_equals_the_imported_one() -> None:
    files = {p.stem for p in Path(sys.modules["plures.adapt"].__file__ or "").parent.glob("[!_]*.py")}
    assert files <= set(adapts)
    for card in adapts.cards():
        assert adapts[card.name].card == card  # type: ignore[attr-defined]
        assert card.summary.endswith(".")
        assert card.kind == "plures.adapt"


def test_getting_one_method_imports_that_file_alone() -> None:
    code = (
        "import sys; from plures.adapt import adapts; assert adapts['lora'].__name__ == 'Lora'; "
        "assert 'plures.adapt.lora' in sys.modules; assert 'plures.adapt.mos' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_unknown_name_gets_the_nearest_and_all() -> None:
    with pytest.raises(WrongUse, match=r"named 'lroa'\. Did you mean 'lora'\? There are: .*mos") as caught:
        adapts["lroa"]
    assert caught.value.exit_code == 2
    with pytest.raises(WrongUse, match="no adapt method named '_lay'"):
        adapts["_lay"]
    assert "_lay" not in adapts
    assert "" not in adapts


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(RecipeErrors) as caught:
        adapts.make("lora", rr=3, aplha=2.0, rslora="no", r=1.5)
    assert len(caught.value.problems) == 4
    text = str(caught.value)
    assert "lora.rr is not an option of lora." in text
    assert "lora.aplha is not an option of lora. Did you mean 'alpha'?" in text
    assert "lora.rslora must be bool, got 'no'" in text
    assert "lora.r must be int, got 1.5" in text
    assert caught.value.exit_code == 2


def test_make_takes_whole_floats_and_ints_without_loss() -> None:
    got = adapts.make("lora", r=4.0, alpha=8)
    assert (got.r, type(got.r), got.alpha, type(got.alpha)) == (4, int, 8.0, float)
    with pytest.raises(RecipeErrors, match="must be int, got True"):
        adapts.make("lora", r=True)
    with pytest.raises(WrongUse, match=r"lora\.r must be at least 1"):
        adapts.make("lora", r=0)


def test_make_checks_literals_and_words(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, Entry("plug", Plug))
    assert adapts.make("plug", mode="b", word="y", share=1).mode == "b"
    for wrong in ({"mode": "c"}, {"word": 3}, {"flag": 1}, {"share": "half"}):
        with pytest.raises(RecipeErrors):
            adapts.make("plug", **wrong)


def test_a_plug_in_joins_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(adapts)
    plug_in(monkeypatch, Entry("plug", Plug))
    assert adapts["plug"] is Plug
    assert "plug" in adapts
    assert len(adapts) == before + 1
    assert "A plug-in" in {c.title for c in adapts.cards()}
    assert "plug" not in Folder("plures.core", "core")  # another group


def test_a_plug_ins_card_has_the_name_it_is_asked_for_by(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, Entry("plug", Plug))
    assert "plug" in {c.name for c in adapts.cards()}


def test_a_plug_in_is_seeded_by_the_name_it_is_asked_for_by(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, Entry("plug", Plug))
    assert adapts["plug"].card.name == "plug"  # type: ignore[attr-defined]
    assert type(adapts.make("plug")).card.kind == "plures.adapt"


def test_a_folder_is_a_mapping_that_may_be_asked_for_what_is_not_there() -> None:
    assert adapts.get("nope") is None and adapts.get("nope", 3) == 3
    assert adapts.get("lora") is adapts["lora"]


@pytest.mark.parametrize("options", [{"r": "8"}, {"alpha": "10"}, {"alpha": float("nan")}])
def test_make_takes_no_text_and_no_nan_for_a_number(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeErrors):
        adapts.make("lora", **options)


@pytest.mark.parametrize("target", [object(), int, lambda: None])
def test_a_plug_in_that_is_no_method_is_refused(monkeypatch: pytest.MonkeyPatch, target: Any) -> None:
    plug_in(monkeypatch, Entry("plug", target))
    with pytest.raises(WrongUse, match=r"plug-in 'elsewhere\.plug:Plug' of plures\.adapt is not a class marked"):
        adapts["plug"]


def test_options_of_gives_type_default_and_help() -> None:
    assert options_of(Plug) == {
        "size": ("int", 3, "how large; it may say more over a second line."),
        "share": ("float", 0.5, ""),
        "mode": ("'a' | 'b'", "a", "which of two."),
        "flag": ("bool", False, ""),
        "word": ("str", "x", ""),
    }


@pytest.mark.parametrize("name", sorted(adapts))
def test_every_option_of_every_method_has_help(name: str) -> None:
    got = options_of(adapts[name])
    assert list(got) == [f.name for f in fields(adapts[name])]
    assert all(text for _, _, text in got.values())


def test_option_help_and_first_line_of_nothing() -> None:
    assert option_help(type("None_", (), {"__doc__": None})) == {}
    assert first_line(None) == ""
    assert first_line("One\n  two.\n\n  Three.") == "One two."


def test_only_a_frozen_dataclass_can_be_a_method() -> None:
    with pytest.raises(AssertionError, match="must be a frozen dataclass"):
        method(paper="none", title="x")(dataclass(type("Loose", (), {})))
    with pytest.raises(AssertionError, match="must be a frozen dataclass"):
        method(paper="none", title="x")(type("Plain", (), {}))
