"""Where variants are in memory, and how those go that nobody can ask for any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from asking import ask, finish

from plures.engine import packed, tiers
from plures.engine.ask import Unavailable
from plures.engine.bank import pack
from plures.engine.decoder import Decoder
from plures.engine.model import Base
from plures.engine.serving import Engine
from plures.engine.tiers import Tiers
from plures.tensors.variant import Variant


@pytest.fixture
def of(base: Base, variants: dict[str, Variant], tmp_path: Path) -> Iterator[Tiers]:
    decoder = Decoder(base.model)
    made = Tiers(decoder.bank(4, 1 << 22), decoder.places(), variants.__getitem__, folder=tmp_path / "packed")
    yield made
    made.close()


def written(of: Tiers) -> list[str]:
    of._packer.submit(int).result()
    assert of.folder is not None
    return sorted(p.stem for p in of.folder.iterdir())


def test_a_file_that_two_find_at_once_counts_once(
    of: Tiers, variants: dict[str, Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, find, found = next(iter(variants)), packed.find, list[int]()
    assert of.folder is not None
    packed.keep(pack(variants[identity], of.places, identity), of.folder)

    def while_another_looks(folder: Path, asked: str) -> packed.Packed | None:
        got = find(folder, asked)
        assert got is not None
        found.append(got.n_bytes)
        if len(found) == 1:
            of.ask(asked)
        return got

    monkeypatch.setattr(packed, "find", while_another_looks)
    of.ask(identity)
    assert len(found) == 2
    assert (of.state().host, of.state().host_bytes) == (1, found[0])
    of.forget(identity)
    assert (of.state().host, of.state().host_bytes) == (0, 0)


def test_what_is_removed_and_published_again_gets_its_file_again(of: Tiers, variants: dict[str, Variant]) -> None:
    one, two, *_ = variants
    for wanted in ([one, two], [two], [one, two], [], [one]):
        of.prepare(wanted)
        assert written(of) == sorted(wanted)


def test_heat_is_known_of_those_asked_last(
    of: Tiers, variants: dict[str, Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "_HEATED", 3)
    of.fetch = lambda _: next(iter(variants.values()))
    for name in ("a", "b", "c", "a", "d", "e"):
        of.ask(name)
    assert list(of._heat) == ["a", "d", "e"]
    assert of._warmth("a") > of._warmth("d") > 0 == of._warmth("b")


def test_removed_variants_leave_memory_when_no_row_wants_them(
    engine: Callable[..., Engine], variants: dict[str, Variant]
) -> None:
    fleet = dict(variants)

    def fetch(identity: str) -> Variant:
        if identity not in fleet:
            raise Unavailable("the fleet has it no longer")
        return fleet[identity]

    served, (kept, removed, last, *_) = engine(fetch, rows=1), variants
    want = [ask(served, "The parcel", i, max_tokens=20, ignore_end=True) for i in (kept, removed)]
    finish(served, *want)
    served.tiers.prepare(fleet)
    running, waiting = (ask(served, "The parcel", removed, max_tokens=20, ignore_end=True) for _ in range(2))
    for _ in range(4):
        served.step()
    assert len(served.standing.running) == len(served.standing.waiting) == 1
    del fleet[removed]
    served.tiers.prepare(fleet)
    served.step()
    assert removed in served.bank.slots
    finish(served, running, waiting)
    assert running.ids == waiting.ids == want[1].ids
    served.step()
    assert list(served.bank.slots) == [kept] and list(served.tiers._packed) == [kept]
    assert not served.tiers.gone
    gone = ask(served, "The parcel", removed)
    finish(served, gone)
    assert gone.last.error == "the fleet has it no longer"
    fleet[removed] = variants[removed]
    served.tiers.prepare(fleet)
    again = ask(served, "The parcel", removed, max_tokens=20, ignore_end=True)
    finish(served, again)
    assert again.ids == want[1].ids
    served.start()
    served.tiers.prepare([last])  # an engine without work does it too
    until = time.monotonic() + 20
    while (served.tiers.gone or served.bank.slots or served.tiers._packed) and time.monotonic() < until:
        time.sleep(0.01)
    assert not served.bank.slots and not served.tiers._packed
