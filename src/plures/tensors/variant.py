"""A variant: base + {site: adapter tensors} + provenance, as values; folders and stores are elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from plures.core.errors import BadInput
from plures.tensors.safe import tensor_hash
from plures.tensors.site import Site

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1


@dataclass(frozen=True)
class BaseRef:
    """The base a variant belongs to: where it was loaded from, and a fingerprint of its weights.

    `name` is a hub id or a local folder; `revision` a commit of the hub, or ""; `hash` is `engine.model.fingerprint`.
    """

    name: str
    revision: str = ""
    hash: str = ""


@dataclass(frozen=True)
class Variant:
    """What a base becomes: a method, its options, and the tensors of every site and pool.

    `own[site][leaf]` belongs to one site, `pool[group][leaf]` to all sites of a group, `extra[key]` are whole
    parameters trained beside the adapter (`modules_to_save`), by their name in the base. `group_of` says which
    pool a site draws on ("" for none). `provenance` is JSON: recipe, seed, data fingerprint, parents, versions.
    """

    method: str
    options: Mapping[str, Any]
    base: BaseRef
    sites: tuple[Site, ...]
    group_of: Mapping[str, str]
    own: Mapping[str, Mapping[str, Tensor]]
    pool: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, Tensor]:
        """Every tensor under one key: `own/<site>/<leaf>`, `pool/<group>/<leaf>`, `extra/<parameter>`."""
        out = {f"own/{s}/{k}": t for s, leaves in self.own.items() for k, t in leaves.items()}
        out |= {f"pool/{g}/{k}": t for g, leaves in self.pool.items() for k, t in leaves.items()}
        return out | {f"extra/{k}": t for k, t in self.extra.items()}

    def manifest(self) -> dict[str, Any]:
        """All of the variant but its tensors, as JSON: what `plures.json` holds."""
        return {
            "schema": SCHEMA,
            "method": self.method,
            "options": dict(self.options),
            "base": asdict(self.base),
            "sites": [[s.name, s.out, s.into, self.group_of[s.name], s.at, s.depth] for s in self.sites],
            "provenance": dict(self.provenance),
        }

    def identity(self) -> str:
        """SHA-256 over method, options, base, sites and every tensor: two variants that act alike by construction.

        Provenance is not part of it: the same tensors trained twice are one variant.
        """
        return identity_of(self.manifest(), {k: tensor_hash(t) for k, t in self.flat().items()})

    def n_bytes(self) -> int:
        """Bytes of all tensors, indices included."""
        return sum(t.numel() * t.element_size() for t in self.flat().values())

    def with_provenance(self, **facts: Any) -> Variant:
        """The same variant with more said of where it came from."""
        return replace(self, provenance={**self.provenance, **facts})


def plain_lora(
    base: BaseRef, sites: Sequence[Site], own: Mapping[str, Mapping[str, Tensor]], rank: int,
    extra: Mapping[str, Tensor] | None = None, provenance: Mapping[str, Any] | None = None,
) -> Variant:  # fmt: skip
    """The variant of method `lora` whose deltas are `B A` as they stand (alpha is the rank).

    Shapes: own `A [rank, into]`, `B [out, rank]` at each of `sites`; an imported one may have other ranks.
    """
    options = {"r": rank, "alpha": float(rank), "rslora": False}
    return Variant("lora", options, base, tuple(sites), {s.name: "" for s in sites}, own, {}, extra or {},
                   provenance or {})  # fmt: skip


def identity_of(manifest: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    """A variant's identity in hex, from its manifest and the hex hashes of its flat tensors."""
    facts = {k: v for k, v in manifest.items() if k != "provenance"}
    facts["base"] = manifest["base"]["hash"]
    facts["tensors"] = dict(sorted(hashes.items()))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def from_flat(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str = "variant") -> Variant:
    """The variant of a manifest and its flat tensors; strict both ways.

    Raises: BadInput for an unknown schema, or a tensor of a site, group or kind that the manifest does not name.
    """
    if manifest.get("schema") != SCHEMA:
        raise BadInput(f"{where}: schema {manifest.get('schema')!r} is not {SCHEMA}; it was written by another Plures")
    try:
        rows = manifest["sites"]
        sites = tuple(Site(n, out, into, None, at, depth) for n, out, into, _, at, depth in rows)
        group_of = {r[0]: r[3] for r in rows}
        base = BaseRef(**manifest["base"])
        method, options = manifest["method"], manifest["options"]
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{where}: its manifest is damaged ({error!r})") from error
    own: dict[str, dict[str, Tensor]] = {s.name: {} for s in sites}
    pool: dict[str, dict[str, Tensor]] = {g: {} for g in group_of.values() if g}
    extra: dict[str, Tensor] = {}
    for key, t in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "extra":
            extra[rest] = t
            continue
        owner, _, leaf = rest.rpartition("/")
        room = {"own": own, "pool": pool}.get(kind, {})
        if owner not in room:
            raise BadInput(f"{where}: tensor {key!r} belongs to nothing that the manifest names")
        room[owner][leaf] = t
    return Variant(
        method, options, base, sites, group_of, own, {g: v for g, v in pool.items() if v}, extra,
        manifest.get("provenance", {}),
    )  # fmt: skip
