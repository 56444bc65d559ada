"""Start a run from a variant of the fleet: take over its tensors, and hold some of them still.

So a shared pool is learned once on many tenants' rows, and each tenant's variant trains only what is its own; the
store holds equal tensors once, whoever has them. The same goes on with a variant on newer rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from plures.adapt import adapts
from plures.adapt._lay import Laid
from plures.bridges.peft import PluresLayer
from plures.core.errors import WrongUse, nearest
from plures.flows.recipes import StartPart, TrainRecipe
from plures.store import Store, Version
from plures.tensors.variant import Variant


def check(start: StartPart, laid: Laid, frozen: frozenset[str]) -> None:
    """Raises: WrongUse where leaves are named that the method does not have, or nothing is left to train."""
    leaves = {k for rooms in (laid.own, laid.pool) for room in rooms.values() for k in room}
    for field in ("take", "freeze"):
        for leaf in getattr(start, field):
            if leaf not in leaves:
                raise WrongUse(f"start.{field}: the method has no tensors called {leaf!r}.{nearest(leaf, leaves)} "
                               f"It has: {', '.join(sorted(leaves))}")  # fmt: skip
    if start.freeze and not start.variant:
        raise WrongUse("start.freeze holds the tensors of a variant still: name it in start.variant")
    if not laid.trained(frozen | frozenset(start.freeze)):
        raise WrongUse(f"start.freeze = {start.freeze} leaves nothing to train")


def find(recipe: TrainRecipe, store: Store) -> tuple[Version, Variant] | None:
    """The variant to start from, whole; None where the recipe names none.

    A method that can `grow` (MoRAM) takes up one of the same method and other options: it knows how.
    Raises: WrongUse where it is of another method or other options, which would not fit.
    """
    if not recipe.start.variant:
        return None
    version = store.resolve(recipe.start.variant)
    variant = store.load_identity(version.identity)
    name, options = recipe.method()
    method: Any = adapts.make(name, **options)
    options = asdict(method)
    if variant.method != name or (dict(variant.options) != options and not hasattr(method, "grow")):
        raise WrongUse(f"start.variant {version.ref!r} is {variant.method} {dict(variant.options)}; this run is {name} "
                       f"{options}. A start needs the same method and options")  # fmt: skip
    return version, variant


@torch.no_grad()
def take_over(model: Any, adapter: str, variant: Variant, start: StartPart) -> None:
    """Copy the variant's tensors onto the model's adapter, and freeze those that the recipe names.

    Sites and groups that only one of them has keep what was drawn.
    Raises: WrongUse for a tensor of another shape (another base, or other layers).
    """
    wanted = frozenset(start.take)
    for layer in (m for m in model.modules() if isinstance(m, PluresLayer) and adapter in m.plures_own):
        group = variant.group_of.get(layer.name, "")
        rooms: Iterable[tuple[Any, Any]] = (
            (layer.plures_own, variant.own.get(layer.name, {})), (layer.plures_pool, variant.pool.get(group, {})),
        )  # fmt: skip
        method: Any = layer.methods[adapter]
        for room, theirs in rooms:
            mine = room[adapter].tensors() if adapter in room else {}
            if theirs and hasattr(method, "grow"):
                theirs = method.grow(mine, theirs)
            for leaf, t in mine.items():
                if leaf in theirs and (not wanted or leaf in wanted):
                    if t.shape != theirs[leaf].shape:
                        raise WrongUse(f"start.variant: {leaf!r} at {layer.name!r} is {list(theirs[leaf].shape)} in it "
                                       f"and {list(t.shape)} here; train the same layers and targets")  # fmt: skip
                    t.data.copy_(theirs[leaf])
                if leaf in start.freeze and isinstance(t, torch.nn.Parameter):
                    t.requires_grad_(False)
