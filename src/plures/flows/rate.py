"""Numbers about every row, by the base of a fleet or by its variants, as columns that `plures select` reads."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from plures.core.errors import BadInput, WrongUse, disk
from plures.core.recipe import to_dict
from plures.engine.columns import short
from plures.engine.data import Rows, read_rows
from plures.engine.generate import Session
from plures.engine.model import Base, load_base, load_tokenizer
from plures.engine.rate import Alone, Gradients, examples_of, fresh_lora, measure, pair_loss
from plures.flows import selection
from plures.flows.held import held
from plures.flows.objective import pad_id
from plures.flows.recipes import RateRecipe
from plures.flows.train import device
from plures.loss.dpo import Dpo
from plures.store import Store, Version
from plures.tensors import safe
from plures.tensors.together import sync_folder
from plures.tensors.variant import Variant

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]
BASE = "base"
"""What stands for the base among variants."""
BLOCK = 128  # rows between two files of the part
KINDS = ("loss", "tokens", "disagreement", "gradients")


@dataclass(frozen=True)
class Rated:
    """Where the rows are with their new columns, how many there are, and the mean of every column of single numbers."""

    out: str
    rows: int
    columns: tuple[str, ...]
    means: dict[str, float]


def rate(recipe: RateRecipe, say: Say = lambda _: None) -> Rated:
    """Give every row the columns that `recipe.want` names, and write all rows with all columns to `recipe.out`.

    A killed run goes on from `<out>.part`, and ends with the same file. The columns of the rows have Plures' names
    (`text`, not what `recipe.columns` maps to it).
    Raises: WrongUse for a request that cannot be met; BadInput for rows that are not what they should be, or that
        cannot be given a finite number; StoreBusy while another process writes the same file; what reading raises.
    """
    with Store.open(Path(recipe.fleet)) as store:
        rows, asked = checked(recipe, store)
        there = _table(recipe, rows)
        with _held(Path(f"{recipe.out}.part")) as part:
            of = _of(recipe, rows, store, asked)
            begun = _begun(part, of)
            if recipe.want == ["tokens"]:
                base = load_tokenizer(store.base)
            else:
                base = load_base(store.base, dtype=recipe.base_dtype, device=device(recipe.device))
            rater = Rater(recipe, base, rows.format == "pairs", asked, store)
            if not begun:
                _check_rows(rows, base, recipe.max_tokens)  # before the first hour, not after it
                safe.write_bytes(part / "of.json", json.dumps(of).encode())
            made = _all_blocks(part, rows, rater, say)
            _write(Path(recipe.out), part, rows, there, made)
    means = {name: float(v.mean()) for name, v in made.items() if v.ndim == 1}
    return Rated(recipe.out, len(rows), tuple(made), means)


def checked(recipe: RateRecipe, store: Store) -> tuple[Rows, dict[str, Version | None]]:
    """The rows, and who is asked: None is the base. Raises: as `rate`."""
    rows = read_rows(_sources(recipe), columns=recipe.columns)
    asked = {ref: None if ref == BASE else store.resolve(ref) for ref in recipe.variants or [BASE]}
    _check(recipe, rows.format == "pairs")
    return rows, asked


def left(recipe: RateRecipe, rows: Rows, store: Store, asked: Mapping[str, Version | None]) -> list[int]:
    """The first rows of the blocks that are not done yet. Raises: as `rate`, for rows that its file cannot hold, or a
    part that is of something else."""
    _table(recipe, rows)
    part = Path(f"{recipe.out}.part")
    _begun(part, _of(recipe, rows, store, asked))
    return [at for at in range(0, len(rows), BLOCK) if not _block(part, at).exists()]


def _block(part: Path, at: int) -> Path:
    """The file of the columns of the block that begins with row `at`."""
    return part / f"{at:012d}.safetensors"


def names(recipe: RateRecipe, pairs: bool) -> list[str]:
    """The columns that a recipe makes, in the order of `KINDS`."""
    several = len(recipe.variants) > 1
    losses = ["difficulty"] if pairs else [f"loss_{ref}" for ref in recipe.variants] if several else ["loss"]
    return [n for kind in KINDS if kind in recipe.want for n in (losses if kind == "loss" else [kind])]


class Rater:
    """A base with the variants that are asked, and what the recipe wants of them."""

    def __init__(self, recipe: RateRecipe, base: Base, pairs: bool, asked: Mapping[str, Version | None],
                 store: Store) -> None:  # fmt: skip
        self.recipe, self.base, self.pairs = recipe, base, pairs
        self.models, self.reference, self.gradients = list[Alone](), list[Alone](), None
        self.dpo = Dpo(beta=recipe.beta) if pairs else None
        if base.model is None:
            return
        session, first = Session(base), next(iter(asked.values()))
        fresh = fresh_lora(session, recipe.seed) if "gradients" in recipe.want and first is None else ""
        slots = [session.slot(self._load(store, v), v.identity) if v else session.slot(None) for v in asked.values()]
        if set(recipe.want) & {"loss", "disagreement"}:
            self.models = [Alone(session, slot) for slot in slots]
        if pairs and set(recipe.want) & {"loss", "gradients"}:
            self.reference = [Alone(session, session.slot(None))]
        if "gradients" in recipe.want:
            still = frozenset({"A"}) if first is None else _still(store, first)
            self.gradients = Gradients(
                session, fresh or slots[0], width=recipe.width, seed=recipe.seed, batch_rows=recipe.batch_rows,
                pad_id=pad_id(base), still=still, dpo=self.dpo,
            )  # fmt: skip

    def _load(self, store: Store, version: Version) -> Variant:
        """A variant. Raises: WrongUse for one with whole modules in it, which are float32, on a base that is not."""
        variant = store.load(version.ref)
        if variant.extra and self.recipe.base_dtype != "float32":
            raise WrongUse(f"base_dtype {self.recipe.base_dtype!r}: {version.ref!r} has modules_to_save, which are "
                           "float32; set base_dtype=float32")  # fmt: skip
        return variant

    def of(self, rows: Rows) -> dict[str, Array]:
        """The columns of some rows. Raises: BadInput, naming the row, for a number that is not finite."""
        examples = examples_of(rows, self.base.tokenizer, self.recipe.max_tokens)
        owner = np.repeat(np.arange(len(rows)), [len(row) for row in examples])
        flat = [e for row in examples for e in row]
        tokens = np.bincount(owner, [e.n_counted for e in flat])
        found: dict[str, list[Array]] = {"tokens": [tokens.astype(np.int64)]}
        models = [*self.models, *self.reference]
        reference: Array | None = None
        if models:
            nats, far = measure(models, flat, self.recipe.batch_rows, pad_id(self.base), self.base.model.device,
                                "disagreement" in self.recipe.want)  # fmt: skip
            found["disagreement"] = [np.bincount(owner, far) / tokens]
            reference = nats[-1].reshape(-1, 2) if self.reference else None
            found["loss"] = self._losses(nats[: len(self.models)], owner, tokens, reference)
        if self.gradients is not None:
            found["gradients"] = [self.gradients.of(examples, reference)]
        columns = [c for kind in KINDS if kind in self.recipe.want for c in found[kind]]
        out = dict(zip(names(self.recipe, self.pairs), columns, strict=True))
        for name, values in out.items():
            wrong = np.flatnonzero(~np.isfinite(values.reshape(len(rows), -1)).all(1))
            if len(wrong):
                raise BadInput(f"{rows.places[wrong[0]]}: its {name} is not finite; leave the row out, or compute in "
                               "base_dtype=float32")  # fmt: skip
        return out

    def _losses(self, nats: Array, owner: Array, tokens: Array, reference: Array | None) -> list[Array]:
        """Each model's mean nats per counted token; of pairs the mean of the models' dpo losses."""
        if self.dpo is None or reference is None:
            return [np.bincount(owner, n) / tokens for n in nats]
        mine, theirs = (torch.from_numpy(a) for a in (nats.reshape(len(nats), -1, 2), reference))
        return [pair_loss(self.dpo, mine, theirs.expand_as(mine)).mean(0).numpy()] if len(nats) else []


def _still(store: Store, version: Version) -> frozenset[str]:
    """The tensors that stood still when a variant was trained."""
    recipe = store.lineage(version.ref).get("recipe")
    start = recipe.get("start", {}) if isinstance(recipe, dict) else {}
    return frozenset(start.get("freeze", ()))


def _sources(recipe: RateRecipe) -> list[str]:
    """The sources of rows, selections as the files that they mean. Raises: WrongUse for an `out` among them."""
    given = [recipe.rows] if isinstance(recipe.rows, str) else recipe.rows
    found = [selection.resolve(recipe.fleet, source) for source in given]
    out = Path(recipe.out)
    if out.suffix not in (".parquet", ".jsonl"):
        raise WrongUse(f"out {recipe.out!r} must end in .parquet or .jsonl")
    if any(out.resolve() == Path(f).resolve() for f in found):
        raise WrongUse(f"out {recipe.out!r} is a file of the rows; name another")
    return found


def _check(recipe: RateRecipe, pairs: bool) -> None:
    """Raises: WrongUse for columns that these variants cannot give."""
    said, want = ", ".join(recipe.variants) or "none", recipe.want
    if not want or len(set(want)) < len(want):
        raise WrongUse(f"want {', '.join(want) or 'nothing'!r}: name each of {', '.join(KINDS)} once at most, and one "
                       "at least")  # fmt: skip
    if len(set(recipe.variants)) < len(recipe.variants):
        raise WrongUse(f"variants {said!r}: one is named twice; name each once")
    if "disagreement" in want and len(recipe.variants) != 2:
        raise WrongUse(f"variants {said!r}: disagreement is between exactly two; name two, of which one may be 'base'")
    if pairs and "loss" in want and (not recipe.variants or BASE in recipe.variants):
        raise WrongUse(f"variants {said!r}: the loss of pairs is that of variants against the base, which has the same "
                       "for all; name variants that were trained with loss: {method: dpo}")  # fmt: skip


def _check_rows(rows: Rows, base: Base, max_tokens: int) -> None:
    """Raises: BadInput for a row without a token to predict, and what encoding raises."""
    for at in range(0, len(rows), BLOCK):
        examples_of(rows[at : at + BLOCK], base.tokenizer, max_tokens)


def _table(recipe: RateRecipe, rows: Rows) -> pa.Table | None:
    """The rows as they will stand in Parquet; None where they go to JSON lines.

    Raises: WrongUse for a row that has one of the new columns; BadInput for columns that Parquet cannot hold.
    """
    there = list(dict.fromkeys(name for row in rows.items for name in row))
    for name in names(recipe, rows.format == "pairs"):
        if name in there:
            raise WrongUse(f"the rows have a column {name!r} already; rename it, or leave its kind out of want")
    if Path(recipe.out).suffix == ".jsonl":
        return None
    made = {}
    for name in there:
        try:
            made[name] = pa.array([row.get(name) for row in rows.items])
            parquet.write_table(pa.table({name: made[name][:1]}), io.BytesIO())
        except (pa.ArrowException, OverflowError) as error:
            raise BadInput(f"the column {name!r} cannot be kept in Parquet ({short(error)}); name a .jsonl file as "
                           "out, or make its values alike") from error  # fmt: skip
    return pa.table(made)


def _of(recipe: RateRecipe, rows: Rows, store: Store, asked: Mapping[str, Version | None]) -> dict[str, Any]:
    """What the files of a part are of."""
    of = {"rows": rows.fingerprint, "base": store.base.hash, "block": BLOCK, "device": device(recipe.device),
          "variants": {ref: v.identity if v else "" for ref, v in asked.items()}}  # fmt: skip
    free = ("fleet", "rows", "columns", "variants", "out", "device")
    return of | {k: v for k, v in to_dict(recipe).items() if k not in free}


@contextmanager
def _held(part: Path) -> Iterator[Path]:
    """Hold the folder of what is done so far for this process alone. Raises: StoreBusy."""
    with held(part / ".lock", f"writes {str(part)!r}"):
        try:
            yield part
        finally:
            if part.exists() and not (part / "of.json").exists():
                shutil.rmtree(part)  # nothing was begun


def _begun(part: Path, of: dict[str, Any]) -> bool:
    """Whether the part was begun, with rows that were checked. Raises: BadInput where it is of something else."""
    path = part / "of.json"
    if not path.exists():
        return False
    with disk(path, "read"):
        before = json.loads(path.read_text(encoding="utf-8"))
    if before != json.loads(json.dumps(of)):
        other = next(k for k in {**of, **before} if before.get(k) != json.loads(json.dumps(of)).get(k))
        raise BadInput(f"{str(part)!r} holds columns that were begun with another {other}: {str(before.get(other))!r}, "
                       f"now {str(of.get(other))!r}; restore it, or remove the folder to begin anew")  # fmt: skip
    return True


def _all_blocks(part: Path, rows: Rows, rater: Rater, say: Say) -> dict[str, Array]:
    """The columns of all rows: those of blocks that the part has are read, the others are made and kept there."""
    paths = []
    for at in range(0, len(rows), BLOCK):
        paths.append(_block(part, at))
        if paths[-1].exists():
            continue
        found: dict[str, Tensor] = {k: torch.from_numpy(v) for k, v in rater.of(rows[at : at + BLOCK]).items()}
        safe.write(paths[-1], found)
        say(f"{min(at + BLOCK, len(rows)):,} of {len(rows):,} rows")
    blocks = [safe.read(path) for path in paths]
    return {name: np.concatenate([b[name].numpy() for b in blocks]) for name in names(rater.recipe, rater.pairs)}


def _write(out: Path, part: Path, rows: Rows, there: pa.Table | None, made: Mapping[str, Array]) -> None:
    """Write the rows with their new columns, whole, and remove the part."""
    if there is None:
        safe.write_chunks(out, _lines(rows.items, made))
    else:
        for name, values in made.items():
            column = pa.array(values) if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(
                pa.array(values.reshape(-1)), values.shape[1])  # fmt: skip
            there = there.append_column(name, column)
        whole = part / "whole.parquet"
        with disk(out):
            with whole.open("wb") as file:
                parquet.write_table(there, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(whole, out)
            sync_folder(out.parent)
    with disk(part):
        shutil.rmtree(part)


def _lines(items: Sequence[Mapping[str, Any]], made: Mapping[str, Array]) -> Iterator[bytes]:
    """JSON lines. Half characters, which UTF-8 cannot say, stay the escapes that they were."""
    for i, row in enumerate(items):
        whole = {**row, **{name: values[i].tolist() for name, values in made.items()}}
        yield json.dumps(whole, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"
