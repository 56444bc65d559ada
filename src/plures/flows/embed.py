"""Texts as vectors in a sidecar: by a model of sentence-transformers, or by hashing; whole conversations by MUVERA."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from plures.choice.kmeans import unit
from plures.choice.muvera import Encoding
from plures.core.errors import BadInput, Unreachable, WrongUse, missing
from plures.core.units import si_bytes
from plures.engine import columns
from plures.engine.candidates import Candidates
from plures.engine.embed import hashed
from plures.engine.sidecar import About, Sidecar, Writer
from plures.flows.recipes import EmbedRecipe
from plures.tensors.rng import rng

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]
Model = Callable[[Sequence[str]], Array]
Encode = Callable[[pa.Array, Path, columns.Part], Array]
BLOCK = 4096  # texts between two marks


@dataclass(frozen=True)
class Embedded:
    """Where the vectors are, and what they are."""

    out: str
    about: About


@dataclass(frozen=True)
class Plan:
    """What an embedding reads and writes; `width` and `n_bytes` are None where only the model knows them."""

    out: str
    rows: int
    files: int
    model: str
    width: int | None
    kind: str
    n_bytes: int | None

    def lines(self) -> list[str]:
        """The plan as people read it."""
        by = f"the model {self.model!r}, which is loaded" if self.model else "hashed n-grams; no model is loaded"
        size = "as wide as the model makes them"
        if self.n_bytes is not None:
            size = f"{self.width} wide, {si_bytes(self.n_bytes)}"
        return [f"{self.rows:,} rows of {self.files} files by {by}", f"vectors as {self.kind}, {size}, in {self.out}"]


def plan(recipe: EmbedRecipe) -> Plan:
    """What `embed` would do, from the files' metadata. Raises: as `embed`, where it is known by then."""
    source = Candidates(recipe.pool)
    out, n = _out(recipe, source), source.count()
    width = recipe.width if recipe.turns or not recipe.model else None
    each = None if width is None else 2 * width if recipe.kind == "f16" else width + 4  # a scale for each row
    return Plan(str(out), n, len(source.files), recipe.model, width, recipe.kind, None if each is None else n * each)


def _out(recipe: EmbedRecipe, source: Candidates) -> Path:
    """Where the vectors go. Raises: BadInput without the column of texts; WrongUse where something else is there."""
    source.need(recipe.text)
    out = Path(recipe.out or place(source))
    if out.exists() and not Sidecar.is_one(str(out)):
        raise WrongUse(f"{str(out)!r} is there already and holds no vectors; name another place with out=")
    return out


def embed(recipe: EmbedRecipe, say: Say = lambda _: None) -> Embedded:
    """Embed every row's text and write the sidecar `recipe.out` (none: the pool's name and `.emb`).

    A killed run goes on from its last mark. Raises: BadInput for rows without texts, or where the model cannot be had;
    MissingExtra; WrongUse.
    """
    source = Candidates(recipe.pool)
    out = _out(recipe, source)
    model, made_by = _model(recipe)
    made_by += f", column {recipe.text}" + (", turns by muvera" if recipe.turns else "")
    at = str(Path(recipe.model).resolve()) if recipe.model and Path(recipe.model).exists() else recipe.model
    writer = Writer(out, recipe.kind, source.fingerprint, made_by, model=at, text=recipe.text, turns=recipe.turns)
    total, seen = source.count(), 0
    if writer.rows:
        say(f"going on after {writer.rows:,} rows")
    encode = _encode(recipe, model)
    for column, part in blocks(source, recipe.text):
        seen += len(column)
        if seen <= writer.rows:
            continue
        writer.add(encode(column, source.files[part.file], part))
        say(f"{writer.rows:,} of {total:,} rows")
    if not writer.rows:
        raise BadInput(f"{str(source.files[0])!r} is empty: there is nothing to embed")
    return Embedded(str(out), writer.done())


def place(source: Candidates) -> str:
    """Where the vectors of these rows are kept, unless said."""
    return f"{str(source.files[0]) if len(source.files) == 1 else str(source.files[0].parent)}.emb"


def how(beside: Sidecar) -> About:
    """What made a sidecar's vectors. Raises: BadInput where it does not say."""
    if not beside.about.text:
        raise BadInput(f"{str(beside.path)!r} does not say what made its vectors; run plures embed again")
    return beside.about


