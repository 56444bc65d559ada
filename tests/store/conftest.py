"""An empty fleet for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_cases import BASE

from plures.store import Store


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Store]:
    """An empty fleet of BASE."""
    with Store.create(tmp_path / "fleet", BASE, wait_s=5) as store:
        yield store
