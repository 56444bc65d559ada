"""Rows of text from files, folders, the Hub or memory, checked one by one; a bad row is an error, never skipped."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

from plures.core.errors import BadInput, Unreachable, WrongUse, disk, missing, nearest
from plures.core.seeds import stream

Format = Literal["text", "prompt+completion", "messages", "pairs"]
FORMATS: dict[Format, tuple[str, ...]] = {
    "text": ("text",),
    "prompt+completion": ("prompt", "completion"),
    "messages": ("messages",),
    "pairs": ("prompt", "chosen", "rejected"),
}
SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^:\s]+){0,2}")
Placed = tuple[str, Any]  # where a row stands ("data.jsonl, line 3"), and the row


@dataclass(frozen=True, eq=False)
class Rows(Sequence[dict[str, Any]]):
    """A sequence of rows of one format; `places[i]` says where row i stands, for messages. A slice is Rows too."""

    items: tuple[dict[str, Any], ...]
    format: Format
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, at: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> Rows: ...
    def __getitem__(self, at: int | slice) -> dict[str, Any] | Rows:
        if isinstance(at, slice):
            return Rows(self.items[at], self.format, self.places[at])
        return self.items[at]

    def take(self, indices: Iterable[int]) -> Rows:
        """The rows at `indices`, in that order."""
        chosen = list(indices)
        return Rows(tuple(self.items[i] for i in chosen), self.format, tuple(self.places[i] for i in chosen))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of all rows in their order, in hex; where they were read from is no part."""
        digest = hashlib.sha256()
        for row in self.items:
            digest.update(canonical(row).encode() + b"\n")
        return digest.hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys, no spaces and ASCII only; what JSON has no word for (dates, bytes) as its `repr`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=repr)


def read_rows(source: Any, *, columns: Mapping[str, str] | None = None, limit: int | None = None) -> Rows:
    """The rows of `source`, all of one format, each checked.

    Args:
        source: a .jsonl or .json file (one object a line), .parquet or .txt (one document, one row); a folder (all
            such files in it, at any depth, in sorted order); a list of these; an iterable of dicts; or, where no such
            path exists, a dataset of the Hub as `name`, `name:split` or `name:config:split` (split "train" if none).
        columns: our name to the user's, `{"text": "body"}`; naming a column also settles which format is meant.
        limit: read no more rows than this.

    Formats: `text` (str), `prompt` + `completion` (both str, or both lists of messages), `messages` (a list of
    `{"role", "content"}`), `prompt` + `chosen` + `rejected` (all str, or all lists of messages; the answers do not
    repeat the prompt). Other columns are kept as they are.
    Raises: BadInput, naming file and line, for anything that is not such a row; Unreachable where the Hub does not
        answer; MissingExtra; WrongUse for a request that cannot be meant.
    """
    if limit is not None and limit < 1:
        raise WrongUse(f"limit must be at least 1 row, got '{limit}'")
    columns = dict(columns or {})
    items, places = [], []
    found: Format | None = None
    for place, row in _placed(source):
        clean = _renamed(row, columns, place)
        kind = _format(clean, columns, place, found)
        if found is not None and kind != found:
            raise BadInput(f"{place}: a row of format {kind!r} among rows of {found!r}; keep one format in a source")
        found = kind
        _check(clean, kind, place)
        items.append(clean)
        places.append(place)
        if len(items) == limit:
            break
    if found is None:
        raise BadInput(f"{_name(source)} has no rows; a source needs at least one")
    if found == "text" and not any(row["text"].strip() for row in items):
        raise BadInput(f"{_name(source)} has only blank text in its {len(items)} rows")
    return Rows(tuple(items), found, tuple(places))


def split_rows(rows: Rows, held_out_share: float, seed: int) -> tuple[Rows, Rows]:
    """The rows to train on and the rows held out, each row by a hash of its text.

    A row's side depends on `seed` and its own content alone: adding rows moves no other, and equal rows stand on one
    side, so that a duplicate cannot leak. The share is therefore met only on average.

    The held-out side of few rows can be empty.

    Raises: WrongUse for a share outside [0, 1), or one so large for these rows that none is left to train on.
    """
    if not 0 <= held_out_share < 1:
        raise WrongUse(f"the held-out share must be in [0, 1), got '{held_out_share}'; 0.05 holds out one in twenty")
    sides: tuple[list[int], list[int]] = ([], [])
    for i, text in enumerate(_said(rows)):
        sides[stream(seed, "data", "held_out", text) < held_out_share * 2**63].append(i)
    if not sides[0]:
        raise WrongUse(f"a held-out share of '{held_out_share}' of {len(rows)} rows leaves none to train on; "
                       "lower it, choose another seed, or give more rows")  # fmt: skip
    return rows.take(sides[0]), rows.take(sides[1])


def on_both_sides(rows: Iterable[Rows], held: Iterable[Rows]) -> int:
    """How many rows of `held` say exactly what one of `rows` says; columns beside those of the format do not count."""

    def marks(parts: Iterable[Rows]) -> Iterator[bytes]:
        return (hashlib.sha256(text.encode()).digest() for part in parts for text in _said(part))

    times = Counter(marks(held))
    return sum(times.pop(mark, 0) for mark in marks(rows))


