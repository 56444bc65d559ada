"""A fleet's engine, kept in step with what any process changes in the fleet: tenants' shares, pins, versions."""

from __future__ import annotations

import threading

from plures.core.errors import BadInput
from plures.engine.limits import Settings
from plures.engine.model import load_base
from plures.engine.packed import FOLDER
from plures.engine.serving import Engine
from plures.engine.share import Share
from plures.flows.desk import Desk
from plures.store.access import Tenant

REFRESH_S = 1.0


class Keeper:
    """The engine over a desk, and a thread that looks every second at what has changed."""

    def __init__(self, desk: Desk, settings: Settings) -> None:
        self.desk = desk
        self._tenants: dict[str, Tenant] = {}
        self._pins: frozenset[str] = frozenset()
        self._known: frozenset[str] = frozenset()
        base = load_base(desk.store.base)
        self.serving = Engine(base, desk.load, settings, share_of=self._share_of, folder=desk.fleet / FOLDER)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="plures-keep")

    def _share_of(self, name: str) -> Share:
        tenant = self._tenants.get(name)
        if tenant is None:
            return Share()
        return Share(tenant.weight, tenant.concurrency, tenant.rate, tenant.tokens_per_minute)

    @property
    def failure(self) -> str:
        """Why no more requests are answered; "" while they are."""
        return self.serving.failure or ("" if self.serving.alive else "the engine does not run")

    @property
    def pins(self) -> frozenset[str]:
        """The identities that are pinned, as last seen."""
        return self._pins

    def start(self) -> None:
        """Answer from now on."""
        self._refresh()
        self.serving.start()
        self._thread.start()

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
            self.serving.pin(pins)
        if all_variants != self._known:
            self._known = all_variants
            self.serving.tiers.prepare(all_variants)

    def stop(self, grace_s: float) -> None:
        """Stop the engine, its running requests finished first within `grace_s`."""
        self._stopping.set()
        self.serving.stop(grace_s)
        if self._thread.ident is not None:
            self._thread.join(REFRESH_S)
