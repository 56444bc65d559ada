"""The input of a batch: a JSONL file of requests, each with a `custom_id`, a `method`, a `url` and a `body`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from plures.core.errors import BadInput, disk
from plures.store.names import shown

MOST_LINES, MOST_LINE_BYTES, MOST_ID, MOST_ERRORS = 50_000, 8 << 20, 512, 100


class Malformed(BadInput):
    """A file that is no input of a batch; `errors` are {"code", "message", "line"}, one for each wrong line."""

    def __init__(self, errors: Sequence[Mapping[str, Any]]) -> None:
        self.errors = tuple(errors)
        super().__init__(f"{len(self.errors)} wrong lines, the first: {self.errors[0]['message']}")


class _Wrong(Exception):
    """A wrong line; after a `last` one the rest of the file is not looked at."""

    def __init__(self, code: str, message: str, last: bool = False) -> None:
        self.code, self.last = code, last
        super().__init__(message)


@dataclass(frozen=True)
class Place:
    """Where a request is in its file."""

    id: str
    at: int
    n_bytes: int


def read_places(path: Path, endpoint: str) -> Iterator[tuple[Place, Any]]:
    """Every request's place and body, as long as no line is wrong; a body may be anything.

    Raises: Malformed at the end of a file with wrong lines; BadInput where it cannot be read.
    """
    seen: dict[str, int] = {}
    wrong: list[dict[str, Any]] = []
    with disk(path, "read"), path.open("rb") as file:
        end = 0
        for n, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES + 1), b""), 1):
            at, end = end, end + len(line)
            if not line.strip():
                continue
            try:
                id, body = _read(line, endpoint, seen)
            except _Wrong as error:
                wrong.append({"code": error.code, "message": str(error), "line": n})
                if error.last or len(wrong) == MOST_ERRORS:
                    break
                continue
            seen[id] = n
            if not wrong:
                yield Place(id, at, len(line)), body
    if not seen and not wrong:
        wrong.append({"code": "empty_file", "message": "the file holds no requests", "line": None})
    if wrong:
        raise Malformed(wrong)


def read_body(line: bytes) -> Any:
    """The body of a line that `read_places` has passed."""
    return from_json(line)["body"]


def _read(line: bytes, endpoint: str, seen: Mapping[str, int]) -> tuple[str, Any]:
    if len(line) > MOST_LINE_BYTES:
        raise _Wrong("line_too_long", f"a line has at most {MOST_LINE_BYTES} bytes", last=True)
    if len(seen) == MOST_LINES:
        raise _Wrong("too_many_requests", f"a batch has at most {MOST_LINES} requests; make several", last=True)
    try:
        said = from_json(line, allow_inf_nan=False)
    except ValueError as error:
        raise _Wrong("invalid_json_line", f"this line is not JSON: {str(error)[:200]}") from error
    if not isinstance(said, dict):
        raise _Wrong("invalid_json_line", f"this line must be an object, got {type(said).__name__}")
    id = said.get("custom_id")
    if not isinstance(id, str) or not 0 < len(id) <= MOST_ID:
        code = "invalid_custom_id" if "custom_id" in said else "missing_required_parameter"
        raise _Wrong(code, f"custom_id must be a text of 1 to {MOST_ID} characters, got {shown(id)}")
    if id in seen:
        raise _Wrong("duplicate_custom_id", f"custom_id {shown(id)} is that of line {seen[id]} too")
    if said.get("method") != "POST":
        raise _Wrong("invalid_method", f"method must be 'POST', got {shown(said.get('method'))}")
    if said.get("url") != endpoint:
        raise _Wrong("invalid_url", f"url must be the batch's endpoint {endpoint!r}, got {shown(said.get('url'))}")
    if "body" not in said:
        raise _Wrong("missing_required_parameter", "this line has no body")
    return id, said["body"]
