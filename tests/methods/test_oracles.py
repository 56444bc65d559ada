"""Every row's oracle: the authors' numbers, PEFT on the same tensors, or the formula in float64."""

from __future__ import annotations

import pytest

from rows import ADAPT


@pytest.mark.parametrize("name", ADAPT)
def test_oracle(name: str) -> None:
    ADAPT[name].oracle()
