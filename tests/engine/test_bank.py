"""The shard bank, packed variants and their files."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import ask, finish, varied
from torch import Tensor

from plures.adapt import adapts
from plures.adapt.mos import Mos
from plures.bridges.on_model import as_lora
from plures.engine import packed
from plures.engine.bank import Bank, Room, pack
from plures.engine.decoder import Decoder
from plures.engine.limits import Settings
from plures.engine.model import Base
from plures.engine.serving import Engine
from plures.tensors.variant import Variant


def test_packed_variants_share_what_is_equal_and_take_a_seventh_of_lora(
    base: Base, variants: dict[str, Variant]
) -> None:
    decoder = Decoder(base.model)
    places = decoder.places()
    mos = varied(base, "mos", 0, r=4, e=2, l=2, p=0)
    twin = replace(mos, own={s: {"index": v["index"].flip(1)} for s, v in mos.own.items()})  # other picks, same pools
    bank = decoder.bank(4, 1 << 22)
    one = pack(mos, places)
    assert bank.put(one) == 0
    used = bank.used_bytes
    assert bank.put(pack(twin, places)) == 1
    assert bank.used_bytes - used <= one.index.nbytes  # the pools are there once
    bank.drop(mos.identity())
    bank.drop(twin.identity())
    assert bank.used_bytes == 0
    exact = pack(as_lora(mos), places)
    assert exact.n_bytes > one.n_bytes


class Outside(Mos):
    """As another package's method may be: each site a group, a scale of another name, a low-rank part beside."""

    def shards(self, own: dict[str, Tensor], pool: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        table, scale = super().shards(own, pool)
        return table, scale * own["worth"]

    def rest(self, own: dict[str, Tensor], pool: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return own["b"], own["a"]


def test_every_site_has_its_own_numbers_whatever_its_leaves_are_called(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    mos = varied(base, "mos", 3, r=4, e=2, l=2, p=0)
    own = {
        s.name: {**mos.own[s.name], "worth": torch.tensor(1.0 + i), "a": torch.full((1, s.into), 2.0 + i),
                 "b": torch.ones(s.out, 1)}
        for i, s in enumerate(mos.sites)
    }  # fmt: skip
    pool = {s.name: mos.pool[mos.group_of[s.name]] for s in mos.sites}
    made = replace(mos, method="outside", own=own, pool=pool, group_of={s.name: s.name for s in mos.sites})
    monkeypatch.setattr(adapts, "make", lambda name, **options: Outside(**options))
    packed_one = pack(made, Decoder(base.model).places(), "0" * 64)
    assert len(packed_one.sites) == 2 * len(mos.sites)
    for site, first, second in zip(mos.sites, packed_one.sites[::2], packed_one.sites[1::2], strict=True):
        want = Outside(r=4, e=2, l=2, p=0).shards(own[site.name], pool[site.name])[1]
        assert np.array_equal(packed_one.runs[first.scale], want.numpy())
        assert np.array_equal(packed_one.runs[first.a], pool[site.name]["A"].numpy().ravel())
        assert np.array_equal(packed_one.runs[second.a], own[site.name]["a"].numpy().ravel())


def test_equal_scales_are_kept_once(base: Base) -> None:
    made = pack(varied(base, "mos", 3, r=4, e=2, l=2, p=0), Decoder(base.model).places())
    assert len({s.scale for s in made.sites}) == 1 < len(made.sites)


def test_what_sites_share_goes_to_a_device_once(base: Base) -> None:
    made = pack(varied(base, "dkvb", 3), Decoder(base.model).places())
    sent = made.whole_on(torch.device("meta"))
    rooms = [room for site in sent.whole for room in (site.own, site.pool)]
    there = {id(t): t for room in rooms for t in room.values()}
    assert all(t.is_meta for t in there.values())
    assert sum(t.nbytes for t in there.values()) == made.whole_bytes
    assert len(there) < sum(map(len, rooms))  # projections and keys are shared


def test_an_arena_of_another_kind_is_counted_by_its_own_numbers(base: Base) -> None:
    decoder = Decoder(base.model)
    lora, dense = (pack(varied(base, m, 3, **o), decoder.places()) for m, o in (("lora", {"r": 1}), ("dkvb", {})))
    cells = sum(run.size for run in lora.runs.values())
    room = cells + dense.whole_bytes // 2
    bank = Bank(3, [3, 1, 2, 1], 4, 0, np.empty(room, np.float16))
    assert bank.put(lora) == 0
    assert bank.used_bytes == 2 * cells + lora.index.nbytes
    assert bank.put(dense) is None  # its indices take the room that is missing
    bank.drop(lora.identity)
    assert bank.put(dense) == 0


def test_an_arena_that_is_full_says_so_and_loses_nothing(base: Base, variants: dict[str, Variant]) -> None:
    decoder = Decoder(base.model)
    first, second, *_ = [pack(v, decoder.places()) for v in variants.values()]
    bank = decoder.bank(8, first.n_bytes + 64)
    assert bank.put(first) is not None
    used = bank.used_bytes
    assert bank.put(second) is None
    assert bank.used_bytes == used
    bank.drop(first.identity)
    assert bank.put(second) is not None or second.n_bytes > first.n_bytes


def test_packed_files_are_mapped_proven_and_made_anew(
    base: Base, variants: dict[str, Variant], tmp_path: Path, engine: Callable[..., Engine]
) -> None:
    fetched: list[str] = []
    variants = {i: v for i, v in variants.items() if v.method != "full"}  # what has no factors is not packed

    def fetch(identity: str) -> Variant:
        fetched.append(identity)
        return variants[identity]

    def answers() -> list[tuple[int, ...]]:
        served = Engine(base, fetch, Settings(kv_tokens=2048, bank_bytes=1 << 24), folder=tmp_path / "packed")
        made = [ask(served, "The parcel", i) for i in variants]
        finish(served, *made)
        served.tiers._packer.submit(int).result()  # files are written behind the answers
        served.stop(0)
        return [a.ids for a in made]

    first = answers()
    assert len(fetched) == len(variants)
    assert answers() == first
    assert len(fetched) == len(variants)  # the second engine read the files
    one, two, three, *_ = (packed.path_of(tmp_path / "packed", i) for i in variants)
    data = bytearray(one.read_bytes())
    data[-5] ^= 1
    one.write_bytes(data)
    two.write_bytes(two.read_bytes()[:-9])
    three.write_bytes(packed.path_of(tmp_path / "packed", list(variants)[3]).read_bytes())  # another variant's file
    assert answers() == first
    assert sorted(fetched[len(variants) :]) == sorted(list(variants)[:3])
    made = Engine(base, fetch, Settings(kv_tokens=2048, bank_bytes=1 << 24), folder=tmp_path / "packed")
    one.unlink()
    made.tiers.prepare(list(variants)[:4])
    made.tiers._packer.submit(int).result()
    made.stop(0)
    assert sorted(p.stem for p in (tmp_path / "packed").iterdir()) == sorted(list(variants)[:4])
    again = pack(next(iter(variants.values())), Decoder(base.model).places())
    assert not packed.keep(again, one / "below a file")


def test_room_is_given_back_whole() -> None:
    room, rng, held = Room(1000), random.Random(0), []
    for _ in range(500):
        if held and rng.random() < 0.5:
            room.give(*held.pop(rng.randrange(len(held))))
        else:
            n = rng.randrange(1, 200)
            at = room.take(n)
            if at is not None:
                assert all(at + n <= a or a + m <= at for a, m in held)
                held.append((at, n))
        assert room.used == sum(n for _, n in held)
    for a in held:
        room.give(*a)
    assert room.free == [(0, 1000)]
