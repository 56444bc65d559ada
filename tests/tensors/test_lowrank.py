"""Low-rank algebra against torch's SVD of the full matrix."""

from __future__ import annotations

import pytest
import torch

from plures.tensors.lowrank import truncate, weighted_sum


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("out", "into", "r", "rank"), [(12, 9, 5, 2), (9, 12, 5, 5), (6, 20, 8, 3), (20, 6, 8, 1), (7, 7, 7, 6)]
)
def test_truncation_is_the_best_of_its_rank(out: int, into: int, r: int, rank: int) -> None:
    B, A = normal(out, r, seed=1), normal(r, into, seed=2)
    b, a = truncate(B, A, rank)
    assert b.shape == (out, rank)
    assert a.shape == (rank, into)
    u, s, vh = torch.linalg.svd((B @ A).double())
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    torch.testing.assert_close((b @ a).double(), best, rtol=1e-4, atol=1e-4)
    lost = torch.linalg.matrix_norm((B @ A - b @ a).double())
    torch.testing.assert_close(lost, s[rank:].square().sum().sqrt(), rtol=1e-3, atol=1e-4)


def test_both_factors_carry_the_roots_of_the_singular_values() -> None:
    B, A = normal(10, 4, seed=3), normal(4, 8, seed=4)
    b, a = truncate(B, A, 3)
    s = torch.linalg.svdvals(B @ A)[:3]
    torch.testing.assert_close(b.T @ b, torch.diag(s), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a @ a.T, torch.diag(s), rtol=1e-4, atol=1e-4)


def test_full_rank_changes_nothing_and_rank_deficiency_is_no_trouble() -> None:
    B, A = normal(10, 3, seed=5), normal(3, 8, seed=6)
    b, a = truncate(B, A, 3)
    torch.testing.assert_close(b @ a, B @ A, rtol=1e-4, atol=1e-4)
    b, a = truncate(torch.cat([B, B], 1), torch.cat([A, A], 0), 4)
    torch.testing.assert_close(b @ a, 2 * B @ A, rtol=1e-4, atol=1e-4)
    b, a = truncate(torch.zeros(5, 2), torch.zeros(2, 4), 2)
    assert torch.equal(b @ a, torch.zeros(5, 4))


def test_half_precision_goes_in_and_inputs_stay() -> None:
    B, A = normal(6, 4, seed=7).bfloat16(), normal(4, 5, seed=8).bfloat16()
    before = B.clone(), A.clone()
    b, a = truncate(B, A, 4)
    torch.testing.assert_close(b @ a, B.float() @ A.float(), rtol=1e-3, atol=1e-3)
    assert torch.equal(B, before[0])
    assert torch.equal(A, before[1])


def test_a_weighted_sum_is_exact_at_the_sum_of_the_ranks() -> None:
    pairs = [(normal(6, r, seed=r), normal(r, 5, seed=10 + r)) for r in (1, 2, 3)]
    B, A = weighted_sum(pairs, [0.5, -2.0, 3.0])
    assert B.shape == (6, 6)
    assert A.shape == (6, 5)
    want = 0.5 * pairs[0][0] @ pairs[0][1] - 2 * pairs[1][0] @ pairs[1][1] + 3 * pairs[2][0] @ pairs[2][1]
    torch.testing.assert_close(B @ A, want)
    with pytest.raises(ValueError, match="zip"):
        weighted_sum(pairs, [1.0])
