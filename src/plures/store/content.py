"""A variant taken apart into what the fleet stores, and put together again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plures.core.errors import BadInput
from plures.store.names import shown
from plures.tensors.safe import tensor_hash
from plures.tensors.variant import Variant, from_flat, identity_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Content:
    """A variant as the fleet stores it; `hashes` is {flat name: tensor hash}, `tensors` {tensor hash: tensor}."""

    identity: bytes
    manifest: str
    sites: str
    provenance: str
    hashes: Mapping[str, bytes]
    tensors: Mapping[bytes, Tensor]
    n_bytes: int


def take_apart(variant: Variant) -> Content:
    """What to store of a variant, checked to come back as it went in.

    Raises: BadInput where the variant contradicts itself, or holds what JSON cannot say.
    """
    where = f"the {variant.method!r} variant"
    try:
        manifest, flat = variant.manifest(), variant.flat()
        text = json.dumps(manifest, sort_keys=True)
        back = json.loads(text)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{where} cannot be stored: its manifest is not plain JSON ({error!r})") from error
    if json.dumps(back, sort_keys=True) != text:
        raise BadInput(f"{where} cannot be stored: JSON changes its manifest; use text as the keys of its dictionaries")
    from_flat(back, flat, where)  # a tensor of a site or group that it does not have would only show when loaded
    leaf_names = {leaf for group in (variant.own, variant.pool) for owned in group.values() for leaf in owned}
    for name in (*leaf_names, *flat):
        if not name.isprintable() or (name in leaf_names and "/" in name):
            raise BadInput(
                f"{where} cannot be stored: tensor name {shown(name)} is not allowed; "
                "use printable letters, and no '/' in the name of a leaf"
            )
    hashes = {key: bytes.fromhex(tensor_hash(t)) for key, t in flat.items()}
    return Content(
        identity=bytes.fromhex(identity_of(back, {k: h.hex() for k, h in hashes.items()})),
        manifest=dump({k: v for k, v in back.items() if k not in ("sites", "provenance")}),
        sites=dump(back["sites"]),
        provenance=dump(back["provenance"]),
        hashes=hashes,
        tensors={hashes[key]: t for key, t in flat.items()},
        n_bytes=variant.n_bytes(),
    )


def dump(value: object) -> str:
    """`value` as JSON without spare spaces."""
    return json.dumps(value, separators=(",", ":"))


def whole_manifest(manifest: str, sites: str, provenance: str) -> dict[str, Any]:
    """The manifest of a variant out of its three stored parts."""
    return {**json.loads(manifest), "sites": json.loads(sites), "provenance": json.loads(provenance)}
