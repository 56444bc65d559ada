"""Orthogonal transforms told by a few of their rows, the rest being what Householder reflections make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

DENSE = 1024  # a transform of at most this width is held as a matrix


class Turn:
    """An orthogonal `[width, width]` transform whose first directions are, but for signs, given ones.

    `basis [k, width]` float32 has nearly orthonormal rows; what they lack of it is made good. With no rows it is the
    identity. A wide one is held as its reflections, `width x k` numbers.
    """

    def __init__(self, basis: Tensor) -> None:
        """Of its first directions."""
        self.k, self.width = basis.shape
        self._q: Tensor | None = None
        if not self.k:
            return
        self._reflections, self._tau = torch.geqrf(basis.T.contiguous())
        if self.width <= DENSE:
            self._q = self._times(torch.eye(self.width), False)

    @property
    def matrix(self) -> Tensor | None:
        """The transform `Q`, rows times `Q` are turned; None for the identity and for wide ones."""
        return self._q

    def there(self, rows: Tensor) -> Tensor:
        """Rows `[..., width]` in the coordinates of the transform."""
        if not self.k:
            return rows
        return rows @ self._q if self._q is not None else self._times(rows, False)

    def back(self, rows: Tensor) -> Tensor:
        """Rows `[..., width]` from the coordinates of the transform."""
        if not self.k:
            return rows
        return rows @ self._q.T if self._q is not None else self._times(rows, True)

    def _times(self, rows: Tensor, transpose: bool) -> Tensor:
        flat = rows.reshape(-1, self.width).contiguous()
        return torch.ormqr(self._reflections, self._tau, flat, left=False, transpose=transpose).reshape(rows.shape)


def narrowed(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[k, width]` of a basis as int8, and a float16 scale for each."""
    scale = (basis.abs().amax(1).clamp_min(1e-12) / 127).to(torch.float16) if len(basis) else basis.new_zeros(0).half()
    return (basis / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def turns(widths: Sequence[int], kept: Sequence[int], basis: Tensor, scale: Tensor) -> Iterator[Turn]:
    """A transform for each of `widths`, the rows of all in one line, of which each has as many as are `kept`.

    Raises: RuntimeError where there are fewer rows than that.
    """
    at = row = 0
    for width, k in zip(widths, kept, strict=True):
        rows = basis[at : at + k * width].reshape(k, width).float() * scale[row : row + k, None].float()
        at, row = at + k * width, row + k
        yield Turn(rows)
