"""Every packer: shapes, errors, odd variants, sizes of numbers, equal bytes for equal input, damaged codes."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch

from packed import FINE, KINDS, SITES, Variant, error, errors, fitted, fleet
from plures.core.errors import BadInput, WrongUse
from plures.core.folder import options_of
from plures.pack import packs
from plures.tensors.site import Site

every = pytest.mark.parametrize("name", list(FINE))
bounded = pytest.mark.parametrize("name", [n for n in FINE if n != "jd"])  # jd loses what its basis lacks
WITHIN = {"klt": 0.02, "rtn": 0.02, "svd": 0.03, "rvq": 0.45}  # of the finest options, on any variant


@pytest.fixture(scope="module")
def codecs() -> dict[str, Any]:
    """Of the finest options, fitted to a trained-like fleet."""
    return {name: fitted(name, fleet("trained"), **options[-1]) for name, options in FINE.items()}


def test_every_method_has_a_row() -> None:
    assert set(FINE) == set(packs)


@every
def test_its_card_and_options_are_whole(name: str) -> None:
    card = {c.name: c for c in packs.cards()}[name]
    assert card.kind == "plures.pack" and card.title and card.when and card.status == "trial"
    assert all(text for _, _, text in options_of(packs[name]).values())


@every
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(name: str, kind: str) -> None:
    variants = fleet(kind, 6)
    codec = fitted(name, variants, **FINE[name][1])
    for variant in variants[:2]:
        code = codec.encode(variant)
        assert code.dtype == torch.uint8 and code.dim() == 1
        decoded = codec.decode(code)
        assert set(decoded) == set(variant) or (name == "svd" and decoded)  # it may leave out a whole site
        for site in (s for s in SITES if s.name in decoded):
            B, A = decoded[site.name]
            assert B.shape[0] == site.out and A.shape[1] == site.into and B.shape[1] == A.shape[0] > 0
            assert B.dtype == A.dtype == torch.float32 and B.is_contiguous() and A.is_contiguous()
            assert B.isfinite().all() and A.isfinite().all()


@every
@pytest.mark.parametrize("kind", KINDS)
def test_finer_options_have_smaller_errors_and_longer_codes(name: str, kind: str) -> None:
    variants = fleet(kind)
    found = []
    for options in FINE[name]:
        packer = packs.make(name, **options)
        shared = packer.fit(lambda: iter(variants), SITES)
        codec = packer.codec(SITES, shared)
        size = sum(len(codec.encode(v)) for v in variants) + sum(x.nbytes for x in shared.values())
        found.append((sum(errors(codec, variants)), size))
    for (coarse, size), (finer, larger) in pairwise(found):
        assert finer < (coarse if coarse < 0.1 else 0.9 * coarse)  # jd is exact on a shared fleet before its finest
        assert larger > size


@bounded
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_within_what_the_options_say(name: str, kind: str) -> None:
    variants = fleet(kind)
    assert max(errors(fitted(name, variants, **FINE[name][-1]), variants)) <= WITHIN[name]


@every
def test_a_fleet_of_one(name: str) -> None:
    variants = fleet("random", 1)
    codec = fitted(name, variants, **FINE[name][-1])
    assert errors(codec, variants)[0] < 0.05


@every
def test_missing_sites(name: str, codecs: dict[str, Any]) -> None:
    variant = {s.name: fleet("trained", 3)[2][s.name] for s in reversed(SITES[1:4])}
    decoded = codecs[name].decode(codecs[name].encode(variant))
    assert set(decoded) == set(variant)
    assert error(variant, decoded) < 0.45
    assert len(codecs[name].encode(variant)) < len(codecs[name].encode(fleet("trained", 3)[2]))


@every
def test_a_fleet_whose_variants_have_unlike_sites(name: str) -> None:
    variants = [{s.name: v[s.name] for s in SITES if (i + len(s.name)) % 3} for i, v in enumerate(fleet("random", 6))]
    codec = fitted(name, variants, **FINE[name][-1])
    for variant in variants:
        assert error(variant, codec.decode(codec.encode(variant))) < (0.9 if name == "jd" else 0.45)


@bounded
def test_ranks_may_differ_and_be_above_the_fleets(name: str, codecs: dict[str, Any]) -> None:
    ranks = [1, 24, 9, 40, 2, 70]  # 24 and 70 are above a side of their sites, 40 above one
    parts = [fleet("random", 1, r)[0] for r in ranks]
    variant = {s.name: part[s.name] for s, part in zip(SITES, parts, strict=True)}
    assert errors(codecs[name], [variant])[0] <= WITHIN[name]


@every
def test_a_fleet_whose_variants_have_unlike_ranks(name: str) -> None:
    variants = [fleet("random", 1, r, seed=r)[0] for r in (3, 1, 5, 2)]
    variants[0] |= {SITES[0].name: fleet("random", 1, 7)[0][SITES[0].name]}
    codec = fitted(name, variants, **FINE[name][-1])
    assert max(errors(codec, variants)) < 0.45


@bounded
def test_a_high_rank(name: str) -> None:
    wide = [Site("m.layers.0.q", 320, 300)]
    variant = fleet("random", 1, 290, wide)[0]
    options = FINE[name][-1] | ({"shards": 64} if name == "rvq" else {})
    assert errors(fitted(name, fleet("random", 2, 4, wide), wide, **options), [variant])[0] < 0.45


def test_jd_takes_any_rank(codecs: dict[str, Any]) -> None:
    variant = {s.name: fleet("random", 1, 40)[0][s.name] for s in SITES}
    decoded = codecs["jd"].decode(codecs["jd"].encode(variant))
    assert {n: tuple(B.shape) for n, (B, _) in decoded.items()} == {s.name: (s.out, min(24, s.out)) for s in SITES}
    assert error(variant, decoded) < 1


@every
def test_zero_variants(name: str, codecs: dict[str, Any]) -> None:
    variant = fleet("trained", 1)[0]
    nothing = {n: (torch.zeros_like(B), A) for n, (B, A) in variant.items()}
    for zero in ({}, nothing, {n: (B, torch.zeros_like(A)) for n, (B, A) in variant.items()}):
        code = codecs[name].encode(zero)
        decoded = codecs[name].decode(code)
        assert len(code) <= 40
        assert all(not (B @ A).any() for B, A in decoded.values())
    half = {**nothing, **{n: variant[n] for n in list(variant)[:2]}}
    assert error(half, codecs[name].decode(codecs[name].encode(half))) < 0.45
    with_zero = [nothing, *fleet("trained", 4)]
    assert max(errors(fitted(name, with_zero, **FINE[name][-1]), with_zero[1:])) < 0.45


@every
def test_a_fleet_of_zeros(name: str) -> None:
    zeros = [{n: (torch.zeros_like(B), A) for n, (B, A) in v.items()} for v in fleet("random", 2)]
    if name in ("rtn", "svd"):
        assert fitted(name, zeros).decode(fitted(name, zeros).encode(zeros[0])) == {}
        return
    with pytest.raises(BadInput, match="zero"):
        fitted(name, zeros)


@every
@pytest.mark.parametrize("sizes", [(1e4, 1e4), (1e-6, 1e-6), (1e4, 1e-6), (1e-6, 1.0)])
def test_sizes_of_numbers_do_not_matter(name: str, sizes: tuple[float, float], codecs: dict[str, Any]) -> None:
    variants = fleet("trained", 3)
    scaled = [{n: (B * sizes[0], A * sizes[1]) for n, (B, A) in v.items()} for v in variants]
    for codec in (codecs[name], fitted(name, scaled, **FINE[name][-1])):
        for before, now in zip(variants, scaled, strict=True):
            decoded = codec.decode(codec.encode(now))
            assert all(B.isfinite().all() and A.isfinite().all() for B, A in decoded.values())
            assert error(now, decoded) <= 1.1 * WITHIN.get(name, errors(codecs[name], [before])[0] + 1e-3)


@every
def test_sites_of_very_different_sizes(name: str, codecs: dict[str, Any]) -> None:
    variant = {n: (B * 10.0 ** (2 * i - 6), A) for i, (n, (B, A)) in enumerate(fleet("trained", 1)[0].items())}
    assert errors(codecs[name], [variant])[0] < 0.45


@every
def test_equal_input_equal_bytes(name: str) -> None:
    variants = fleet("trained")
    packer = packs.make(name, **FINE[name][1])
    before = torch.random.get_rng_state()
    one, two = (packer.fit(lambda: iter(variants), SITES) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)
    alone, last = packer.codec(SITES, one), packer.codec(SITES, two)
    for variant in variants[:-1]:
        last.encode(variant)
    given = {n: variants[-1][n] for n in reversed(variants[-1])}
    assert torch.equal(alone.encode(variants[-1]), last.encode(given))
    decoded = alone.decode(last.encode(given)), last.decode(alone.encode(given))
    assert all(torch.equal(a, b) for n in decoded[0] for a, b in zip(decoded[0][n], decoded[1][n], strict=True))


@every
def test_nothing_given_is_changed(name: str) -> None:
    variants = fleet("trained", 4)
    copy = [{n: (B.clone(), A.clone()) for n, (B, A) in v.items()} for v in variants]
    codec = fitted(name, variants, **FINE[name][1])
    code = codec.encode(variants[0])
    kept = code.clone()
    codec.decode(code)
    assert torch.equal(code, kept)
    assert all(torch.equal(a, b) for v, c in zip(variants, copy, strict=True) for n in v
               for a, b in zip(v[n], c[n], strict=True))  # fmt: skip


@every
def test_bfloat16_factors(name: str, codecs: dict[str, Any]) -> None:
    variant = {n: (B.bfloat16(), A.bfloat16()) for n, (B, A) in fleet("trained", 1)[0].items()}
    exact = {n: (B.float(), A.float()) for n, (B, A) in variant.items()}
    assert torch.equal(codecs[name].encode(variant), codecs[name].encode(exact))


@every
def test_a_code_that_is_cut(name: str, codecs: dict[str, Any]) -> None:
    code = codecs[name].encode(fleet("trained", 1)[0])
    for end in {0, 1, 2, 3, 5, 9, len(code) // 3, len(code) // 2, len(code) - 4, len(code) - 1}:
        with pytest.raises(BadInput, match="damaged"):
            codecs[name].decode(code[:end].clone())
    for more in (1, 4, 8):
        with pytest.raises(BadInput, match="damaged"):
            codecs[name].decode(torch.cat([code, torch.full((more,), 7, dtype=torch.uint8)]))


@every
def test_a_code_of_flipped_bits_is_told_or_is_some_variant(name: str, codecs: dict[str, Any]) -> None:
    code = codecs[name].encode(fleet("trained", 1)[0])
    told = 0
    for at in [*range(8), len(code) // 2, len(code) - 1]:
        for bit in (0, 3, 7):
            flipped = code.clone()
            flipped[at] ^= 1 << bit
            try:
                decoded = codecs[name].decode(flipped)
            except BadInput:
                told += 1
                continue
            for B, A in decoded.values():
                assert B.shape[1] == A.shape[0] <= 1024 and B.isfinite().all() and A.isfinite().all()
    assert told >= 3  # at least what is flipped of its lengths


@every
def test_unknown_sites_and_other_shapes(name: str, codecs: dict[str, Any]) -> None:
    variant = fleet("trained", 1)[0]
    B, A = variant[SITES[0].name]
    odd: list[Variant] = [
        {**variant, "m.layers.7.q": (B, A)}, {**variant, SITES[0].name: (B[:-1], A)},
        {**variant, SITES[0].name: (B, A[:, 1:])}, {SITES[1].name: (B, A)},
    ]  # fmt: skip
    for wrong in odd:
        with pytest.raises(BadInput, match=r"the pack has no site 'm\.layers"):
            codecs[name].encode(wrong)


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(name: str, bad: float, codecs: dict[str, Any]) -> None:
    variant = {n: (B.clone(), A) for n, (B, A) in fleet("trained", 1)[0].items()}
    variant[SITES[3].name][0][0, 0] = bad
    with pytest.raises(BadInput, match="finite"):
        codecs[name].encode(variant)


@pytest.mark.parametrize("name", ["klt", "jd", "rvq"])
def test_what_is_shared_must_be_of_the_sites(name: str) -> None:
    packer = packs.make(name, **FINE[name][0])
    shared = packer.fit(lambda: iter(fleet("shared")), SITES)
    for sites in (SITES[:2], [Site(s.name, s.out + 1, s.into) for s in SITES]):
        with pytest.raises(BadInput, match="what the fleet shares is not of"):
            packer.codec(sites, shared)
    with pytest.raises(BadInput, match="what the fleet shares is not of"):
        packer.codec(SITES, {})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("rtn", {"bits": 1}, "from 2 to 8, got 1"), ("rtn", {"bits": 9}, "from 2 to 8"),
        ("rtn", {"group": -1}, "at least 0"), ("rtn", {"form": "odd"}, "'one' | 'given'"),
        ("svd", {"rank": -1}, "at least 0"), ("svd", {"error": 1.0}, "below 1"), ("svd", {"bits": 16}, "from 2 to 8"),
        ("jd", {"k": 0}, "from 1 to"), ("jd", {"bits": 9}, "or 16"), ("jd", {"iterations": 0}, "at least 1"),
        ("rvq", {"shards": 0}, "shards must be at least 1"), ("rvq", {"stages": 0}, "stages must be at least 1"),
        ("rvq", {"codewords": 1}, "from 2 to 65536"), ("klt", {"error": 0.001}, "from 0.005"),
        ("klt", {"error": 1.0}, "below 1"), ("klt", {"expect": -1}, "at least 0"), ("klt", {"dead": 0.5}, "below 0.5"),
        ("klt", {"even": 1.5}, "from 0 to 1"),
    ],
)  # fmt: skip
def test_wrong_options(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongUse) as told:
        packs.make(name, **options)
    assert said in str(told.value)


@every
def test_it_says_its_paper_and_what_it_can_do(name: str) -> None:
    kind = packs[name]
    said = inspect.getdoc(kind) or ""
    assert "\nPaper: " in said and "\nDeparts from the paper: " in said and "\nSource:" not in said
    made = packs.make(name)
    assert kind.free == (not made.fit(lambda: iter(fleet("trained")), SITES))  # type: ignore[attr-defined]
    finer = made.finer(0.5)
    assert finer is None or finer.error == pytest.approx(made.error / 2)
    assert made.bounds <= (finer is not None)  # an error that is bounded may be asked for


def test_errors_are_as_fine_as_may_be_asked_for() -> None:
    assert packs.make("klt", error=0.006).finer(0.25).error == 0.005
    assert packs.make("svd", rank=4).finer(0.5) is None
