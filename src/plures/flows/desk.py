"""The desk of a served fleet: what a request's `model` means to who asks, and every change of what is served.

Names, versions and aliases only point at identities. A request is resolved once, when it arrives; a change is one
transaction in the fleet and one line in the log, and what was resolved before it is answered as it was meant.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from plures.core.errors import BadInput, PluresError, WrongUse, nearest
from plures.engine.ask import BASE, Unavailable
from plures.flows.fleet import Fleet
from plures.store import Store, Version
from plures.store.access import Access, Canary, Tenant
from plures.store.names import check_alias, check_name, parse, shown
from plures.tensors.variant import Variant

THE_BASE = "base"
HINTS = 500  # names that a hint is looked for among: of 10,000 it takes 170 ms, for every wrong request


class NotFound(WrongUse):
    """No such variant, or none that this tenant may see: the two are told in the same words."""


@dataclass(frozen=True)
class Target:
    """Who answers: the reference as resolved (`support@3`, or "base"), the identity ("" for the base), the name."""

    ref: str
    identity: str
    name: str


class Desk:
    """A fleet's store and access together. Every method may be called from any thread."""

    def __init__(self, fleet: Path | str) -> None:
        self.fleet = Path(fleet)
        self.store = Store.open(self.fleet)
        try:
            self.access = Access.open(self.fleet)
        except BaseException:
            self.store.close()
            raise
        self._turn = threading.RLock()
        self._damaged: set[str] = set()
        self._seen: Any = None
        self._versions: dict[str, Version] = {}
        self._canaries: dict[tuple[str, str], Canary] = {}

    def close(self) -> None:
        """Close both."""
        self.access.close()
        self.store.close()

    def _fresh(self) -> None:
        """Forget what was resolved where either database has changed."""
        now = (self.store.data_version, self.access.version)
        if now != self._seen:
            self._seen = now
            self._versions.clear()
            self._canaries = {(c.name, c.alias): c for c in self.access.canaries()}

    def _version(self, ref: str) -> Version:
        with self._turn:
            self._fresh()
            if ref not in self._versions:
                self._versions[ref] = self.store.resolve(ref)
            return self._versions[ref]

    def resolve(self, model: str, tenant: Tenant, roll: float = 1.0) -> Target:
        """What `model` means to a tenant: "base", `name`, `name@3` or `name@alias`.

        `roll` in [0, 1) decides whether a canary answers instead of what the reference points at.
        Raises: NotFound where there is no such thing, or this tenant may not see it.
        """
        try:
            if model == THE_BASE:  # it never means a variant of this name, whoever asks
                if not tenant.base:
                    raise WrongUse("not for this tenant")
                return Target(THE_BASE, BASE, THE_BASE)
            ref = parse(model)
            if not tenant.sees(ref.name):
                raise WrongUse("not for this tenant")
            found = self._version(model)
            canary = self._canaries.get((ref.name, ref.alias or "")) if ref.number is None else None
            if canary is not None and roll < canary.share:
                with suppress(WrongUse):  # removed by another process: what the reference points at answers
                    found = self._version(f"{ref.name}@{canary.version}")
        except WrongUse:
            seen = [THE_BASE] * tenant.base + [n for n in self.store.names() if tenant.sees(n)]
            hint = nearest(str(model)[:200], seen[:HINTS])
            raise NotFound(f"no model {shown(model)} here.{hint}") from None
        return Target(found.ref, found.identity, found.name)

    def visible(self, tenant: Tenant) -> list[dict[str, Any]]:
        """The models that a tenant may name, as OpenAI lists them: names, then `name@alias`, then the base."""
        made = [as_model(v.name, v) for v in self.store.versions() if tenant.sees(v.name) and v.name != THE_BASE]
        for v in self.store.versions(None, all=True):
            if tenant.sees(v.name):
                made.extend(as_model(f"{v.name}@{a}", v) for a in v.aliases)
        if tenant.base:
            made.append({"id": THE_BASE, "object": "model", "created": 0, "owned_by": "plures", "identity": BASE,
                         "method": "", "version": THE_BASE})  # fmt: skip
        return made

    def identities(self) -> frozenset[str]:
        """Every variant that a version of the fleet is."""
        return frozenset(v.identity for v in self.store.versions(None, all=True))

    def pinned(self) -> frozenset[str]:
        """The identities that pins mean now; a pin of what is no longer there means nothing."""
        found = set()
        for ref in self.access.pins():
            try:
                found.add(self._version(ref).identity)
            except WrongUse:
                continue
        return frozenset(found)

    def load(self, identity: str) -> Variant:
        """A variant by its identity, for the engine.

        Raises: Unavailable where the fleet has it no longer, or its blob is damaged. Callers see that message, so it
            names no file and no other's variant; what is damaged goes into the log, once.
        """
        try:
            return self.store.load_identity(identity)
        except WrongUse as error:
            raise Unavailable(str(error)) from error
        except BadInput as error:
            if identity not in self._damaged:
                self._damaged.add(identity)
                with suppress(PluresError):
                    self.access.note("damaged", "server", identity=identity, error=str(error))
            raise Unavailable(
                f"the stored tensors of variant {shown(identity[:12])} cannot be read; the log and plures fsck say more"
            ) from error

    def point(self, ref: str, alias: str, by: str) -> dict[str, Any]:
        """Publish: `alias` points at the version that `ref` means from now on."""
        with self._turn:
            before = self._alias_of(parse(ref).name, alias)
            found = self.store.alias(ref, alias)
            return self._moved("point", found, alias, before, by)

    def roll_back(self, name: str, alias: str, by: str) -> dict[str, Any]:
        """`alias` points again at what it pointed at before it was last moved; a second time, before that.

        Raises: WrongUse where it was never moved here, or what it pointed at has been removed.
        """
        check_name(name)
        with self._turn:
            before = self._alias_of(name, check_alias(alias))
            trail = self._trail(name, alias, before)
            if len(trail) < 2:
                raise WrongUse(f"{name}@{alias} has nothing to go back to: it was not moved by this administration")
            found = self.store.alias(f"{name}@{trail[-2]}", alias)
            return self._moved("roll back", found, alias, before, by)

    def _trail(self, name: str, alias: str, now: int | None) -> list[int]:
        """The versions an alias has pointed at, those undone by a roll-back left out, until `now`.

        A move made elsewhere (`plures alias`) has no line in the log; it shows by where the alias then was.
        """
        trail: list[int] = []

        def at(version: int | None) -> None:
            if version is not None and trail[-1:] != [version]:
                trail.append(version)

        lines = self.access.log(1 << 31, action="point") + self.access.log(1 << 31, action="roll back")
        for line in sorted(lines, key=lambda entry: int(entry["id"])):
            said = line["detail"]
            if (said["name"], said["alias"]) != (name, alias):
                continue
            at(said["before"])
            if line["action"] == "point":
                at(said["version"])
            else:
                trail.pop()
        at(now)
        return trail

    def _alias_of(self, name: str, alias: str) -> int | None:
        try:
            return self.store.resolve(f"{name}@{alias}").version
        except WrongUse:
            return None

    def _moved(self, action: str, found: Version, alias: str, before: int | None, by: str) -> dict[str, Any]:
        said = {"name": found.name, "alias": alias, "version": found.version, "before": before}
        self.access.note(action, by, **said)
        return said | {"identity": found.identity}

    def canary(self, name: str, alias: str, version: int, share: float, by: str) -> dict[str, Any]:
        """Send a share of the requests for `name` (alias "") or `name@alias` to a version of it."""
        self.store.resolve(f"{name}@{version}")
        self.store.resolve(f"{name}@{alias}" if alias else name)
        self.access.set_canary(name, alias, version, share, by)
        return {"name": name, "alias": alias, "version": version, "share": share}

    def end_canary(self, name: str, alias: str, by: str) -> None:
        """End a canary."""
        self.access.end_canary(name, alias, by)

    def pin(self, ref: str, by: str) -> None:
        """Keep what `ref` means resident. Raises: WrongUse where it means nothing."""
        self.store.resolve(ref)
        self.access.pin(ref, by)

    def unpin(self, ref: str, by: str) -> None:
        """Let it go again."""
        self.access.unpin(ref, by)

    def remove(self, ref: str, by: str, force: bool = False) -> list[str]:
        """Remove one version, and the canaries that led to it; requests in flight are answered still.

        Raises: WrongUse where an alias holds it, and no `force` is given.
        """
        number = parse(ref).number
        if number is None:
            raise WrongUse(f"{shown(ref)} says no version; name it as {shown(ref.partition('@')[0] + '@3')}")
        gone = self.store.remove(ref, force=force)
        self.access.note("remove", by, versions=gone, force=force)
        for canary in self.access.canaries():
            if f"{canary.name}@{canary.version}" in gone:
                with suppress(WrongUse):  # ended by another in this moment
                    self.access.end_canary(canary.name, canary.alias, by)
        return gone

    def upload(self, folder: Path, name: str, by: str) -> dict[str, Any]:
        """Import an adapter folder, which may hold anything, as the next version of `name`.

        Raises: BadInput for a folder that is no adapter of this fleet's base; WrongUse for a name that cannot be.
        """
        check_name(name)
        with Fleet(self.fleet) as fleet:
            made = fleet.bring_in(folder, name).version
        self.access.note("upload", by, version=made.ref, identity=made.identity)
        return {"ref": made.ref, "identity": made.identity, "method": made.method, "bytes": made.n_bytes}


def as_model(id: str, v: Version) -> dict[str, Any]:
    """A version as OpenAI lists a model, under the name `id`; its key `version` holds the version's ref."""
    created = int(datetime.fromisoformat(v.created).timestamp())
    return {"id": id, "object": "model", "created": created, "owned_by": "plures", "identity": v.identity,
            "method": v.method, "version": v.ref}  # fmt: skip
