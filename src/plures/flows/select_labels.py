"""Which labels mean nearly the same: vectors of a file, or by the model that embedded rows, as a graph of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from plures.choice.labels import alike
from plures.choice.pool import Pool
from plures.core.errors import BadInput, WrongUse, nearest
from plures.engine import columns
from plures.engine.candidates import Candidates
from plures.engine.sidecar import Sidecar
from plures.flows import embed
from plures.flows.recipes import SelectRecipe

Array = np.ndarray[Any, Any]
LABEL, VECTOR = "label", "vector"


def joined(recipe: SelectRecipe, pool: Pool) -> Pool:
    """The pool, its labels with their graph where the recipe has vectors of them.

    Raises: BadInput for a label without a vector, one with two, or vectors that are not what they should be; WrongUse
    for a folder of embedded conversations.
    """
    if not recipe.label_vectors or pool.labels is None:
        return pool
    made = vectors(recipe.label_vectors, pool.labels.names)
    return replace(pool, labels=replace(pool.labels, near=alike(made, recipe.label_threshold)))


def arrays(pool: Pool) -> list[Array]:
    """The graph of the pool's labels as arrays; none where there is no graph."""
    near = None if pool.labels is None else pool.labels.near
    return [] if near is None else [near.start, near.index, near.near]


def vectors(said: str, names: Sequence[str]) -> Array:
    """A vector for each of these labels, float32 `[l, d]` of length 1. Raises: as `joined`."""
    return _embedded(said, names) if Sidecar.is_one(said) else _read(said, names)


def _embedded(folder: str, names: Sequence[str]) -> Array:
    """The labels' names, embedded as the rows of the folder were."""
    about, encode = embed.alike(Sidecar(folder))
    if about.turns:
        raise WrongUse(f"{folder!r} holds vectors of conversations, and labels are none; give a folder of plures embed "
                       "without turns, or a file of labels and vectors")  # fmt: skip
    column = pa.array(list(names))
    return encode(column, Path(folder), columns.Part(0, 0, 0, pa.RecordBatch.from_arrays([column], [LABEL])))


def _read(file: str, names: Sequence[str]) -> Array:
    """The vectors of a file's rows of these labels."""
    other = Candidates(file)
    other.need(LABEL, VECTOR)
    at: dict[str, int] = {}
    blocks = []
    for part in other.parts([LABEL, VECTOR]):
        path = other.files[part.file]
        for i, name in enumerate(columns.texts(columns.column_of(part, LABEL, path), LABEL, path, part)):
            if name in at:
                raise BadInput(f"{part.place(path, i)}: the label {name!r} is there twice; keep one vector of each")
            at[name] = len(at)
        blocks.append(columns.matrix(columns.column_of(part, VECTOR, path), VECTOR, path, part))
    if absent := next((n for n in names if n not in at), None):
        raise BadInput(f"{file!r} has no vector of the label {absent!r}, which rows of the pool have."
                       f"{nearest(absent, at)} Give every label one")  # fmt: skip
    return columns.stacked(blocks, VECTOR)[[at[n] for n in names]]
