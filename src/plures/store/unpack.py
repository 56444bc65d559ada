"""Variants that a fleet holds packed: what is stored is a code and what codes share; what is loaded is plain LoRA."""

from __future__ import annotations

import json
from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any

from plures.core.errors import BadInput, PluresError
from plures.pack import ENCODING, Codec, packs
from plures.tensors import safe
from plures.tensors.site import Site
from plures.tensors.variant import Variant, plain_lora

if TYPE_CHECKING:
    from torch import Tensor

METHOD, GROUP = "packed", "pack"
SHARED = f"pool/{GROUP}/shared"
MOST_CODECS = 4


class Codecs:
    """What decodes, made once for all variants that share it; threads may ask at the same time."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str], Codec] = {}
        self._lock = Lock()

    def find(self, manifest: Mapping[str, Any], shared_hash: str) -> Codec | None:
        """The codec of a packed variant's manifest, where it is in memory; it stays the caller's when others go."""
        with self._lock:
            return self._made.get((_said(manifest), shared_hash))

    def make(self, manifest: Mapping[str, Any], shared_hash: str, shared: Tensor) -> Codec:
        """The codec of a packed variant's manifest and what it shares, kept for the next one.

        Raises: BadInput for a packer that this Plures does not have, or damaged content.
        """
        made = codec_of(manifest, shared)
        with self._lock:
            while len(self._made) >= MOST_CODECS:
                self._made.pop(next(iter(self._made)))
            self._made[_said(manifest), shared_hash] = made
        return made


def codec_of(manifest: Mapping[str, Any], shared: Tensor) -> Codec:
    """What decodes the variants of such a manifest, from the safetensors file that `shared`, uint8, is."""
    from plures.pack._metric import codec

    sites = [Site(n, out, into, None, at, depth) for n, out, into, _, at, depth in manifest["sites"]]
    said = manifest["options"]
    try:
        packer: Any = packs.make(said["packer"], **said["options"])
        made = codec(packer, sites, safe.from_bytes(shared.numpy().tobytes()))
    except (PluresError, KeyError, TypeError) as error:
        raise BadInput(f"a packed variant cannot be decoded: {error}") from error
    return made


def as_plain(packed: Variant, coder: Codec) -> Variant:
    """The plain LoRA that a packed variant stands for, of the largest rank of its sites."""
    import torch

    found = coder.decode(packed.pool[GROUP]["code"])
    rank = max((A.shape[0] for _, A in found.values()), default=0) or 1
    own = {}
    for site in packed.sites:
        A, B = torch.zeros(rank, site.into), torch.zeros(site.out, rank)
        if site.name in found:
            b, a = found[site.name]
            A[: len(a)], B[:, : b.shape[1]] = a, b
        own[site.name] = {"A": A, "B": B}
    facts = {**packed.provenance, METHOD: dict(packed.provenance.get(METHOD, {}))}
    return plain_lora(packed.base, packed.sites, own, rank, packed.extra, facts)


def _said(manifest: Mapping[str, Any]) -> str:
    """What a codec is made of besides what is shared: one for all variants of a pack, at whatever error they are."""
    said = manifest["options"]
    decoding = {k: v for k, v in said["options"].items() if k not in ENCODING}
    return json.dumps([said["packer"], decoding, manifest["sites"]], sort_keys=True)