def alike(beside: Sidecar, device: str = "auto") -> tuple[About, Encode]:
    """What makes vectors of other rows, float32 `[n, width]` of length 1, as those of a sidecar were made.

    It takes a column, its file and its part, for messages; the About names the column. Raises: BadInput where the
    sidecar does not say how, or the model gives another width, or cannot be had; MissingExtra.
    """
    about = how(beside)
    recipe = EmbedRecipe([], text=about.text, model=about.model, width=about.width, turns=about.turns, device=device)
    encode = _encode(recipe, _model(recipe)[0])

    def checked(column: pa.Array, path: Path, part: columns.Part) -> Array:
        made = encode(column, path, part)
        if made.shape[1] != about.width:
            raise BadInput(f"{about.model!r} makes vectors of {made.shape[1]} numbers, and {str(beside.path)!r} has "
                           f"{about.width}: it is another model by now; run plures embed again")  # fmt: skip
        return made

    return about, checked


def _encode(recipe: EmbedRecipe, model: Model) -> Encode:
    """Vectors of length 1 of a column of texts, or of conversations."""
    turns = _Turns(recipe, model) if recipe.turns else None

    def encode(column: pa.Array, path: Path, part: columns.Part) -> Array:
        return unit(turns(column, path, part) if turns else model(columns.texts(column, recipe.text, path, part)))

    return encode


def blocks(source: Candidates, text: str) -> Iterator[tuple[pa.Array, columns.Part]]:
    """The column in blocks that do not depend on where a run began."""
    for part in source.parts([text]):
        column = columns.column_of(part, text, source.files[part.file])
        for at in range(0, len(column), BLOCK):
            yield column.slice(at, BLOCK), columns.Part(part.file, part.group, part.offset + at, part.batch)


def _model(recipe: EmbedRecipe) -> tuple[Model, str]:
    if not recipe.model:
        return lambda texts: hashed(texts, recipe.width), f"hashed n-grams, {recipe.width} wide"
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise missing("sentence-transformers", "embed", "plures embed model=…") from error
    try:
        made = SentenceTransformer(recipe.model, device=None if recipe.device == "auto" else recipe.device,
                                   model_kwargs={"use_safetensors": True})  # fmt: skip
    except (OSError, ValueError) as error:
        if not Path(recipe.model).exists():
            raise Unreachable(f"cannot fetch {recipe.model!r}: it is no folder here, and no hub that has it answers; "
                              "give a local folder") from error  # fmt: skip
        raise BadInput(f"{recipe.model!r} is no model that can be read: {columns.short(error)}") from error

    def encode(texts: Sequence[str]) -> Array:
        return np.asarray(made.encode(list(texts), batch_size=recipe.batch, convert_to_numpy=True,
                                      show_progress_bar=False), np.float32)  # fmt: skip

    return encode, f"sentence-transformers {recipe.model}"


class _Turns:
    """Conversations as one vector each: the turns' vectors, encoded as a set (arXiv:2405.19504)."""

    def __init__(self, recipe: EmbedRecipe, model: Model) -> None:
        self.recipe, self.model = recipe, model
        self.encoding: Encoding | None = None

    def __call__(self, column: pa.Array, path: Path, part: columns.Part) -> Array:
        sets = [self._turns(value, part.place(path, i)) for i, value in enumerate(column.to_pylist())]
        start = np.concatenate([[0], np.cumsum([len(s) for s in sets])]).astype(np.int64)
        vectors = unit(self.model([turn for s in sets for turn in s]))
        if self.encoding is None:
            self.encoding = Encoding.draw(vectors.shape[1], rng(0, "muvera"), width=self.recipe.width)
        return self.encoding.document(vectors, start, fill=False)  # what fills a cell depends on the turns' order

    def _turns(self, value: Any, place: str) -> list[str]:
        """The texts of a list of messages, or of strings."""
        said = [t.get("content") if isinstance(t, dict) else t for t in value] if isinstance(value, list) else []
        texts = [t if isinstance(t, str) else json.dumps(t, sort_keys=True) for t in said if t]
        if not texts:
            raise BadInput(f"{place}: {self.recipe.text} is no list of messages with a content; leave out the row, or "
                           "turns")  # fmt: skip
        return texts
