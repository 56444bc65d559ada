"""How much each row counts in training: a column of weights, checked row by row."""

from __future__ import annotations

import math
from numbers import Real

from plures.core.errors import BadInput, nearest
from plures.engine.rows import Rows

COLUMN = "plures_weight"  # what `plures select` writes
AUTO, NONE = "auto", "none"
LEAST, MOST = 1e-30, 1e30  # float32 holds a window's nats times these


def column_of(rows: Rows, said: str) -> str:
    """The column that weighs these rows, or `NONE`. `said` is either, or `AUTO`: `COLUMN` where any row has it."""
    if said != AUTO:
        return said
    return COLUMN if any(COLUMN in row for row in rows) else NONE


def weights_of(rows: Rows, said: str) -> list[float] | None:
    """The weight of every row, by what `column_of` takes; None where all count alike.

    Raises: BadInput, naming the row, for one that lacks the column, or whose weight is not a finite number of at least
        0; and where all weights are 0.
    """
    column = column_of(rows, said)
    if column == NONE:
        return None
    found = [_weight(row, column, place) for row, place in zip(rows.items, rows.places, strict=True)]
    if not any(found):
        raise BadInput(f"{rows.places[0]}: {column} is '0', as in all {len(found)} rows; at least one must count: "
                       f"give a weight above 0, or count the rows alike with data.weight={NONE}")  # fmt: skip
    return found


def counting(rows: Rows, said: str) -> tuple[Rows, list[float] | None]:
    """The rows whose weight is above 0, with their weights; all rows and None where they count alike.

    So a row of weight 0 is as good as not there: it takes no part in a window, and costs no time.
    Raises: as `weights_of`.
    """
    weights = weights_of(rows, said)
    if weights is None or all(weights):
        return rows, weights
    return rows.take(i for i, w in enumerate(weights) if w), [w for w in weights if w]


def refuse(rows: Rows, who: str) -> None:
    """Raises: BadInput where rows have the column that `plures select` writes, for a command that knows no weights."""
    place = next((place for row, place in zip(rows.items, rows.places, strict=True) if COLUMN in row), None)
    if place:
        raise BadInput(f"{place}: there is a column {COLUMN!r}, and {who} counts every row alike; if that is meant, "
                       "give the rows without that column")  # fmt: skip


def _weight(row: dict[str, object], column: str, place: str) -> float:
    if column not in row:
        raise BadInput(f"{place}: there is no column {column!r}, whose weights the rows are trained with."
                       f"{nearest(column, row)} Give every row one, or count the rows alike with "
                       f"data.weight={NONE}")  # fmt: skip
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, Real):
        shown = "null" if value is None else str(value)[:40]
        raise BadInput(f"{place}: {column} must be a number of at least 0, got {shown!r} ({type(value).__name__})")
    if value != 0 and (value < LEAST or not value <= MOST):  # so that NaN is refused
        small_or_large = not value <= 0 and value < math.inf
        said = f"0, or in [{LEAST:g}, {MOST:g}]" if small_or_large else "finite and at least 0"
        raise BadInput(f"{place}: {column} is {str(value)[:40]!r}; a weight must be {said}")
    return float(value)
