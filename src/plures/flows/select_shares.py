"""Shares of a choice by source: the weights that `plures weigh` wrote, as quotas of exact counts."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plures.choice.pool import Quota
from plures.core.errors import BadInput, WrongUse, disk, nearest
from plures.engine import columns
from plures.engine.candidates import Candidates


@dataclass(frozen=True)
class Shares:
    """The weight of every value of the column `key`; they sum to 1."""

    key: str
    weights: dict[str, float]

    @classmethod
    def read(cls, path: str) -> Shares:
        """Those in a file that `plures weigh` wrote. Raises: BadInput."""
        with disk(path, "read"):
            data = Path(path).read_bytes()
        try:
            said: Any = json.loads(data)
            key, weights = said["key"], {str(k): float(v) for k, v in said["weights"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"shares {path!r} holds no key and weights: it is no file that plures weigh wrote"
            ) from error
        total = math.fsum(weights.values())
        if not isinstance(key, str) or min(weights.values(), default=-1) < 0 or not abs(total - 1) < 1e-6:
            raise BadInput(f"shares {path!r}: the weights must be numbers of at least 0 that sum to 1, got {total:g}")
        return cls(key, {k: v / total for k, v in weights.items()})

    def counts(self, n: int) -> dict[str, int]:
        """Rows of every source, `weight * n` rounded so that they sum to n: the largest remainders are rounded up."""
        exact = np.array(list(self.weights.values())) * n
        rows = np.floor(exact).astype(int)
        largest = np.argsort(rows - exact, kind="stable")  # of equal ones, the first
        rows[largest[: n - int(rows.sum())]] += 1
        return dict(zip(self.weights, rows.tolist(), strict=True))


def check(path: str, rows: int | None) -> None:
    """Raises: WrongUse where a choice of no fixed number of rows is to have shares; BadInput for another file."""
    if rows is None:
        raise WrongUse(f"shares {path!r} count rows: give the budget in rows (500) or as a share (5%)")
    Shares.read(path)


def quotas(path: str, source: Candidates, rows: int | None) -> tuple[Quota, ...]:
    """Quotas of exactly each source's share of `rows`; none where `path` is "".

    Raises: as `check`; BadInput where the pool has no such column, WrongUse where it has too few rows of a source.
    """
    if not path:
        return ()
    check(path, rows)
    assert rows is not None
    shares = Shares.read(path)
    source.need(shares.key)
    there: Counter[str] = Counter()
    for part in source.parts([shares.key]):
        column = columns.column_of(part, shares.key, source.files[part.file])
        for pair in column.value_counts().to_pylist():
            there[str(pair["values"])] += pair["counts"]
    counts = shares.counts(rows)
    if short := [value for value, n in counts.items() if n > there[value]]:
        value, most = short[0], min(math.floor(there[v] / shares.weights[v]) for v in short)
        near = "" if there[value] else nearest(value, there)
        fewer = f"lower the budget to {most} rows, or give more of it" if most else "give rows of it"
        raise WrongUse(f"shares {path!r} ask for {counts[value]} rows with {shares.key} = {value!r}, and the pool has "
                       f"{there[value]}; {fewer}.{near}")  # fmt: skip
    return tuple(Quota(shares.key, value, n, n) for value, n in counts.items() if there[value])
