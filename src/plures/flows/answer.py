"""Answer a file of requests, each by its own variant: ordered so that what is shared is computed once, resumable.

Lines are ordered by variant, then by prompt, so that requests of one variant and with one beginning stand together (the
prefix tree of BatchLLM, arXiv:2412.03594, walked depth first); variants whose answers are long against their prompts go
first, so that their decoding runs beside the prompts of the others. Answers are appended to `<out>.part` as they end;
when all are there, they are written to `out` in the order of the requests. A run that was killed goes on from the part.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter, ValidationError

from plures.core.errors import BadInput, PluresError, StoreBusy, WrongUse, disk, nearest
from plures.engine.admit import Admission
from plures.engine.ask import BASE, Ask, Overloaded, Piece, Prompt, Sampling, Serving, Unavailable
from plures.engine.limits import Settings
from plures.engine.model import load_base
from plures.engine.packed import FOLDER
from plures.engine.serving import Engine
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
    new, old = dict[str, int](), dict[str, int]()
    for _, ask in asks:
        new[ask.variant] = new.get(ask.variant, 0) + ask.how.max_tokens
        old[ask.variant] = old.get(ask.variant, 0) + len(ask.tokens)

    def key(pair: tuple[Request, Ask]) -> tuple[float, str, tuple[int, ...], int]:
        request, ask = pair
        return -new[ask.variant] / max(1, old[ask.variant]), ask.variant, ask.tokens, request.at

    return sorted(asks, key=key)


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
    with _part(out.with_name(out.name + ".part"), requests) as part:
        asks = _asks(serving, part, [r for r in wanted if r.id not in part.done], resolve)
        before = len(part.done)
        _run(serving, part, order(asks), window, lambda: told(len(part.done), len(wanted)))
        done = [part.done[r.id] for r in wanted]
        safe.write_bytes(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done).encode())
    part.path.unlink()
    return Answered(len(wanted), before, len(wanted) - before, sum("error" in row for row in done))


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


class _Part:
    """The file of answers so far: a head that says of what, then one answer a line."""

    def __init__(self, path: Path, file: IO[bytes], head: dict[str, Any], done: dict[str, Any]) -> None:
        self.path, self.file, self.head, self.done = path, file, head, done

    def write(self, row: dict[str, Any]) -> None:
        """Append one line, in the file before this returns (a kill loses nothing that was written)."""
        with disk(self.path):
            self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self.file.flush()

    def add(self, row: dict[str, Any]) -> None:
        """Note an answer."""
        self.write(row)
        self.done[row["id"]] = row


@contextmanager
def _part(path: Path, requests: Path) -> Iterator[_Part]:
    """Open or begin the part, held for this process alone; a torn last line is cut off."""
    import fcntl

    digest = hashlib.sha256(requests.read_bytes()).hexdigest()
    with disk(path), path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreBusy(f"another process answers into {str(path)!r}; wait for it, or name another file") from error
        file.seek(0)
        whole = file.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        file.truncate(len(whole))
        rows = [json.loads(line) for line in whole.splitlines()]
        head: dict[str, Any] = rows[0] if rows else {"requests": digest, "variants": {}}
        if head.get("requests") != digest:
            raise BadInput(f"{str(path)!r} holds answers to other requests; restore them, or remove it to begin anew")
        part = _Part(path, file, head, {})
        if not rows:
            part.write(head)
        for row in rows[1:]:
            if "variants" in row:
                head["variants"] |= row["variants"]
            else:
                part.done[row["id"]] = row
        yield part


def _asks(serving: Serving, part: _Part, wanted: Sequence[Request], resolve: Resolve) -> list[tuple[Request, Ask]]:
    """What to ask the engine; requests that cannot be put are answered with their error at once.

    A reference means, to the end of the file, what it meant when the run began: an alias that moves changes nothing.
    """
    known: dict[str, list[str]] = part.head["variants"]
    asks = []
    for request in wanted:
        try:
            if request.model not in known:
                known[request.model] = list(resolve(request.model))
                part.write({"variants": {request.model: known[request.model]}})
            tokens = tuple(serving.encode(request.prompt))
        except PluresError as error:
            part.add({"id": request.id, "model": request.model, "error": str(error)})
            continue
        asks.append((request, Ask("batch", known[request.model][1] or BASE, tokens, request.how)))
    return asks


def _run(
    serving: Serving, part: _Part, asks: Sequence[tuple[Request, Ask]], window: int, tick: Callable[[], None]
) -> None:
    """Ask in order, `window` at a time, and write each answer as it ends."""
    room, ready = threading.Semaphore(window), threading.Condition()
    ended: list[tuple[Request, Ask, list[Piece]]] = []

    def deliver_to(request: Request, ask: Ask) -> Callable[[Piece], None]:
        pieces: list[Piece] = []

        def deliver(piece: Piece) -> None:
            pieces.append(piece)
            if piece.finish:
                with ready:
                    ended.append((request, ask, pieces))
                    ready.notify()
                room.release()

        return deliver

    def write_ended(block: bool) -> int:
        with ready:
            if block and not ended:
                ready.wait(1.0)
            batch = ended[:]
            ended.clear()
        for request, ask, pieces in batch:
            part.add(_row(request, ask, pieces, part.head["variants"]))
            tick()
        return len(batch)

    left = 0
    for request, ask in asks:
        while not room.acquire(timeout=0.1):
            left -= write_ended(block=True)
        while True:
            try:
                serving.submit(ask, deliver_to(request, ask))
            except Overloaded as error:
                if not serving.alive:
                    raise BadInput(f"the engine stopped: {error}; run this again to go on") from error
                left -= write_ended(block=True)
                continue
            except PluresError as error:
                part.add({"id": request.id, "model": request.model, "error": str(error)})
                room.release()
                break
            left += 1
            break
        left -= write_ended(block=False)
    while left:
        left -= write_ended(block=True)


def _row(request: Request, ask: Ask, pieces: Sequence[Piece], variants: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """One answer as it is written."""
    last = pieces[-1]
    row: dict[str, Any] = {"id": request.id, "model": variants[request.model][0], "identity": ask.variant}
    if last.finish in ("error", "cancelled"):
        return row | {"error": last.error or "cancelled"}
    row |= {"text": "".join(p.text for p in pieces), "finish": last.finish}
    tokens = [t for p in pieces for t in p.tokens]
    if tokens:
        row["logprobs"] = [
            {"token": t.text, "logprob": t.logprob, "top": [[text, p] for _, text, p in t.top]} for t in tokens
        ]
    return row | {"usage": {"prompt": last.n_prompt, "cached": last.n_cached, "new": last.n_new}}
