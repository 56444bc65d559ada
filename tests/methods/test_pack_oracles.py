"""Packers against what is written here in numpy float64, and klt against the entropy of its own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from packed import KINDS, PLANTED, SITES, Variant, dense, error, errors, fitted, fleet
from plures.pack import packs
from plures.pack.rvq import lloyd, nearest
from plures.tensors.gauge import gauged
from plures.tensors.rng import normal, rng
from plures.tensors.site import Site

Array = np.ndarray[Any, Any]
WIDE = [Site("m.layers.0.q", 256, 192), Site("m.layers.0.v", 128, 256)]
ONE = [Site("m.layers.0.q", 24, 20)]


def rounded(rows: Array, bits: int, group: int) -> Array:
    """Rows rounded group by group, each scale in fp16."""
    out, levels = np.zeros_like(rows), 2 ** (bits - 1) - 1
    for i, row in enumerate(rows):
        for start in range(0, len(row), group or len(row)):
            part = row[start : start + (group or len(row))]
            scale = float(np.float16(abs(part).max() / levels))
            for j, x in enumerate(part):
                out[i, start + j] = scale * max(-levels, min(levels, round(x / scale)))
    return out


# ---------------------------------------------------------------------- rtn


@pytest.mark.parametrize(("bits", "group"), [(2, 0), (3, 8), (4, 0), (5, 7), (8, 32), (4, 1000)])
def test_rtn_of_factors_as_given(bits: int, group: int) -> None:
    variant = fleet("random", 1)[0]
    codec = fitted("rtn", [], bits=bits, group=group, form="given")
    code = codec.encode(variant)
    size = 3
    for name, (B, A) in codec.decode(code).items():
        for got, given in ((B.T, variant[name][0].T), (A, variant[name][1])):
            rows = given.double().numpy()
            np.testing.assert_allclose(got.numpy(), rounded(rows, bits, group), rtol=1e-6, atol=1e-9)
            scales = rows.shape[0] * -(-rows.shape[1] // (group or rows.shape[1]))
            size += 1 + 2 * scales + -(-rows.size * bits // 8)
    assert len(code) == size


def test_rtn_in_the_one_form() -> None:
    variant = fleet("random", 1)[0]
    decoded = fitted("rtn", [], bits=4).decode(fitted("rtn", [], bits=4).encode(variant))
    for name, delta in dense(variant).items():
        U, s, V = np.linalg.svd(delta, full_matrices=False)
        B, A = rounded((U * np.sqrt(s)).T[:4], 4, 0).T, rounded((np.sqrt(s)[:, None] * V)[:4], 4, 0)
        np.testing.assert_allclose(dense(decoded)[name], B @ A, atol=2e-3 * abs(delta).max())


def test_rtn_of_other_factors_of_one_delta() -> None:
    variant = fleet("random", 1)[0]
    g = torch.Generator().manual_seed(5)
    G = torch.randn(4, 4, generator=g)
    other = {n: (B @ G, torch.linalg.inv(G) @ A) for n, (B, A) in variant.items()}
    one, given = ([errors(fitted("rtn", [], bits=6, form=f), [v])[0] for v in (variant, other)]
                  for f in ("one", "given"))  # fmt: skip
    assert abs(one[0] - one[1]) < 0.02 * one[0]
    assert given[1] > 1.5 * given[0]


# ---------------------------------------------------------------------- svd


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_svd_keeps_as_few_as_may_be(share: float) -> None:
    variant = fleet("trained", 1, 8)[0]
    codec = fitted("svd", [], error=share, bits=8)
    decoded = codec.decode(codec.encode(variant))
    values = np.sort(np.concatenate([np.linalg.svd(d, compute_uv=False)[:8] for d in dense(variant).values()]))[::-1]
    tail = np.array([np.sqrt((values[k:] ** 2).sum() / (values**2).sum()) for k in range(len(values) + 1)])
    fewest = int(np.argmax(tail <= share))
    assert sum(B.shape[1] for B, _ in decoded.values()) == fewest
    assert abs(error(variant, decoded) - tail[fewest]) < 0.01


def test_svd_of_a_rank() -> None:
    variant = fleet("trained", 1, 8)[0]
    codec = fitted("svd", [], rank=3, bits=8)
    decoded = codec.decode(codec.encode(variant))
    for name, delta in dense(variant).items():
        U, s, V = np.linalg.svd(delta)
        assert decoded[name][0].shape[1] == 3
        best = (U[:, :3] * s[:3]) @ V[:3]
        assert np.linalg.norm(dense(decoded)[name] - best) < 0.015 * np.linalg.norm(best)


# ---------------------------------------------------------------------- jd


def alternating(deltas: list[Array], k: int, seed: int, turns: int = 60) -> float:
    """The objective that a dense alternating SVD reaches from a random beginning."""
    V = np.linalg.qr(np.random.default_rng(seed).standard_normal((deltas[0].shape[1], k)))[0]
    for _ in range(turns):
        U = np.linalg.svd(np.concatenate([d @ V for d in deltas], 1))[0][:, :k]
        V = np.linalg.svd(np.concatenate([d.T @ U for d in deltas], 1))[0][:, :k]
    return float(sum(np.linalg.norm(d - U @ (U.T @ d @ V) @ V.T) ** 2 for d in deltas))


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_jd_is_no_worse_than_dense_alternating_svd(kind: str, even: bool) -> None:
    variants = fleet(kind, 10, 3, ONE)
    codec = fitted("jd", variants, ONE, k=5, iterations=60, even=even)
    deltas = [dense(v)[ONE[0].name] for v in variants]
    weights = [1 / np.linalg.norm(d) if even else 1.0 for d in deltas]
    ours = sum((w * np.linalg.norm(d - dense(codec.decode(codec.encode(v)))[ONE[0].name])) ** 2
               for w, d, v in zip(weights, deltas, variants, strict=True))  # fmt: skip
    theirs = min(alternating([w * d for w, d in zip(weights, deltas, strict=True)], 5, seed) for seed in range(3))
    assert ours <= 1.002 * theirs + 1e-5 * len(deltas)


@pytest.mark.parametrize("full", [True, False])
def test_jd_is_exact_in_its_subspace(full: bool) -> None:
    variants = fleet("shared", 10, 3)
    if not full:
        g = torch.Generator().manual_seed(3)
        columns = {s.name: (torch.randn(s.out, 3, generator=g), torch.randn(3, s.into, generator=g)) for s in SITES}
        variants = [{n: (B * torch.randn(3, generator=g), A) for n, (B, A) in columns.items()} for _ in range(10)]
    codec = fitted("jd", variants, k=PLANTED if full else 3, iterations=4 if full else 60, full=full)
    assert max(errors(codec, variants)) < 2e-3
    assert errors(codec, fleet("random", 1))[0] > 0.5


def test_jd_never_grows_by_iterations() -> None:
    variants = fleet("trained", 8, 4, ONE)
    for full in (True, False):
        lost = [sum(e**2 for e in errors(fitted("jd", variants, ONE, k=3, iterations=n, full=full), variants))
                for n in (1, 2, 4, 16)]  # fmt: skip
        assert all(after <= before + 1e-4 for before, after in zip(lost, lost[1:], strict=False))  # noqa: RUF007


def test_jd_diagonal_is_alternating_least_squares() -> None:
    variants, k = fleet("random", 6, 3, ONE), 4
    shared = packs.make("jd", k=k, iterations=3, full=False, even=False).fit(lambda: iter(variants), ONE)
    deltas = [dense(v)[ONE[0].name] for v in variants]
    U, V = (normal(rng(0, "jd", leaf, ONE[0].name), (w, k)).double().numpy() for leaf, w in (("U", 24), ("V", 20)))

    def diagonals() -> list[Array]:
        columns = np.stack([np.outer(U[:, j], V[:, j]).reshape(-1) for j in range(k)], 1)
        return [np.linalg.lstsq(columns, d.reshape(-1), rcond=None)[0] for d in deltas]

    for _ in range(3):
        s = diagonals()
        turned = np.concatenate([d.T for d in deltas])
        U = np.linalg.lstsq(np.concatenate([(V * x) for x in s]), turned, rcond=None)[0].T
        U /= np.linalg.norm(U, axis=0)
        s = diagonals()
        V = np.linalg.lstsq(np.concatenate([(U * x) for x in s]), np.concatenate(deltas), rcond=None)[0].T
        V /= np.linalg.norm(V, axis=0)
    np.testing.assert_allclose(shared["U"].reshape(k, 24).T.numpy(), U, atol=2e-3)
    np.testing.assert_allclose(shared["V"].reshape(k, 20).T.numpy(), V, atol=2e-3)


@pytest.mark.parametrize("full", [True, False])
def test_jd_fits_s_to_what_is_kept_of_u_and_v(full: bool) -> None:
    codec = fitted("jd", fleet("random", 6, 3, ONE), ONE, k=4, full=full)
    (new,) = fleet("random", 1, 3, ONE, seed=9)
    U, V = codec.U[0].double().numpy(), codec.V[0].double().numpy()
    pairs = [(i, j) for i in range(4) for j in range(4) if full or i == j]
    columns = np.stack([np.outer(U[:, i], V[:, j]).reshape(-1) for i, j in pairs], 1)
    best = np.linalg.lstsq(columns, dense(new)[ONE[0].name].reshape(-1), rcond=None)[0]
    np.testing.assert_allclose(codec.between(0, *new[ONE[0].name]).reshape(-1).numpy(), best, rtol=1e-8)


def test_jd_loses_less_at_more_bits() -> None:
    variants = fleet("shared", 10)
    lost = [sum(errors(fitted("jd", variants, k=PLANTED, bits=b), variants)) for b in (2, 4, 6, 8, 16)]
    assert all(finer < 0.7 * coarse for coarse, finer in zip(lost, lost[1:], strict=False))  # noqa: RUF007


# ---------------------------------------------------------------------- rvq


def test_rvq_takes_the_nearest_codeword_of_each_stage() -> None:
    variants = fleet("random", 6)
    codec = fitted("rvq", variants, shards=5, codewords=20, stages=3)
    decoded = codec.decode(codec.encode(variants[0]))
    for site in SITES:
        U, s, V = np.linalg.svd(dense(variants[0])[site.name], full_matrices=False)
        sign = np.sign(V[np.arange(len(V)), np.abs(V).argmax(1)])
        U, V = U * sign, V * sign[:, None]
        B, A = (x.double().numpy() for x in decoded[site.name])
        for side, (rows, got) in enumerate((((U * np.sqrt(s)).T[:4], B.T), (np.sqrt(s[:4, None]) * V[:4], A))):
            book = codec.books[site.kind, side, rows.shape[1]].double().numpy()
            for row, found in zip(rows, got, strict=True):
                padded = np.pad(row / np.sqrt((row**2).mean()), (0, -len(row) % 5)).reshape(5, -1)
                like = np.zeros_like(padded)
                for stage in book:
                    for i in range(5):
                        like[i] += stage[((padded[i] - like[i] - stage) ** 2).sum(1).argmin()]
                flat = like.reshape(-1)[: len(row)]
                np.testing.assert_allclose(found, flat * (flat @ row) / (flat @ flat), atol=2e-3)


def test_rvq_finds_shards_that_repeat() -> None:
    g = torch.Generator().manual_seed(2)
    words = torch.randn(2, 12, 8, generator=g)
    sites = [Site("m.layers.0.q", 32, 32)]

    def variant() -> Variant:
        rows = [words[side][torch.randint(12, (4,), generator=g)].reshape(1, 32) for side in (0, 1)]
        return {sites[0].name: (rows[0].T.contiguous(), rows[1])}

    codec = fitted("rvq", [variant() for _ in range(200)], sites, shards=4, codewords=512, stages=2)
    new = [variant() for _ in range(5)]
    assert max(errors(codec, new)) < 0.1
    assert len(codec.encode(new[0])) == 3 + 2 * (3 + 9)  # 8 numbers of 9 bits a side


def test_lloyd_finds_clusters_and_takes_few_rows() -> None:
    g = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(7, 5, generator=g)
    rows = centres[torch.arange(700) % 7] + 0.01 * torch.randn(700, 5, generator=g)
    found = lloyd(rows, 12, rng(0))
    assert nearest(centres, found)[1].max() < 0.01 and nearest(rows, found)[1].max() < 0.01
    few = lloyd(rows[:3], 6, rng(0))
    assert few.shape == (6, 5) and nearest(rows[:3], few)[1].max() < 1e-3


def test_nearest_is_the_nearest() -> None:
    g = torch.Generator().manual_seed(1)
    rows, centroids = torch.randn(9000, 4, generator=g), torch.randn(11, 4, generator=g)
    at, short = nearest(rows, centroids)
    far = torch.stack([((rows.double() - c.double()) ** 2).sum(1) for c in centroids], 1)
    assert torch.equal(at, far.argmin(1))
    torch.testing.assert_close(short.double(), far.amin(1), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- klt


@pytest.mark.parametrize("bound", [0.005, 0.03, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_klt_keeps_its_error(kind: str, bound: float) -> None:
    variants = fleet(kind)
    codec = fitted("klt", variants, error=bound)
    found = errors(codec, [*variants, *fleet(kind, 3, seed=7)])
    assert max(found) <= bound * 1.005
    assert min(found) > 0.5 * bound


@pytest.mark.parametrize("bound", [0.05, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_klt_codes_as_short_as_its_numbers_are_random(kind: str, bound: float) -> None:
    variants = fleet(kind, 24, 8, WIDE)
    codec = fitted("klt", variants, WIDE, error=bound)
    forms = [gauged(v) for v in variants]
    found = [codec.rounded(g, codec.step_of(g)) for g in forms]
    numbers, classes = (np.concatenate([getattr(f, leaf) for f in found]) for leaf in ("numbers", "classes"))
    bits = 0.0
    for c in np.unique(classes):
        _, many = np.unique(numbers[classes == c], return_counts=True)
        bits -= (many * np.log2(many / many.sum())).sum()
    ours = sum(len(codec.encode(v)) for v in variants)
    assert 0.98 * bits / 8 < ours <= 1.08 * bits / 8 + 40 * len(variants)


def test_klt_finds_a_planted_subspace_and_nothing_in_noise() -> None:
    planted = packs.make("klt").fit(lambda: iter(fleet("shared", 48, 4, WIDE)), WIDE)["kept"]
    assert planted.tolist() == [PLANTED] * 4
    random = packs.make("klt").fit(lambda: iter(fleet("random", 48, 4, WIDE)), WIDE)["kept"]
    assert random.tolist() == [0] * 4


@pytest.mark.parametrize("form", ["one", "given"])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_klt_is_not_larger_than_integers_of_its_error(bits: int, form: str) -> None:
    variants = fleet("random", 24, 8, WIDE)
    plain = fitted("rtn", variants, WIDE, bits=bits, form=form)
    lost = float(np.mean(errors(plain, variants)))
    codec = fitted("klt", variants, WIDE, error=lost)
    assert max(errors(codec, variants)) <= 1.005 * lost
    ours, theirs = (sum(len(c.encode(v)) for v in variants) for c in (codec, plain))
    assert ours <= 1.02 * theirs
