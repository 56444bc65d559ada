"""What decodes packed variants, asked for by many threads; and what it gives is plain LoRA like any other."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from fleet_cases import BASE, SITES

from plures.adapt import adapts
from plures.core.errors import BadInput
from plures.pack import packs
from plures.store import Store, load, unpack
from plures.store.blobs import Blobs
from plures.store.unpack import GROUP, METHOD, MOST_CODECS, Codecs, as_plain
from plures.tensors import safe
from plures.tensors.variant import Variant, plain_lora


def packed(seed: int) -> tuple[Variant, Variant]:
    """A LoRA of rank 2, and the same packed with what only it has."""
    rng = torch.Generator().manual_seed(seed)
    own = {s.name: {"A": torch.randn(2, s.into, generator=rng), "B": torch.randn(s.out, 2, generator=rng)}
           for s in SITES}  # fmt: skip
    factors = {n: (t["B"], t["A"]) for n, t in own.items()}
    method: Any = packs.make("klt", error=0.05)
    shared = method.fit(lambda: [factors], SITES)
    whole = torch.frombuffer(bytearray(safe.to_bytes(shared)), dtype=torch.uint8)
    pool = {"code": method.codec(SITES, shared).encode(factors), "shared": whole}
    options = {"packer": "klt", "options": asdict(method)}
    made = Variant(METHOD, options, BASE, SITES, {s.name: GROUP for s in SITES}, {}, {GROUP: pool})
    return plain_lora(BASE, SITES, own, 2), made


@pytest.fixture
def fleet(tmp_path: Path) -> Store:
    with Store.create(tmp_path / "f", BASE) as store:
        for i in range(MOST_CODECS + 1):
            store.publish(packed(i)[1], f"v{i}")
    return Store.open(tmp_path / "f")


def test_a_codec_stays_its_readers_when_others_take_its_place(fleet: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet as store:
        want = {f"v{i}": store.load(f"v{i}").identity() for i in range(MOST_CODECS + 1)}
        store.load("v1")  # the codec of v1 is in memory
        real, inside = load._read_all, list[str]()

        def others_come(blobs: Blobs, where: Any, said: str, check: bool) -> Any:
            got = real(blobs, where, said, check)
            if not inside:
                inside.append(said)
                for i in (0, 2, 3, 4):  # another thread's, between the question and its answer
                    assert store.load(f"v{i}").identity() == want[f"v{i}"]
            return got

        monkeypatch.setattr(load, "_read_all", others_come)
        assert store.load("v1").identity() == want["v1"]
        assert inside == ["v1@1"]


def test_at_most_a_few_codecs_are_kept() -> None:
    codecs, made = Codecs(), [packed(i)[1] for i in range(MOST_CODECS + 2)]
    for i, v in enumerate(made):
        assert codecs.find(v.manifest(), str(i)) is None
        codec = codecs.make(v.manifest(), str(i), v.pool[GROUP]["shared"])
        assert codecs.find(v.manifest(), str(i)) is codec
    assert [i for i, v in enumerate(made) if codecs.find(v.manifest(), str(i))] == [2, 3, 4, 5]


def test_variants_of_one_pack_have_one_codec_at_whatever_error_they_are() -> None:
    codecs, (was, whole) = Codecs(), packed(0)
    shared, factors = whole.pool[GROUP]["shared"], {n: (t["B"], t["A"]) for n, t in was.own.items()}
    first = codecs.make(whole.manifest(), "x", shared)
    for error in (0.3, 0.1, 0.02):
        method: Any = packs.make("klt", error=error)
        code = method.codec(SITES, safe.from_bytes(shared.numpy().tobytes())).encode(factors)
        other = Variant(METHOD, {"packer": "klt", "options": asdict(method)}, BASE, SITES, whole.group_of, {},
                        {GROUP: {"code": code, "shared": shared}})  # fmt: skip
        assert codecs.find(other.manifest(), "x") is first
        by_its_own = unpack.codec_of(other.manifest(), shared)
        assert as_plain(other, first).identity() == as_plain(other, by_its_own).identity()
    wider: Any = packs.make("klt", error=0.05, even=0.0)
    told = whole.manifest() | {"options": {"packer": "klt", "options": asdict(wider)}}
    assert codecs.find(told, "x") is None


def test_a_packed_variant_without_what_it_shares_is_one_line(tmp_path: Path) -> None:
    _, whole = packed(0)
    torn = Variant(whole.method, whole.options, BASE, SITES, whole.group_of, {},
                   {GROUP: {"code": whole.pool[GROUP]["code"]}})  # fmt: skip
    with Store.create(tmp_path / "f", BASE) as store:
        store.publish(torn, "torn")
        with pytest.raises(BadInput, match="'torn@1' cannot be decoded: 'shared'"):
            store.load("torn")


def test_what_comes_back_is_a_plain_lora_like_any_other() -> None:
    was, whole = packed(0)
    back = as_plain(whole, unpack.codec_of(whole.manifest(), whole.pool[GROUP]["shared"]))
    assert back.options == was.options == asdict(adapts.make("lora", r=2, alpha=2.0))
    assert back.group_of == was.group_of and back.manifest() | {"provenance": 0} == was.manifest() | {"provenance": 0}
    again = plain_lora(BASE, back.sites, back.own, 2)
    assert again.identity() == back.identity() != was.identity()