def _said(rows: Rows) -> Iterator[str]:
    """What each row says, as canonical JSON."""
    return (canonical([row[c] for c in FORMATS[rows.format]]) for row in rows)


def _name(source: Any) -> str:
    return repr(str(source)) if isinstance(source, str | Path) else "the list of rows"


def _placed(source: Any) -> Iterator[Placed]:
    """Every raw row of a source with its place."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            yield from _folder(path)
        elif path.exists() or isinstance(source, Path) or not may_be_hub(source):
            yield from _file(path)
        else:
            yield from _hub(source)
        return
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        said = type(source).__name__
        raise WrongUse(f"rows come from a path, a list of paths, a dataset's name or a list of dicts, got {said!r}")
    for i, item in enumerate(source, 1):
        if isinstance(item, str | Path):
            yield from _placed(item)
        else:
            yield f"row {i}", item


def may_be_hub(name: str) -> bool:
    """Whether a name that is no local path can be a dataset's: not where it looks like a file's."""
    files = (*SUFFIXES, ".csv", ".tsv", ".gz", ".zst", ".zip", ".arrow")
    return bool(_HUB.fullmatch(name)) and Path(name).suffix not in files


def _folder(path: Path) -> Iterator[Placed]:
    inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    files = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not files:
        raise BadInput(f"the folder {str(path)!r} holds no rows; it needs files that end in {', '.join(SUFFIXES)}")
    for file in files:
        yield from _file(file)


def _file(path: Path) -> Iterator[Placed]:
    readers = {".jsonl": _json_lines, ".json": _json_lines, ".parquet": _parquet, ".txt": _text}
    if path.suffix not in readers:
        if not path.exists():
            raise BadInput(f"cannot read {str(path)!r}: it does not exist")
        near = nearest(path.suffix, SUFFIXES)
        raise BadInput(f"{str(path)!r} ends in {path.suffix!r}; allowed are {', '.join(SUFFIXES)}.{near}")
    return readers[path.suffix](path)


def _decoded(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{place}: not UTF-8 text (byte {raw[error.start]:#04x}); save the file as UTF-8") from error


def _json_lines(path: Path) -> Iterator[Placed]:
    """Blank lines are no rows. Lines end with LF only: JSON text may hold other separators."""
    some = False
    with disk(path, "read"), path.open("rb") as file:
        for i, raw in enumerate(file, 1):
            if raw.strip():
                some = True
                yield f"{path}, line {i}", _object(_decoded(raw, f"{path}, line {i}"), f"{path}, line {i}")
    if not some:
        raise BadInput(f"{str(path)!r} is empty; it needs one JSON object a line")


def _object(text: str, place: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(out := dict(pairs)) != len(pairs):
            twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
            raise BadInput(f"{place}: the key {twice!r} is there twice")
        return out

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        array = text.lstrip().startswith("[")
        hint = "one object a line is needed" + (", not one array over many lines: jq -c '.[]'" if array else "")
        raise BadInput(f"{place}: not JSON ({error}): {text.strip()[:40]!r}; {hint}") from error


def _parquet(path: Path) -> Iterator[Placed]:
    with disk(path, "read"), path.open("rb"):
        pass
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing("pyarrow", "data", "reading parquet") from error
    i = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    i += 1
                    yield f"{path}, row {i}", row
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).splitlines()[0][:120]
        raise BadInput(f"{str(path)!r} is not a whole parquet file, after row {i}: {said}; fetch it again") from error
    if not i:
        raise BadInput(f"{str(path)!r} is empty: a parquet file without rows")


def _text(path: Path) -> Iterator[Placed]:
    with disk(path, "read"):
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found = f"{raw[error.start]:#04x}"
        raise BadInput(f"{path}, line {line}: not UTF-8 text (byte {found}); save the file as UTF-8") from error
    if not text.strip():
        raise BadInput(f"{str(path)!r} is empty or only blank text")
    yield f"{path}, line 1", {"text": text}


def from_hub(source: str) -> Any:
    """A dataset of the Hub, `name`, `name:split` or `name:config:split` (split "train" if none).

    Raises: MissingExtra; WrongUse for a split that is not there; Unreachable where the Hub does not give it.
    """
    name, *rest = source.split(":")
    split = rest[-1] if rest else None
    try:
        import datasets
    except ImportError as error:
        raise missing("datasets", "data", f"{source!r} is no local path, and reading it from the Hub") from error
    try:
        loaded = datasets.load_dataset(name, rest[0] if len(rest) == 2 else None, split=split)
    except ValueError as error:  # an unknown split or configuration: the Hub answered
        said = " ".join(str(error).split())[:200]
        raise WrongUse(f"dataset {source!r}: {said} Write it as name:split or name:config:split") from error
    except Exception as error:  # offline, absent, forbidden, throttled: each layer below has its own kinds
        said = " ".join(str(error).split())[:200]
        raise Unreachable(
            f"{source!r} is no local path, and the Hub gave no such dataset ({type(error).__name__}: {said}); "
            "check the name and the network, or give a local file"
        ) from error
    if isinstance(loaded, Mapping):
        if "train" not in loaded and len(loaded) != 1:
            raise WrongUse(f"dataset {source!r} has the splits {_list(loaded)}; choose one as '{name}:split'")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return loaded


def _hub(source: str) -> Iterator[Placed]:
    for i, row in enumerate(from_hub(source), 1):
        yield f"{source}, row {i}", row


def _renamed(row: Any, columns: Mapping[str, str], place: str) -> dict[str, Any]:
    """The row as a new dict under our column names."""
    if not isinstance(row, Mapping):
        hint = "; did you mean {'text': …}?" if isinstance(row, str) else ""
        raise BadInput(f"{place}: a row must be an object with columns, got {str(row)[:40]!r}{hint}")
    for ours, theirs in columns.items():
        if theirs not in row:
            raise BadInput(f"{place}: there is no column {theirs!r}, which columns maps to {ours!r}."
                           f"{nearest(theirs, map(str, row))} There are: {_list(row)}")  # fmt: skip
    taken = set(columns.values()) - set(columns)
    kept = {str(k): v for k, v in row.items() if k not in taken}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def _list(names: Iterable[Any]) -> str:
    return ", ".join(repr(str(n)) for n in names) or "none"


def _format(row: Mapping[str, Any], columns: Mapping[str, str], place: str, before: Format | None) -> Format:
    """The format whose columns the row has; where several fit, the one that `columns` names."""
    fit = [f for f, needs in FORMATS.items() if all(c in row for c in needs)]
    if len(fit) > 1:
        fit = [f for f in fit if any(c in columns for c in FORMATS[f])] or fit
    if len(fit) == 1:
        return fit[0]
    if len(fit) > 1:
        first = FORMATS[fit[0]][0]
        raise BadInput(f"{place}: has the columns of {len(fit)} formats, {_list(fit)}; say which is meant, for example "
                       f"columns={{{first!r}: {first!r}}}")  # fmt: skip
    of_pairs = FORMATS["pairs"] if "chosen" in row or "rejected" in row else FORMATS["prompt+completion"]
    half = [c for c in of_pairs if c not in row]
    wanted = FORMATS[before] if before else tuple(half) if len(half) < len(of_pairs) else ("text",)
    absent = next(c for c in wanted if c not in row)
    other = next((str(k) for k in row if nearest(k, [absent])), next(map(str, row), "body"))
    names = [c for needs in FORMATS.values() for c in needs]
    near = nearest(absent, map(str, row)) or next((n for k in row if (n := nearest(k, names))), "")
    raise BadInput(
        f"{place}: the column {absent!r} is missing.{near} There are: {_list(row)}. Formats need 'text', or 'prompt' "
        "and 'completion', or 'messages', or 'prompt', 'chosen' and 'rejected'; map yours with "
        f"columns={{{absent!r}: {other!r}}}"
    )


def _check(row: Mapping[str, Any], kind: Format, place: str) -> None:
    """Every column of the format has its type. Raises: BadInput."""
    if kind == "text":
        _check_text(row["text"], "text", place)
        return
    if kind == "messages":
        _check_messages(row["messages"], "messages", place, answered=True)
        return
    for answer in FORMATS[kind][1:]:
        _check_answer(row["prompt"], row[answer], answer, place)


def _check_answer(prompt: Any, answer: Any, name: str, place: str) -> None:
    """A prompt and an answer are both texts, or both messages. Raises: BadInput."""
    if isinstance(prompt, list) and isinstance(answer, list):
        _check_messages(prompt, "prompt", place)
        _check_messages(answer, name, place, answered=True)
        return
    if isinstance(prompt, list) != isinstance(answer, list) and isinstance(prompt, str | list):
        raise BadInput(f"{place}: prompt is {_kind(prompt)} and {name} is {_kind(answer)}; both must be text, "
                       "or both lists of messages")  # fmt: skip
    _check_text(prompt, "prompt", place)
    _check_text(answer, name, place)


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else repr(value)[:40]


def _check_text(value: Any, name: str, place: str) -> None:
    if not isinstance(value, str):
        shown = "null" if value is None else str(value)[:40]
        raise BadInput(f"{place}: {name} must be text, got {shown!r} ({type(value).__name__})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise BadInput(f"{place}: {name} holds half a character ({half!r}), which UTF-8 cannot say") from error


def _check_messages(value: Any, name: str, place: str, answered: bool = False) -> None:
    if not isinstance(value, list) or not value:
        raise BadInput(f"{place}: {name} must be a list of at least one {{'role', 'content'}}, got {str(value)[:40]!r}")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise BadInput(f"{place}: {name}[{i}] must be an object of 'role' and 'content', got {str(message)[:60]!r}")
        _check_text(message["role"], f"{name}[{i}].role", place)
        _check_text(message["content"], f"{name}[{i}].content", place)
    roles = [m["role"] for m in value]
    if answered and "assistant" not in roles:
        raise BadInput(f"{place}: {name} has no turn of the role 'assistant', nothing to learn; roles: {_list(roles)}")
