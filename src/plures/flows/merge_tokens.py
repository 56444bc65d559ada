"""Models with different tokens: one vocabulary for the result, and every model's embeddings read in its order.

A token's row in a model that has the token is the model's own. One that it lacks is the base's, else that of the only
model that has it, else the mean of those that do (mergekit's rule). Rows are looked up as they are read; none is kept.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from plures.core.errors import BadInput, WrongUse, nearest
from plures.flows.merge_recipe import Recipe, Token, Tokenizer, layer_of
from plures.flows.merge_sources import Source, local, read_json

Array = np.ndarray[Any, Any]
_TABLE = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|embed_out|word_embeddings|tok_embeddings|lm_head|output)"
                    r"\.(?:weight|bias)$")  # fmt: skip
ZERO, MEAN, PAD = -1, -2, -3  # instead of a model: zeros; the mean of those that have the token; of all rows
_CHUNK = 1 << 16


def is_table(name: str) -> bool:
    """Whether a tensor has a row for each token."""
    return layer_of(name) is None and bool(_TABLE.search(name))


def vocabulary(file: Mapping[str, Any]) -> dict[str, int]:
    """The ids of a tokenizer.json, added tokens among them."""
    said = file.get("model", {}).get("vocab") or {}
    words = dict(said) if isinstance(said, dict) else {str(e[0]): i for i, e in enumerate(said)}
    return words | {str(t["content"]): int(t["id"]) for t in file.get("added_tokens") or []}


@dataclass
class Tokens:
    """The result's vocabulary: its `tokenizer.json` where it is no model's own, the folder that all else of the
    tokenizer is from, and its rows.

    By models' names: `who [rows]` says whose row is taken (a number in `sources`, or ZERO, MEAN, PAD), `row [rows]`
    which one; `own [rows]` is a model's own row of each token, or -1.
    """

    file: dict[str, Any] | None
    folder: Path
    rows: int
    sources: Mapping[str, Source]
    who: dict[str, Array] = field(default_factory=dict)
    row: dict[str, Array] = field(default_factory=dict)
    own: dict[str, Array] = field(default_factory=dict)
    _means: dict[tuple[str, str], Array] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a table in the result."""
        return (self.rows, *shape[1:])

    def reader(self, model: str, name: str) -> Any:
        """Reads a model's table in the result's order."""
        return partial(self._read, model, name)

    def _read(self, model: str, name: str, start: int, out: Array) -> None:
        width = prod(self.sources[model].weights.entries[name].shape[1:])
        first, last = start // width, (start + len(out) - 1) // width + 1
        rows = np.empty((last - first, width), np.float32)
        self._fill(model, name, first, rows)
        out[:] = rows.reshape(-1)[start - first * width : start - first * width + len(out)]

    def _fill(self, model: str, name: str, first: int, rows: Array) -> None:
        """Rows from `first` on, those that lie side by side in a file in one go."""
        who, row = (t[model][first : first + len(rows)] for t in (self.who, self.row))
        breaks = np.flatnonzero((np.diff(who) != 0) | ((who[1:] >= 0) & (np.diff(row) != 1))) + 1
        labels, width = list(self.sources), rows.shape[1]
        for a, b in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
            here = rows[a:b]
            if who[a] >= 0:
                self.sources[labels[who[a]]].read(name, int(row[a]) * width, here.reshape(-1))
            elif who[a] == MEAN:
                self._averages(name, first + a, here)
            else:
                here[:] = 0 if who[a] == ZERO else self._mean(model, name, width)

    def _averages(self, name: str, first: int, rows: Array) -> None:
        """For each token the mean of the models that have it."""
        for i, out in enumerate(rows):
            found, one = [], np.empty(rows.shape[1], np.float32)
            for label, own in self.own.items():
                if own[first + i] >= 0:
                    self.sources[label].read(name, int(own[first + i]) * rows.shape[1], one)
                    found.append(one.astype(np.float64))
            out[:] = np.mean(found, axis=0)

    def _mean(self, model: str, name: str, width: int) -> Array:
        """The mean of a model's rows that are no padding."""
        with self._lock:
            if (model, name) not in self._means:
                real = np.flatnonzero(self.who[model] != PAD)
                total, step = np.zeros(width), max(1, _CHUNK // width)
                for run in np.split(real, np.flatnonzero(np.diff(real) != 1) + 1):
                    for at in range(0, len(run), step):
                        rows = np.empty((len(run[at : at + step]), width), np.float32)
                        self._fill(model, name, int(run[at]), rows)
                        total += rows.sum(0, dtype=np.float64)
                self._means[model, name] = (total / max(1, len(real))).astype(np.float32)
            return self._means[model, name]


def tokens(recipe: Recipe, sources: Mapping[str, Source]) -> Tokens | None:
    """How the models' tokens come together; None where all have the same and the recipe asks for no others.

    Raises: WrongUse where they differ and the recipe does not say what to do, or names a token or model that is not
        there; BadInput for a model without tokenizer.json or tables, and tokens that no model has a row for.
    """
    files = {name: source.text("tokenizer.json") for name, source in sources.items()}
    words = {name: vocabulary(file) for name, file in files.items()}
    if recipe.tokenizer is None:
        _alike({name: v for name, v in words.items() if v})
        return None
    if none := [name for name, v in words.items() if not v]:
        raise BadInput(f"{none[0]!r} has no tokenizer.json with a vocabulary, which {recipe.tokenizer.source!r} needs; "
                       "save its tokenizer anew with transformers' save_pretrained")  # fmt: skip
    said, base = recipe.tokenizer, (recipe.base or next(iter(recipe.models or recipe.slices[0].sources))).name
    owner = _owner(said, sources, base)
    file = files[owner] if owner in files else read_json(local(owner) / "tokenizer.json")
    if not vocabulary(file):
        raise BadInput(f"{owner!r} has no tokenizer.json with a vocabulary")
    whole = _whole(said, owner, file, files)
    out, rows = vocabulary(whole), {name: _rows(source) for name, source in sources.items()}
    size = max([*out.values(), rows.get(owner, 0) - 1]) + 1
    size = -(-size // said.multiple) * said.multiple
    if all(v == out for v in words.values()) and set(rows.values()) == {size} and not any(
            t.force for t in said.tokens.values()) and owner in sources:  # fmt: skip
        return None
    folder = sources[owner].folder if owner in sources else local(owner)
    made = Tokens(whole if whole != file else None, folder, size, sources)
    _look_up(made, said, out, words, rows, owner, base)
    return made


def _alike(words: Mapping[str, dict[str, int]]) -> None:
    """Raises: WrongUse where tokens differ: rows of embeddings would be mixed that mean different ones."""
    (first, mine), *others = words.items() or [("", {})]
    for name, theirs in others:
        if theirs != mine:
            odd = sorted({t for t, _ in set(theirs.items()) ^ set(mine.items())})
            raise WrongUse(f"{first!r} and {name!r} have different tokens, or the same at different numbers: "
                           f"{shown(odd)}; say whose to take, by tokenizer_source: base, union or a model")  # fmt: skip


def shown(words: Sequence[str]) -> str:
    """The first five of them."""
    return ", ".join(map(repr, words[:5])) + (f" and {len(words) - 5:,} more" if len(words) > 5 else "")


def _owner(said: Tokenizer, sources: Mapping[str, Source], base: str) -> str:
    """The model whose vocabulary the result's begins with."""
    if said.source in ("base", "union"):
        return base
    if said.source in sources or Path(said.source).exists() or "/" in said.source:
        return said.source
    raise WrongUse(f"tokenizer source {said.source!r} is neither base, union nor a model."
                   f"{nearest(said.source, ('base', 'union', *sources))}")  # fmt: skip


def _rows(source: Source) -> int:
    """The rows of a model's tables. Raises: BadInput where there are none, or of several sizes."""
    found = {n: e.shape[0] for n, e in source.weights.entries.items() if is_table(n)}
    if len(set(found.values())) != 1:
        what = ", ".join(f"{n!r} has {r:,}" for n, r in found.items()) or "there is none"
        raise BadInput(f"{source.name!r}: tables of embeddings with one row a token are looked for, and {what}")
    return next(iter(found.values()))


def _whole(said: Tokenizer, owner: str, file: dict[str, Any], files: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The result's tokenizer.json: the owner's, in a union with what the others have more, and the recipe's tokens.

    New tokens are numbered behind the owner's. A model's merges are appended to the owner's, which go first.
    """
    out = copy.deepcopy(file)
    model, known = out["model"], vocabulary(file)
    after = max(known.values()) + 1
    for name, other in files.items() if said.source == "union" else ():
        if other["model"].get("type") != model.get("type"):
            kinds = f"{model.get('type')} and {other['model'].get('type')}"
            raise BadInput(f"{owner!r} and {name!r} have tokenizers of two kinds, {kinds}, which have no union; take "
                           "one: tokenizer_source: base")  # fmt: skip
        added = {str(t["content"]): t for t in other.get("added_tokens") or []}
        theirs, scores = vocabulary(other), other["model"]["vocab"]
        for token in sorted(theirs, key=lambda t: theirs[t]):
            if token in known:
                continue
            known[token] = after
            if token in added:
                out.setdefault("added_tokens", []).append({**added[token], "id": after})
            elif isinstance(model["vocab"], dict):
                model["vocab"][token] = after
            elif after == len(model["vocab"]):
                model["vocab"].append(scores[theirs[token]])
            else:
                raise BadInput(f"{name!r} has the piece {token!r} more: pieces are numbered by their place, and "
                               "behind added tokens there is none; take one: tokenizer_source: base")  # fmt: skip
            after += 1
        if "merges" in model:
            have = {_pair(m) for m in model["merges"]}
            like = model["merges"][0] if model["merges"] else []
            more = [_pair(m) for m in other["model"].get("merges", ()) if _pair(m) not in have]
            model["merges"] += [" ".join(m) if isinstance(like, str) else list(m) for m in more]
    for token in said.tokens:
        if token not in known:
            known[token] = after
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            out.setdefault("added_tokens", []).append({"id": after, "content": token, **flags})
            after += 1
    return out


def _pair(merge: Any) -> tuple[str, ...]:
    return tuple(merge.split(" ") if isinstance(merge, str) else merge)


def _look_up(made: Tokens, said: Tokenizer, out: Mapping[str, int], words: Mapping[str, dict[str, int]],
             rows: Mapping[str, int], owner: str, base: str) -> None:  # fmt: skip
    """Whose row every token of every model is."""
    labels, n = list(words), made.rows
    spare = {m: np.setdiff1d(np.arange(rows[m]), list(words[m].values())) for m in labels}  # rows without a token
    free = np.ones(n, bool)
    free[list(out.values())] = False
    for m in labels:
        made.own[m] = np.full(n, -1)
        for token, j in out.items():
            if words[m].get(token, rows[m]) < rows[m]:
                made.own[m][j] = words[m][token]
    has = np.stack([made.own[m] >= 0 for m in labels])
    who, row = np.full(n, MEAN), np.zeros(n, int)  # what stands for a token that a model lacks
    single = has.sum(0) == 1
    who[single] = has.argmax(0)[single]
    if base in labels:
        who[has[labels.index(base)]] = labels.index(base)
    for i, m in enumerate(labels):
        row[who == i] = made.own[m][who == i]
    who[free] = PAD
    if owner in labels:
        at = spare[owner][spare[owner] < n]
        at = at[free[at]]
        who[at], row[at] = labels.index(owner), at
    force = _ruled(said, out, words, rows, labels, who, row)
    lost = [t for t, j in out.items() if not has[:, j].any() and who[j] == MEAN]
    if lost:
        raise BadInput(f"no model has a row for {shown(lost)}; say where it comes from in tokenizer: {{tokens: "
                       "{...: {source: ...}}}, with kind: zero for zeros")  # fmt: skip
    for i, m in enumerate(labels):
        mine = (made.own[m] >= 0) & ~force
        at = spare[m][spare[m] < n]
        at = at[free[at] & (who[at] != PAD)]
        made.who[m], made.row[m] = np.where(mine, i, who), np.where(mine, made.own[m], row)
        made.who[m][at], made.row[m][at] = i, at


def _ruled(said: Tokenizer, out: Mapping[str, int], words: Mapping[str, dict[str, int]], rows: Mapping[str, int],
           labels: list[str], who: Array, row: Array) -> Array:  # fmt: skip
    """Put in where the recipe says that tokens come from; where all models take it."""
    force = np.zeros(len(who), bool)
    for token, rule in said.tokens.items():
        j = out[token]
        force[j] = rule.force
        if rule.zero:
            who[j] = ZERO
        elif rule.model:
            who[j], row[j] = _donor(token, rule, words, rows, labels)
    return force


def _donor(token: str, rule: Token, words: Mapping[str, dict[str, int]], rows: Mapping[str, int],
           labels: list[str]) -> tuple[int, int]:  # fmt: skip
    """The model and the row that a token is given. Raises: WrongUse where there is no such model or row."""
    if rule.model not in labels:
        raise WrongUse(f"tokenizer: token {token!r} is to come from {rule.model!r}, which is no model of the recipe."
                       f"{nearest(rule.model, labels)}")  # fmt: skip
    name = rule.token or token
    number = rule.number if rule.number >= 0 else words[rule.model].get(name, -1)
    if not 0 <= number < rows[rule.model]:
        what = f"row {rule.number}" if rule.number >= 0 else f"token {name!r}"
        raise WrongUse(f"tokenizer: token {token!r} is to come from {rule.model!r}, which has no {what}")
    return labels.index(rule.model), number
