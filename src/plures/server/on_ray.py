"""Serve a fleet from several processes, which Ray Serve runs, routes to and restarts; HTTP is answered in this one."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plures.core.errors import BadInput, Unreachable, WrongUse, missing
from plures.engine.ask import Ask
from plures.engine.limits import Settings
from plures.engine.model import load_tokenizer
from plures.flows.desk import Desk
from plures.server.replicas import Replicas
from plures.server.wire import FarState, Refusal, Stream

MOST_ONGOING = 1 << 14  # above what an engine admits: it says itself when there is too much
STORE_BYTES = 128 << 20  # of Ray's object store, through which nothing of ours goes


@dataclass(frozen=True)
class OnRay:
    """That a fleet is served by replicas: `Service("acme.fleet", on=OnRay(replicas=2))`.

    Options:
        replicas: processes with an engine each. Variants, slots and rows are counted in each of them.
        threads: that each computes with; 0 shares the machine's cores between them.
        grace_s: how long Ray gives a replica's requests where it replaces a replica.
    Raises: WrongUse for no replicas; at the start MissingExtra without Ray, BadInput where they cannot start.
    """

    replicas: int = 1
    threads: int = 0
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise WrongUse(f"replicas must be at least 1, got {self.replicas}")

    def __call__(self, desk: Desk, settings: Settings) -> Replicated:
        """What answers for a desk's fleet."""
        return Replicated(self, desk, settings)


class Replicated:
    """A fleet's replicas, and the way to them; see `run.Behind`."""

    def __init__(self, how: OnRay, desk: Desk, settings: Settings) -> None:
        self._how, self._fleet = how, desk.fleet
        self._settings = replace(settings, engines=how.replicas)
        self._threads = how.threads or max(1, (os.cpu_count() or 1) // how.replicas)
        self._ray: _Ray | None = None
        self.serving = Replicas(load_tokenizer(desk.store.base), settings.rows)

    @property
    def failure(self) -> str:
        """Always "": Ray puts a new replica in the place of one that has failed; `/readyz` says whether one answers."""
        return ""

    def start(self) -> None:
        """Run the replicas; returns once all of them do."""
        n = self._how.replicas
        self._ray = _Ray(n * self._threads)
        self.serving.start(self._ray.deploy(self._fleet, self._settings, n, self._threads, self._how.grace_s))

    def stop(self, grace_s: float) -> None:
        """Take no more requests, finish or fail those that run within `grace_s`, end the processes."""
        self.serving.stop(grace_s)
        if self._ray is not None:
            self._ray.stop()


class _Ray:
    """Ray, joined where RAY_ADDRESS says so, else started on this machine; and our application in it."""

    def __init__(self, cpus: int) -> None:
        try:
            import ray
            from ray import serve
        except ImportError as error:
            raise missing("ray", "ray", "serving from several processes") from error
        self._ray, self._serve, self._app = ray, serve, f"plures-{uuid.uuid4().hex[:12]}"
        joins, self._ours = bool(os.environ.get("RAY_ADDRESS")), not ray.is_initialized()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it Ray prints a FutureWarning
        if self._ours:
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "plures"}
            local: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": STORE_BYTES}
            with _signals_kept():
                try:
                    ray.init(**quiet) if joins else ray.init("local", **quiet, **local)
                except (ConnectionError, TimeoutError) as error:
                    where = os.environ.get("RAY_ADDRESS", "this machine")
                    raise Unreachable(f"no Ray cluster answers at {where!r} (RAY_ADDRESS): {error}") from error

    def deploy(self, fleet: Path, settings: Settings, replicas: int, threads: int, grace_s: float) -> _Link:
        """Run the replicas. Raises: BadInput where they cannot start."""
        from ray.serve.schema import LoggingConfig

        from plures.server.replica import Replica

        logs = LoggingConfig(log_level="WARNING", enable_access_log=False)
        made = self._serve.deployment(
            name="replica", num_replicas=replicas, ray_actor_options={"num_cpus": threads},
            max_ongoing_requests=MOST_ONGOING, health_check_period_s=2.0, health_check_timeout_s=10.0,
            graceful_shutdown_wait_loop_s=0.1, graceful_shutdown_timeout_s=grace_s, max_constructor_retry_count=1,
        )(Replica)  # fmt: skip
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        for last in (False, False, True):
            try:
                self._serve.start(proxy_location="Disabled", logging_config=logs)
                break
            except ValueError:  # another process on this cluster has begun it in this moment
                if last:
                    raise
                time.sleep(1.0)
        try:
            handle = self._serve.run(made.bind(str(fleet.resolve()), settings, threads), name=self._app,
                                     route_prefix=None, logging_config=logs)  # fmt: skip
        except RuntimeError as error:
            raise BadInput(f"the replicas cannot start: {self._why() or error}") from error
        return _Link(handle)

    def _why(self) -> str:
        """What the replicas said when they failed, in one line."""
        application = self._serve.status().applications.get(self._app)
        said = "\n".join(d.message for d in application.deployments.values()) if application else ""
        found = re.findall(r"^\s*(?:[\w.]+\.)?([A-Z]\w+(?:: .+))$", said, re.MULTILINE)
        return found[-1] if found else ""

    def stop(self) -> None:
        """End the replicas, and Ray itself where we started it."""
        with suppress(Exception):  # Ray may be gone already
            self._serve.delete(self._app)
        if self._ours:
            self._ray.shutdown()


class _Link:
    """Over a deployment's handle; see `wire.Link`."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._front = handle, uuid.uuid4().hex
        self._ask, self._listen = handle.options(method_name="ask"), handle.options(method_name="listen", stream=True)

    async def ask(self, key: int, ask: Ask, near: str) -> str | Refusal:
        """Put a request to one of them."""
        asking = self._ask.options(multiplexed_model_id=near) if near else self._ask
        response = asking.remote(self._front, key, ask)
        try:
            said: str | Refusal = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        return said

    def listen(self, replica: str) -> Stream:
        """What this replica says to us."""
        made: Stream = self._listen.options(multiplexed_model_id=replica).remote(self._front, replica)
        return made

    async def cancel(self, keys: Iterable[int]) -> None:
        """End requests, wherever they are."""
        await self._handle.broadcast("cancel", self._front, list(keys)).results_async(return_exceptions=True)

    async def leave(self) -> None:
        """We ask no more: end what there is of ours."""
        await self._handle.broadcast("leave", self._front).results_async(timeout_s=2.0, return_exceptions=True)

    def states(self, timeout_s: float) -> list[FarState]:
        """The state of each that answers in time."""
        told = self._handle.broadcast("state").results(timeout_s=timeout_s, return_exceptions=True)
        return [far for far in told if isinstance(far, FarState)]


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself; whoever had the signals before has them again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    had = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for sign, handler in had.items():
            signal.signal(sign, handler)
