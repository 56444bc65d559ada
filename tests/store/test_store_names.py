"""What may be a name, an alias, a reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fleet_cases import BASE, tree, variant

from plures.core.errors import WrongUse
from plures.store import Store
from plures.store.names import Ref, check_name, parse

BAD: list[Any] = [
    "..", ".", "a/b", "a\\b", "",
    ".x", "a b", " a", "a ", "a\n", "a\tb", "a\x00b", "a@b", "\uff41", "\u0430dmin", "é", "a\u200bb",
    "a\u202eb", "x" * 129, "x" * 200, "a..b", "a.", "-a", "_a", "a:b", "C:", "~", "a*", "a'b", 'a"b', "a;b", "\u0663",
    "\ud800", "a%2fb", None, 3, b"a", ["a"],
]  # fmt: skip
GOOD = ["a", "7", "support", "Support-2_b.v1", "x" * 128, "a_", "a-", "0.5b"]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A fleet of one version, which no test of this file may change."""
    with Store.create(tmp_path_factory.mktemp("names") / "fleet", BASE) as store:
        store.publish(variant(1), "n")
        yield store


@pytest.mark.parametrize("bad", BAD, ids=ascii)
def test_bad_names_are_refused_everywhere(held: Store, bad: Any) -> None:
    fleet = held
    before = tree(fleet.path)
    for call in (
        lambda: fleet.publish(variant(2), bad),
        lambda: fleet.publish(variant(2), "n", aliases=[bad]),
        lambda: fleet.alias("n", bad),
        lambda: fleet.unalias(bad, "prod"),
        lambda: fleet.load(bad if bad != "a@b" else "a@b@c"),
        lambda: fleet.resolve(f"n@{bad}" if isinstance(bad, str) else bad),
        lambda: fleet.remove(bad, all=True),
        lambda: fleet.publish(variant(2), "n", parents=[bad]),
    ):
        with pytest.raises(WrongUse) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        assert message.isascii()
        assert message.isprintable()
        assert len(message) < 300
    assert tree(fleet.path) == before
    assert [v.ref for v in fleet.versions(all=True)] == ["n@1"]
    assert fleet.resolve("n").aliases == ()


def test_the_message_says_what_is_allowed() -> None:
    with pytest.raises(WrongUse, match=r"'a/b' is not allowed; use ASCII letters, digits"):
        check_name("a/b")
    with pytest.raises(WrongUse, match=r"uff41"):
        check_name("\uff41")


@pytest.mark.parametrize("good", GOOD)
def test_good_names(fleet: Store, good: str) -> None:
    assert fleet.publish(variant(1), good).ref == f"{good}@1"
    assert fleet.names() == [good]


def test_references() -> None:
    assert parse("support") == Ref("support")
    assert parse("support@3") == Ref("support", number=3)
    assert parse("support@prod") == Ref("support", alias="prod")
    assert parse("7@7") == Ref("7", number=7)
    for bad in ("support@", "@3", "a@b@c", "a@" + "9" * 5000, "a@-1", "a@ 1", "a@1.", "a@\u0663"):
        with pytest.raises(WrongUse):
            parse(bad)


def test_an_alias_is_not_a_number(fleet: Store) -> None:
    fleet.publish(variant(1), "n")
    with pytest.raises(WrongUse, match="all digits"):
        fleet.alias("n", "3")
    with pytest.raises(WrongUse, match="never published"):
        fleet.resolve("n@0")
