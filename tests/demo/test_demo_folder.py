"""The demo's folder: nothing of somebody else's is taken away."""

from __future__ import annotations

from pathlib import Path

import pytest

from plures.core.errors import WrongUse
from plures.demo import tour


def test_the_demo_overwrites_nothing_but_an_earlier_demo(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(WrongUse, match="no earlier demo"):
        tour.run(str(tmp_path / "mine"), "topics")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_an_earlier_demo_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / tour.MARK).touch()
    (tmp_path / "old.html").touch()
    assert {p.name for p in tour._fresh(tmp_path).iterdir()} == {tour.MARK}
