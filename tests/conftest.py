"""A tiny base made here, rows for it, fleets of it; no network, one thread."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny import METHODS, NOUNS, QUICK, make_base, sentences, write_rows

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


class NetworkUsed(OSError):
    """A test touched the network."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network beyond this machine's loopback, and no fleet from the environment."""
    connect, bind, known = socket.socket.connect, socket.socket.bind, socket.getaddrinfo
    loopback = ("127.0.0.1", "::1", "localhost")

    def guard(real: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(self: socket.socket, *args: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and args[0][0] not in loopback:
                raise NetworkUsed(f"a test may not use the network: {args}")
            return real(self, *args)

        return guarded

    def resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host in loopback:
            return known(host, *args, **kwargs)
        raise NetworkUsed(f"a test may not use the network: {host}")

    monkeypatch.setattr(socket.socket, "connect", guard(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex))
    monkeypatch.setattr(socket.socket, "bind", guard(bind))
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("PLURES_FLEET", "PLURES_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that; tests send it and mean it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base. Copy it before changing it."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def text_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short texts as JSON lines."""
    return write_rows(tmp_path_factory.mktemp("rows") / "text.jsonl", ({"text": t} for t in sentences(60, 1)))


@pytest.fixture(scope="session")
def answer_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty prompts with completions as JSON lines."""
    rows = ({"prompt": f"{t} Why?", "completion": f" Because of the {NOUNS[i % 10]}."}
            for i, t in enumerate(sentences(30, 2)))  # fmt: skip
    return write_rows(tmp_path_factory.mktemp("rows") / "answers.jsonl", rows)


@pytest.fixture
def make_fleet(tmp_path: Path, base_folder: Path) -> Callable[..., Path]:
    """Makes empty fleets of the tiny base, or of another."""

    def make(name: str = "acme.fleet", base: Path | None = None) -> Path:
        from plures.engine.model import reference
        from plures.store import Store

        Store.create(tmp_path / name, reference(str(base or base_folder))).close()
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def trained_fleet(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, text_rows: Path) -> Path:
    """A fleet with one short-trained variant of every method, named after it. To look at: `own_fleet` is a copy."""
    import plures

    path = tmp_path_factory.mktemp("trained") / "acme.fleet"
    with plures.Fleet(path, base=str(base_folder)) as fleet:
        for method, settings in METHODS.items():
            fleet.train(method, text_rows, method=method, **QUICK, **settings)
    return path


@pytest.fixture
def own_fleet(tmp_path: Path, trained_fleet: Path) -> Path:
    """A copy of the trained fleet."""
    return Path(shutil.copytree(trained_fleet, tmp_path / "acme.fleet"))
