"""The desk of a fleet of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from plures.flows.desk import Desk


@pytest.fixture
def own_desk(own_fleet: Path) -> Iterator[Desk]:
    made = Desk(own_fleet)
    yield made
    made.close()
