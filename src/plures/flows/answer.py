"""Answer a file of requests, each by its own variant: ordered so that what is shared is computed once, resumable.

How they are asked, and in what order: `flows.asking`. Answers are appended to `<out>.part` as they end; when all are
there, they are written to `out` in the order of the requests. A run that was killed goes on from the part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from plures.core.errors import BadInput, DiskTrouble, PluresError, WrongUse, disk, nearest
from plures.engine.admit import Admission
from plures.engine.ask import BASE, Ask, Piece, Prompt, Sampling, Serving, Unavailable
from plures.engine.limits import Settings
from plures.engine.model import load_base
from plures.engine.packed import FOLDER
from plures.engine.serving import Engine
from plures.flows.asking import Feed, Line, Look, ask_all, in_order
from plures.flows.part import Part, Row
from plures.store import Store
from plures.tensors import safe
from plures.tensors.variant import Variant

_SAMPLING = TypeAdapter(Sampling)
_HOW = tuple(f.name for f in fields(Sampling))
_KEYS = ("id", "model", "prompt", "messages", *_HOW)
Resolve = Callable[[str], tuple[str, str]]
"""A reference to (`name@3`, identity); "base" to ("base", "")."""


@dataclass(frozen=True)
class Request:
    """One line: who is asked, what, and how; `at` is its place in the file."""

    at: int
    id: str
    model: str
    prompt: Prompt
    how: Sampling


@dataclass(frozen=True)
class Answered:
    """What a run did: requests in the file, answered before, answered now, and how many of all failed."""

    total: int
    before: int
    now: int
    failed: int


def read_requests(path: Path) -> list[Request]:
    """The requests of a JSONL file: `model`, `prompt` or `messages`, and optionally `id` and how to sample.

    Raises: BadInput naming the file and line for malformed JSON, an unknown key, a wrong value, or an id used twice.
    """
    found: list[Request] = []
    ids: dict[str, int] = {}
    with disk(path, "read"):
        lines = path.read_text(encoding="utf-8").splitlines()
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        request = _request(line, len(found), f"{str(path)!r} line {n}")
        if request.id in ids:
            raise BadInput(f"{str(path)!r} line {n}: id {request.id!r} is that of line {ids[request.id]} too")
        ids[request.id] = n
        found.append(request)
    if not found:
        raise BadInput(f"{str(path)!r} holds no requests")
    return found


def _request(line: str, at: int, where: str) -> Request:
    try:
        said = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise BadInput(f"{where} must be an object, got {type(said).__name__}")
    for key in said:
        if key not in _KEYS:
            raise BadInput(f"{where}: unknown key {key!r}.{nearest(key, _KEYS)} Allowed: {', '.join(_KEYS)}")
    prompt = said.get("prompt", said.get("messages"))
    if ("prompt" in said) == ("messages" in said) or not isinstance(prompt, str if "prompt" in said else list):
        raise BadInput(f"{where} needs either 'prompt' (a text) or 'messages' (a list)")
    if not isinstance(said.get("model", "base"), str) or not isinstance(said.get("id", ""), (str, int)):
        raise BadInput(f"{where}: 'model' must be a text like 'support@prod', 'id' a text or a whole number")
    how = json.dumps({k: v for k, v in said.items() if k in _HOW})
    try:
        sampling = _SAMPLING.validate_json(how, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"{where}: {'.'.join(map(str, first['loc']))} {first['msg']}, got {first['input']!r}") from error
    except WrongUse as error:
        raise BadInput(f"{where}: {error}") from error
    return Request(at, str(said.get("id", at)), said.get("model", "base"), prompt, sampling)


def order(asks: Sequence[tuple[Request, Ask]]) -> list[tuple[Request, Ask]]:
    """Requests as they should be asked: by variant, the longest answers against prompts first, then by prompt."""
    return in_order(asks, lambda p: Look(p[1].variant, p[1].how.max_tokens, len(p[1].tokens), p[1].tokens))


def answer(serving: Serving, requests: Path, out: Path, resolve: Resolve, *, window: int = 128,
           told: Callable[[int, int], None] = lambda done, total: None) -> Answered:  # fmt: skip
    """Answer every request of a file exactly once, into `out`; a run that was cut short goes on.

    `window` is how many requests are with the engine at once. A request that cannot be answered (an unknown variant, a
    prompt too long) is answered with its error; the others go on.
    Raises: BadInput for a malformed file, or a part that belongs to other requests; StoreBusy while another process
        works on the same file; WrongUse where `out` is there already.
    """
    if out.exists():
        raise WrongUse(f"{str(out)!r} exists; name another file, or remove it")
    wanted = read_requests(requests)
    with Part(out.with_name(out.name + ".part"), safe.file_hash(requests)) as part:
        asks = _asks(serving, part, [r for r in wanted if r.id not in part.done], resolve)
        before = len(part.done)
        lines = (_line(request, ask, part) for request, ask in order(asks))
        ask_all(serving, Feed(part, lines, lambda: told(len(part.done), len(wanted))), window)
        safe.write_chunks(out, part.lines(r.id for r in wanted))
        part.path.unlink(missing_ok=True)  # before another process may have it
    return Answered(len(wanted), before, len(wanted) - before, part.failed)


def answer_fleet(
    fleet: Path, requests: Path, out: Path, settings: Settings = Settings(),
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Answered:  # fmt: skip
    """`answer` with an engine of its own over a fleet; a malformed file is told before the base is loaded."""
    read_requests(requests)
    with Store.open(fleet) as store:

        def resolve(ref: str) -> tuple[str, str]:
            if ref == "base":
                return ref, BASE
            version = store.resolve(ref)
            return version.ref, version.identity

        def fetch(identity: str) -> Variant:
            try:
                return store.load_identity(identity)
            except BadInput as error:
                raise Unavailable(str(error)) from error

        # the order of the file's tree is the order wanted: nobody else waits
        patient = Admission(max_waiting=1 << 20, max_waiting_tokens=1 << 40, horizon=1e9, horizon_s=1e9)
        engine = Engine(load_base(store.base), fetch, settings, admission=patient, folder=fleet / FOLDER)
        engine.start()
        try:
            return answer(engine, requests, out, resolve, told=told)
        finally:
            engine.stop(0)


def _asks(serving: Serving, part: Part, wanted: Sequence[Request], resolve: Resolve) -> list[tuple[Request, Ask]]:
    """What to ask the engine; requests that cannot be put are answered with their error at once.

    A reference means, to the end of the file, what it meant when the run began: an alias that moves changes nothing.
    """
    asks = []
    for request in wanted:
        try:
            identity = part.meant(request.model, resolve)[1]
            tokens = tuple(serving.encode(request.prompt))
        except DiskTrouble:
            raise
        except PluresError as error:
            part.add({"id": request.id, "model": request.model, "error": str(error)})
            continue
        asks.append((request, Ask("batch", identity or BASE, tokens, request.how)))
    return asks


def _line(request: Request, ask: Ask, part: Part) -> Line:
    """One request, and how its answer is written."""
    row: Row = {"id": request.id, "model": part.head["variants"][request.model][0], "identity": ask.variant}

    def answered(all_pieces: Sequence[Sequence[Piece]]) -> Row:
        (pieces,) = all_pieces
        last, said = pieces[-1], row | {"text": "".join(p.text for p in pieces), "finish": pieces[-1].finish}
        tokens = [t for p in pieces for t in p.tokens]
        if tokens:
            said["logprobs"] = [
                {"token": t.text, "logprob": t.logprob, "top": [[text, p] for _, text, p in t.top]} for t in tokens
            ]
        return said | {"usage": {"prompt": last.n_prompt, "cached": last.n_cached, "new": last.n_new}}

    return Line((ask,), answered, lambda error: row | {"error": str(error)})
