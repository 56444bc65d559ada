"""One batch: its requests looked at, put in order, and its answers written to its output and error file."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

from plures.core.errors import BadInput, DiskTrouble, PluresError, StoreBusy, disk
from plures.engine.ask import Ask, Piece
from plures.flows.asking import Feed, Line, Look, Pump, in_order
from plures.flows.batch_input import Place, read_body, read_places
from plures.flows.batches import Batch, Batches
from plures.flows.part import Part, Row
from plures.tensors.safe import file_hash

SAVE_S = 1.0
_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
_A_WHILE = 32  # requests that are looked at before another batch has its turn


class Body(Protocol):
    """A request's body, understood."""

    @property
    def model(self) -> str:
        """Who is asked."""
        ...

    def look(self, identity: str) -> Look:
        """What its place in the order goes by."""
        ...

    def asks(self, tenant: str, identity: str) -> Sequence[Ask]:
        """What the engine is asked for it. Raises: PluresError."""
        ...

    def answered(self, ref: str, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The body of the answer, as HTTP would give it."""
        ...


class Form(Protocol):
    """What the doors know of bodies."""

    def read(self, endpoint: str, body: Any) -> Body:
        """A body, validated. Raises: PluresError."""
        ...

    def failed(self, error: PluresError) -> tuple[int, dict[str, Any]]:
        """The status and the body of an error, as HTTP would give them."""
        ...


@dataclass
class By:
    """Who answers batches: what is known of bodies, what a model means to a tenant (reference and identity), and who
    hears what every answer has cost: its tenant, its reference and its last piece.
    """

    form: Form
    resolve: Callable[[str, str], tuple[str, str]]
    spent: Callable[[str, str, Piece], object] = lambda tenant, ref, last: None


class Running:
    """One batch under way, held by this process alone; `batch` as it was last written down."""

    def __init__(self, store: Batches, batch: Batch, by: By) -> None:
        """Raises: StoreBusy where another process runs it; BadInput."""
        self.store, self._by = store, by
        self.input = self.store.bytes_of(batch.tenant, batch.input)
        self.part = Part(self.store.part(batch), file_hash(self.input))
        try:  # it may have gone on elsewhere since it was read, but from now on it does not
            self.batch = self.store.kept(batch.tenant, batch.id)
        except BaseException:
            self.part.close()
            raise
        self.ids: list[str] = []
        self._saved = time.monotonic()
        self.feed = Feed(self.part, self._lines(), self._tick)

    def close(self, pump: Pump) -> None:
        """Let another server have it."""
        self.feed.stop(pump)
        with suppress(BadInput):
            self.part.close()

    def _save(self, batch: Batch) -> None:
        self.batch = replace(batch, failed=self.part.failed, completed=len(self.part.done) - self.part.failed)
        self._saved = time.monotonic()
        self.store.save(self.batch)

    def _tick(self) -> None:
        if time.monotonic() > self._saved + SAVE_S:
            self._save(self.batch)

    def _lines(self) -> Iterator[Line | None]:
        """First look at every request, then give them in the order to be asked; None after every while of work."""
        places: list[tuple[Place, Look]] = []
        for n, (place, body) in enumerate(read_places(self.input, self.batch.endpoint)):
            self.ids.append(place.id)
            look = None if place.id in self.part.done else self._look(place.id, body)
            if look is not None:
                places.append((place, look))
            if n % _A_WHILE == 0:
                yield None
        if self.batch.status == "validating":
            self._save(replace(self.batch, total=len(self.ids)).now("in_progress"))
        with disk(self.input, "read"), self.input.open("rb") as file:
            for place, _ in in_order(places, lambda pair: pair[1]):
                file.seek(place.at)
                yield self._line(place.id, read_body(file.read(place.n_bytes)))

    def _read(self, said: Any) -> tuple[Body, str, str]:
        """A body, and what its model means to this tenant until the end of the batch."""
        body = self._by.form.read(self.batch.endpoint, said)
        return body, *self.part.meant(body.model, lambda model: self._by.resolve(model, self.batch.tenant))

    def _look(self, id: str, said: Any) -> Look | None:
        """A request's place in the order; None where it was answered with its error at once."""
        try:
            body, _, identity = self._read(said)
            return body.look(identity)
        except (DiskTrouble, StoreBusy):
            raise
        except PluresError as error:
            self.part.add(self._failed(id, error))
            return None

    def _line(self, id: str, said: Any) -> Line | None:
        tenant = self.batch.tenant
        try:
            body, ref, identity = self._read(said)
            asks = body.asks(tenant, identity)
        except (DiskTrouble, StoreBusy):
            raise
        except PluresError as error:
            self.part.add(self._failed(id, error))
            return None

        def answered(pieces: Sequence[Sequence[Piece]]) -> Row:
            for one in pieces:
                self._by.spent(tenant, ref, one[-1])
            return {"id": id, "answer": _said(id, 200, body.answered(ref, pieces))}

        return Line(asks, answered, lambda error: self._failed(id, error))

    def _failed(self, id: str, error: PluresError) -> Row:
        return {"id": id, "error": _said(id, *self._by.form.failed(error))}

    def finish(self, cancelling: Batch | None) -> None:
        """Write the output and the error file, those that hold a line, in the order of the input.

        Killed on the way, it is done again: the files keep their ids. Raises: DiskTrouble.
        """
        batch, done = self.batch, self.part.done
        if cancelling is None:
            self._save(batch.now("finalizing"))
        ids = [id for id in self.ids if id in done]
        ids += done.keys() - set(ids)  # answered before, where this time not all lines were looked at
        for kind, file in (("answer", batch.output), ("error", batch.error)):
            rows = (json.loads(line) for line in self.part.lines(ids))
            lines = (_line(row[kind]) for row in rows if kind in row)
            first = next(lines, None)
            if first is not None:
                name = f"{batch.id}_{'output' if kind == 'answer' else 'error'}.jsonl"
                self.store.put(batch.tenant, name, "batch_output", chain([first], lines), file)
        if cancelling is None:
            self._save(self.batch.now("completed"))
        else:
            total = max(batch.total, len(ids))  # where not all lines were looked at
            self._save(replace(batch, times=cancelling.times, total=total).now("cancelled"))


def _said(id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """One line of an output or error file."""
    response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": id, "response": response, "error": None}


def _line(said: dict[str, Any]) -> bytes:
    """One line, also to those who split text where Unicode says that lines end."""
    return json.dumps(said, ensure_ascii=False).translate(_ENDS).encode() + b"\n"
