"""Turns: orthogonal, with the given directions first, there and back; held as a matrix or as reflections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plures.tensors import turn
from plures.tensors.turn import DENSE, Turn

WIDTHS = [1, 16, 65]


def basis(k: int, width: int, seed: int = 0) -> Tensor:
    """Orthonormal rows."""
    return torch.linalg.qr(torch.randn(width, k, generator=torch.Generator().manual_seed(seed))).Q.T.contiguous()


def cases() -> list[tuple[int, int]]:
    return [(k, w) for w in WIDTHS for k in sorted({0, 1, w // 2, w})] + [(k, DENSE + 6) for k in (0, 1, 9)]


@pytest.mark.parametrize(("k", "width"), cases())
def test_it_is_orthogonal_and_comes_back(k: int, width: int) -> None:
    made = Turn(basis(k, width))
    q = made.there(torch.eye(width)).double()
    assert (q @ q.T - torch.eye(width)).abs().max() < 1e-5
    rows = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made.back(made.there(rows)), rows, rtol=0, atol=2e-5)
    torch.testing.assert_close(made.there(made.back(rows)), rows, rtol=0, atol=2e-5)
    torch.testing.assert_close(made.there(rows), (rows.double() @ q).float(), rtol=0, atol=2e-5)
    assert (made.matrix is not None) == (k > 0 and width <= DENSE)
    if made.matrix is not None:
        assert torch.equal(rows @ made.matrix, made.there(rows))


@pytest.mark.parametrize(("k", "width"), [c for c in cases() if c[0]])
def test_the_first_directions_are_the_given_ones(k: int, width: int) -> None:
    rows = basis(k, width)
    turned = Turn(rows).there(rows)
    torch.testing.assert_close(turned[:, :k].abs(), torch.eye(k), rtol=0, atol=1e-5)
    assert turned[:, k:].abs().sum() < 1e-4 * width


def test_rows_that_are_only_nearly_orthonormal() -> None:
    rows = (127 * basis(7, 40)).round() / 127
    made = Turn(rows)
    q = made.there(torch.eye(40)).double()
    assert (q @ q.T - torch.eye(40)).abs().max() < 1e-5
    outside = torch.linalg.lstsq(rows.T.double(), q[:, :7]).solution
    assert (rows.T.double() @ outside - q[:, :7]).abs().max() < 1e-5  # one space
    assert ((rows.double() @ q[:, :7]).abs() - torch.eye(7)).abs().max() < 0.05


def test_wide_ones_are_as_narrow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, given = basis(5, 33), torch.randn(4, 33, generator=torch.Generator().manual_seed(2))
    dense = Turn(rows)
    monkeypatch.setattr(turn, "DENSE", 0)
    wide = Turn(rows)
    assert wide.matrix is None and dense.matrix is not None
    torch.testing.assert_close(wide.there(given), dense.there(given), rtol=0, atol=1e-5)
    torch.testing.assert_close(wide.back(given), dense.back(given), rtol=0, atol=1e-5)


def test_energy_in_the_basis_comes_first() -> None:
    rows = basis(6, 50)
    given = torch.randn(10, 6, generator=torch.Generator().manual_seed(3)) @ rows
    turned = Turn(rows).there(given)
    torch.testing.assert_close(turned[:, :6].norm(dim=1), given.norm(dim=1), rtol=1e-5, atol=1e-5)
    assert turned[:, 6:].abs().max() < 1e-5
