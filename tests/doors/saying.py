"""What the tests of the command line say and look for."""

from __future__ import annotations

from collections.abc import Callable

Said = Callable[..., tuple[int, str, str]]
QUICK = ["train.steps=2", "train.batch_rows=2", "data.max_tokens=24", "adapt.r=2", "adapt.l=2"]


def one_line(got: tuple[int, str, str], code: int, *words: str) -> None:
    """One command ended with this code and with one line on stderr that holds these words."""
    assert got[0] == code, got[2]
    errors = [line for line in got[2].splitlines() if line.startswith("plures: ")]
    assert len(errors) == 1, got[2]
    assert got[2].splitlines()[-1] == errors[0]
    assert "Traceback" not in got[2]
    for word in words:
        assert word in errors[0]
