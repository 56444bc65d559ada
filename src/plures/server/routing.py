"""A name that stands for several variants: the one whose domain a prompt most probably is of answers it (HDEE).

The posterior is that of route `posterior` at the end of the prompt. Every member reads the prompt once, side by side in
the running batch; the one of the greatest posterior alone answers, and what it has read is there for its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from plures.core.errors import WrongUse, nearest
from plures.engine.ask import Ask, Sampling, Serving
from plures.flows.desk import THE_BASE, Desk, NotFound, Target
from plures.route.posterior import Posterior
from plures.server.errors import Refused
from plures.server.job import Mailbox
from plures.server.metrics import Metrics
from plures.store.access import Tenant
from plures.store.names import check_name, shown


@dataclass(frozen=True)
class Routed:
    """The members of a name, as a request may call them, and the route that chooses between them, with its prior."""

    members: tuple[str, ...]
    way: Posterior


Table = Mapping[str, Routed]


def read_routes(said: Sequence[str]) -> dict[str, Routed]:
    """Names with their members: `helpdesk=support,legal@prod,base`, or with priors `helpdesk=support:0.7,legal:0.3`.

    Raises: WrongUse for what is no such line, fewer than two members, one that is named twice, or a prior not above 0.
    """
    out: dict[str, Routed] = {}
    for line in said:
        name, equals, rest = line.partition("=")
        parts = [part.partition(":") for part in rest.split(",")]
        members = tuple(member.strip() for member, _, _ in parts)
        if not equals or not all(members):
            raise WrongUse(f"route {line!r} is no name with members, like helpdesk=support,legal")
        if check_name(name) in (*out, THE_BASE):
            raise WrongUse(f"route {name!r} is there twice, or is the base's name; choose another")
        if len(members) < 2 or len(set(members)) < len(members):
            raise WrongUse(f"route {line!r}: name at least two members that all differ")
        try:
            out[name] = Routed(members, Posterior(",".join(p if colon else "1" for _, colon, p in parts)))
        except WrongUse:
            raise WrongUse(f"route {line!r}: a prior is a number above 0, like support:0.7") from None
    return out


class Router:
    """Chooses who answers a request for a routed name.

    Raises: WrongUse for a name that a variant has, or a member that is not there.
    """

    def __init__(self, desk: Desk, serving: Serving, table: Table, metrics: Metrics) -> None:
        self.desk, self.serving, self.table, self.metrics = desk, serving, table, metrics
        have = set(desk.store.names()) if table else set()
        for name, routed in table.items():
            if name in have:
                raise WrongUse(f"route {name!r} has the name of a variant; choose another")
            for member in routed.members:
                if member != THE_BASE:
                    desk.store.resolve(member)

    def visible(self, tenant: Tenant) -> list[dict[str, Any]]:
        """The routed names all of whose members a tenant may name, as OpenAI lists models."""
        common = {"object": "model", "created": 0, "owned_by": "plures", "identity": "", "method": "posterior"}
        return [{"id": name, "version": name} | common for name in self.table if self._sees(name, tenant)]

    def _sees(self, name: str, tenant: Tenant) -> bool:
        try:
            for member in self.table[name].members:
                self.desk.resolve(member, tenant)
        except NotFound:
            return False
        return True

    async def choose(self, model: str, tenant: Tenant, prompts: Sequence[Sequence[int]]) -> str:
        """Who answers: `model` itself where it is no routed name, else the version that its most probable member is.

        Raises: NotFound where the tenant may not name every member; WrongUse for several prompts at once; Refused
            where a member could not read the prompt; Overloaded.
        """
        if model not in self.table:
            return model
        if not self._sees(model, tenant):
            near = nearest(model, (m["id"] for m in self.desk.visible(tenant)))
            raise NotFound(f"no model {shown(model)} here.{near}")
        if len(prompts) != 1:
            raise WrongUse(f"model {shown(model)} is routed by the prompt, and {len(prompts)} prompts are in the "
                           "request; send them one by one")  # fmt: skip
        routed = self.table[model]
        targets = [self.desk.resolve(member, tenant) for member in routed.members]
        return targets[routed.way.surest_of(await self._read(tenant, targets, tuple(prompts[0])))].ref

    async def _read(self, tenant: Tenant, targets: Sequence[Target], prompt: tuple[int, ...]) -> list[float]:
        """How likely the prompt is to each member, in nats; what each has read is in the metrics."""
        mailbox, tickets, nats = Mailbox(), list[int](), [0.0] * len(targets)
        try:
            for at, target in enumerate(targets):
                ask = Ask(tenant.name, target.identity, prompt, Sampling(1), weighed=True)
                put = partial(self.serving.submit, ask, mailbox.deliver_to(at))
                tickets.append(await asyncio.to_thread(put) if self.serving.waits else put())
            left = len(tickets)
            while left:
                for at, piece in await mailbox.take():
                    self.metrics.spent(tenant.name, targets[at].ref, piece)
                    if piece.finish in ("error", "cancelled"):
                        raise Refused(503, piece.error or "the prompt could not be read")
                    nats[at] = piece.nats
                    left -= 1
        finally:
            for ticket in tickets:
                self.serving.cancel(ticket)
        return nats
