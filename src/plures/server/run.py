"""Serve a fleet: the engine, the public API and the administration, from start to a graceful stop."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import uvicorn

from plures.core.errors import BadInput
from plures.engine.ask import Serving
from plures.engine.limits import Settings
from plures.flows.desk import Desk
from plures.server.admin import make_admin
from plures.server.app import EVERYBODY, FromHere, make_app
from plures.server.batch_form import make_runner
from plures.server.keep import Keeper
from plures.server.loopback import check_open
from plures.server.routing import Table

LAST_S = 2.0  # to say the last word to callers, whatever the grace


class Server(uvicorn.Server):
    """Uvicorn in a thread: the process's signals are not its affair."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Doors:
    """The ports of a service: the public API's, and the administration's where it has one.

    Raises: WrongUse where `open` is asked for beyond the loopback; BadInput where a port is taken.
    """

    def __init__(
        self, desk: Desk, serving: Serving, *, host: str, port: int, admin_port: int | None, open: bool,
        routes: Table = MappingProxyType({}),
    ) -> None:  # fmt: skip
        check_open(host, open)
        self._runner = make_runner(desk, serving, EVERYBODY if open else None)
        app = make_app(desk, serving, open=open, runner=self._runner, routes=routes)
        self._servers = [_listen(FromHere(app) if open else app, host, port)]
        try:
            if admin_port is not None:
                self._servers.append(_listen(make_admin(desk, serving), host, admin_port))
        except BaseException:
            self._close()
            raise
        self._host = f"[{host}]" if ":" in host else host
        self._threads: list[threading.Thread] = []

    def url(self, at: int) -> str:
        """Where the public API is (0), or the administration (1)."""
        return f"http://{self._host}:{self._servers[at][1].getsockname()[1]}"

    def start(self) -> None:
        """Answer from now on; returns once the ports are open."""
        for server, listening in self._servers:
            thread = threading.Thread(target=server.run, args=([listening],), daemon=True, name="plures-http")
            thread.start()
            self._threads.append(thread)
        while not all(server.started for server, _ in self._servers):
            if not all(t.is_alive() for t in self._threads):
                raise BadInput("the server could not start; its messages are above")
            time.sleep(0.01)
        self._runner.start()

    def stop(self, grace_s: float) -> None:
        """Leave the batches for the next start, and close the ports within `grace_s`."""
        until = time.monotonic() + grace_s
        self._runner.stop()
        for server, _ in self._servers:
            server.should_exit = True
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._close()

    def _close(self) -> None:
        for _, listening in self._servers:
            listening.close()


class Behind(Protocol):
    """What answers behind the doors of a service: an engine in this process (`Keeper`), or replicas (`on_ray`)."""

    @property
    def serving(self) -> Serving:
        """Whom the doors ask."""
        ...

    @property
    def failure(self) -> str:
        """Why no more requests are answered; "" while they are, or will be again."""
        ...

    def start(self) -> None:
        """Answer from now on."""
        ...

    def stop(self, grace_s: float) -> None:
        """Take no more requests, finish or fail those that run within `grace_s`, and end what was started."""
        ...


class Service:
    """One fleet, served: `with Service("acme.fleet", port=0) as service: … service.url …`.

    Options:
        host, port: where the public API listens; port 0 takes a free one.
        admin_port: where the administration listens (0: a free one; None: nowhere).
        open: no keys; everybody who reaches the port sees every variant. Only for one's own machine.
        routes: names that stand for several variants, of which the prompt chooses one (`server.routing`).
        on: what answers: an engine in this process, or the processes of `on_ray.OnRay`.
    Raises: WrongUse where `open` is asked for beyond the loopback, or for routes that cannot be; BadInput where a port
        is taken.
    """

    def __init__(
        self, fleet: str | Path, settings: Settings = Settings(), *, host: str = "127.0.0.1", port: int = 8000,
        admin_port: int | None = None, open: bool = False, routes: Table = MappingProxyType({}),
        on: Callable[[Desk, Settings], Behind] = Keeper,
    ) -> None:  # fmt: skip
        check_open(host, open)
        self.desk = Desk(Path(fleet))
        try:
            self._behind = on(self.desk, settings)
            self.serving = self._behind.serving
            try:
                self._doors = Doors(self.desk, self.serving, host=host, port=port, admin_port=admin_port, open=open,
                                    routes=routes)  # fmt: skip
            except BaseException:
                self._behind.stop(0.0)
                raise
        except BaseException:
            self.desk.close()
            raise

    @property
    def url(self) -> str:
        """Where the public API is."""
        return self._doors.url(0)

    @property
    def admin_url(self) -> str:
        """Where the administration is."""
        return self._doors.url(1)

    @property
    def failure(self) -> str:
        """Why no more requests are answered; "" while they are, or will be again."""
        return self._behind.failure

    def start(self) -> Service:
        """Answer from now on; returns once all that answers runs and the ports are open."""
        try:
            self._behind.start()
            self._doors.start()
        except BaseException:
            self.stop(0.0)
            raise
        return self

    def stop(self, grace_s: float = 30.0) -> None:
        """Take no new requests, finish or fail those that run within `grace_s`, and close the ports."""
        until = time.monotonic() + grace_s
        self._behind.stop(grace_s)
        self._doors.stop(max(LAST_S, until - time.monotonic()))
        self.desk.close()

    def __enter__(self) -> Service:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _listen(app: Any, host: str, port: int) -> tuple[Server, socket.socket]:
    """A server and its open socket, so that a taken port is told at once and port 0 is known."""
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False, lifespan="off",
                            timeout_graceful_shutdown=5, timeout_keep_alive=75,
                            h11_max_incomplete_event_size=64 * 1024)  # fmt: skip
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # with the protocol said, asyncio sets NODELAY
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        raise BadInput(f"cannot listen on {host} port {port}: it is taken or not allowed; choose --port") from error
    return Server(config), made
