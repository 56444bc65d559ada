"""Cores between shared bases: sums, SVDs and mutations of deltas against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from plures.tensors.breed import Frame, crossed, framed, mutated

OUT, INTO = 11, 7


def factors(rank: int, seed: int) -> tuple[Tensor, Tensor]:
    r = np.random.default_rng(seed)
    return torch.tensor(r.standard_normal((OUT, rank))), torch.tensor(r.standard_normal((rank, INTO)))


def dense(frame: Frame, core: Tensor) -> np.ndarray:
    return (frame.left @ core @ frame.right.T).numpy()


@pytest.mark.parametrize("ranks", [(2, 3), (4, 5), (1, 1, 2)])
def test_every_delta_is_its_core_between_the_bases(ranks: tuple[int, ...]) -> None:
    given = [factors(r, i) for i, r in enumerate(ranks)]
    frame, cores = framed([*given, None])
    for side in (frame.left, frame.right):
        np.testing.assert_allclose(side.T @ side, np.eye(side.shape[1]), atol=1e-12)
    for (B, A), core in zip(given, cores, strict=False):
        np.testing.assert_allclose(dense(frame, core), (B @ A).numpy(), atol=1e-12)
    assert not cores[-1].any() and frame.rank == min(sum(ranks), INTO)


def test_a_crossing_is_the_weighted_mean_of_the_deltas() -> None:
    given = [factors(2, 1), factors(3, 2)]
    frame, cores = framed(given)
    a, b = ((B @ A).numpy() for B, A in given)
    np.testing.assert_allclose(dense(frame, crossed(cores, [1.02, 0.97])), (1.02 * a + 0.97 * b) / 1.99, atol=1e-12)


def test_a_mutation_adds_shares_of_the_singular_directions_of_the_dense_delta() -> None:
    given = [factors(2, 1), factors(3, 2)]
    frame, cores = framed(given)
    shares = np.array([0.1, 0.02, 0.07, 0.0, 0.05])
    got = dense(frame, mutated(cores[0], cores[1], torch.tensor(shares)))
    u, s, vh = np.linalg.svd((given[1][0] @ given[1][1]).numpy(), full_matrices=False)
    want = (given[0][0] @ given[0][1]).numpy() + (u[:, :3] * (shares[:3] * s[:3])) @ vh[:3]
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_factors_are_the_best_of_their_rank(rank: int) -> None:
    frame, cores = framed([factors(2, 1), factors(3, 2)])
    core = crossed(cores, [1.0, 2.0])
    B, A = frame.factors(core, rank)
    assert B.shape == (OUT, rank) and A.shape == (rank, INTO) and B.dtype == torch.float32
    u, s, vh = np.linalg.svd(dense(frame, core), full_matrices=False)
    np.testing.assert_allclose(B.double() @ A.double(), (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-6)
