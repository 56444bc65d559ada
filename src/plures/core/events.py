"""What happens in a run, as events: JSON lines always, the console and others when they listen."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plures.core.errors import BadInput, disk

Sink = Callable[[str, dict[str, Any]], None]


class Events:
    """Hands every event to all sinks: `emit("step", step=3, loss=2.1)`.

    A sink is any callable `(kind, fields)`. Sinks are closed in order by `close()` where they have one.
    """

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = list(sinks)

    def emit(self, kind: str, **fields: Any) -> None:
        for sink in self.sinks:
            sink(kind, fields)

    def close(self) -> None:
        for sink in self.sinks:
            close = getattr(sink, "close", None)
            if close is not None:
                close()


class JsonLines:
    """Appends each event as one line `{"t": unix seconds, "kind": …, …}`; every line is flushed.

    A line torn by a kill is cut off when the file is opened again, so the file is always whole lines.
    Raises: DiskTrouble or BadInput where the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                data = path.read_bytes()
                whole = data.rfind(b"\n") + 1
                if whole != len(data):
                    os.truncate(path, whole)
            self._file = path.open("a", encoding="utf-8")

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        row = {"t": round(time.time(), 3), "kind": kind, **fields}
        text = json.dumps(finite(row), default=str, allow_nan=False) + "\n"
        with disk(self.path):
            self._file.write(text)
            self._file.flush()

    def close(self) -> None:
        with disk(self.path):
            self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run so far; a last line that is being written, or was torn by a kill, is left out.

    Raises: BadInput for any other line that is no JSON, text that is no UTF-8, and a file that is not there.
    """
    with disk(path, "read"):
        data = path.read_bytes()
    try:
        lines = data[: data.rfind(b"\n") + 1].decode().split("\n")[:-1]  # a torn line may end inside a character
    except UnicodeDecodeError as error:
        raise BadInput(f"{str(path)!r}: byte {error.start} is no UTF-8, so this is no file of events") from error
    out = []
    for number, line in enumerate(lines, 1):
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise BadInput(f"{str(path)!r}, line {number}: not a JSON event ({error.msg})") from error
    return out


def finite(value: Any) -> Any:
    """`value` as JSON has it: an infinite or undefined number becomes null, however deep it stands."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, Any]:
    """Versions and machine, for the record of a run."""
    from importlib.metadata import PackageNotFoundError, version

    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("plures", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {n: of(n) for n in names},
    }
