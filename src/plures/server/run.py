"""Serve a fleet: the engine, the public API and the administration, from start to a graceful stop."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from plures.core.errors import BadInput, WrongUse
from plures.engine.limits import Settings
from plures.engine.model import load_base
from plures.engine.packed import FOLDER
from plures.engine.schedule import Share
from plures.engine.serving import Engine
from plures.flows.desk import Desk
from plures.server.admin import make_admin
from plures.server.app import make_app
from plures.store.access import Tenant

REFRESH_S = 1.0


class Server(uvicorn.Server):
    """Uvicorn in a thread: the process's signals are not its affair."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Service:
    """One fleet, served: `with Service("acme.fleet", port=0) as service: … service.url …`.

    Options:
        host, port: where the public API listens; port 0 takes a free one.
        admin_port: where the administration listens (0: a free one; None: nowhere).
        open: no keys; everybody who reaches the port sees every variant. Only for one's own machine.
    Raises: WrongUse where `open` is asked for beyond the loopback; BadInput where a port is taken.
    """

    def __init__(
        self, fleet: str | Path, settings: Settings = Settings(), *, host: str = "127.0.0.1", port: int = 8000,
        admin_port: int | None = None, open: bool = False,
    ) -> None:  # fmt: skip
        if open and host not in ("127.0.0.1", "::1", "localhost"):
            raise WrongUse(f"open serving (no keys) on {host!r} would answer everybody; serve with keys: plures key")
        self.desk = Desk(Path(fleet))
        self._servers: list[tuple[Server, socket.socket]] = []
        try:
            base = load_base(self.desk.store.base)
            self._tenants: dict[str, Tenant] = {}
            self._pins: frozenset[str] = frozenset()
            self._known: frozenset[str] = frozenset()
            folder = Path(fleet) / FOLDER
            self.engine = Engine(base, self.desk.load, settings, share_of=self._share_of, folder=folder)
            self.app = make_app(self.desk, self.engine, open=open)
            self._servers.append(_listen(self.app, host, port))
            if admin_port is not None:
                self._servers.append(_listen(make_admin(self.desk, self.engine), host, admin_port))
        except BaseException:
            for _, taken in self._servers:
                taken.close()
            self.desk.close()
            raise
        self._host = f"[{host}]" if ":" in host else host
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()

    def _share_of(self, name: str) -> Share:
        tenant = self._tenants.get(name)
        if tenant is None:
            return Share()
        return Share(tenant.weight, tenant.concurrency, tenant.rate, tenant.tokens_per_minute)

    @property
    def url(self) -> str:
        """Where the public API is."""
        return f"http://{self._host}:{self._port(0)}"

    @property
    def admin_url(self) -> str:
        """Where the administration is."""
        return f"http://{self._host}:{self._port(1)}"

    def _port(self, at: int) -> int:
        port: int = self._servers[at][1].getsockname()[1]
        return port

    def start(self) -> Service:
        """Answer from now on; returns once the ports are open."""
        self._refresh()
        self.engine.start()
        for server, listening in self._servers:
            thread = threading.Thread(target=server.run, args=([listening],), daemon=True, name="plures-http")
            thread.start()
            self._threads.append(thread)
        keeper = threading.Thread(target=self._keep, daemon=True, name="plures-keep")
        keeper.start()
        self._threads.append(keeper)
        while not all(server.started for server, _ in self._servers):
            if not all(t.is_alive() for t in self._threads):
                raise BadInput("the server could not start; its messages are above")
            time.sleep(0.01)
        return self

    def _keep(self) -> None:
        while not self._stopping.wait(REFRESH_S):
            self._refresh()

    def _refresh(self) -> None:
        """Take up what other processes changed: tenants' shares and pins."""
        try:
            self._tenants = {t.name: t for t in self.desk.access.tenants()}
            pins, all_variants = frozenset(self.desk.pinned()), self.desk.identities()
        except BadInput:  # a store that is busy or unreadable for a while: what was known goes on being true
            return
        if pins != self._pins:
            self._pins = pins
            self.engine.pin(pins)
        if all_variants != self._known:
            self._known = all_variants
            self.engine.tiers.prepare(all_variants)

    def stop(self, grace_s: float = 30.0) -> None:
        """Take no new requests, finish or fail those that run within `grace_s`, and close the ports."""
        self._stopping.set()
        self.engine.stop(grace_s)
        for server, _ in self._servers:
            server.should_exit = True
        for thread in self._threads:
            thread.join(grace_s)
        for _, listening in self._servers:
            listening.close()
        self.desk.close()

    def __enter__(self) -> Service:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _listen(app: Any, host: str, port: int) -> tuple[Server, socket.socket]:
    """A server and its open socket, so that a taken port is told at once and port 0 is known."""
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False, lifespan="off",
                            timeout_graceful_shutdown=5, h11_max_incomplete_event_size=64 * 1024)  # fmt: skip
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # with the protocol said, asyncio sets NODELAY
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        raise BadInput(f"cannot listen on {host} port {port}: it is taken or not allowed; choose --port") from error
    return Server(config), made
