"""Packed variants as files that are mapped into memory: the tier between a slot and the store.

Beside the fleet's blobs, `packed/<identity>.safetensors` holds a variant as the bank takes it, so that making it
resident is one read of the file's pages. It can be removed at any time: the store has the variant, and this is made
anew. Each file names the hash of its content, which is proven whenever it is mapped; a damaged one is made anew too.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plures.core.errors import BadInput, PluresError
from plures.engine.bank import Packed, Place, Site
from plures.tensors import safe

FOLDER = "packed"
_SCHEMA = 2


def path_of(folder: Path, identity: str) -> Path:
    """Where the packed file of a variant is."""
    return folder / f"{identity}.safetensors"


def keep(packed: Packed, folder: Path) -> bool:
    """Write a packed variant; False where the disk does not take it (it is served from memory then)."""
    if packed.whole:  # computed by its method: there are no runs to map
        return False
    at, runs = 0, {}
    for key, run in packed.runs.items():
        runs[key] = (at, run.size)
        at += run.size
    floats = np.concatenate(list(packed.runs.values())) if packed.runs else np.zeros(0, np.float32)
    said = {"schema": _SCHEMA, "identity": packed.identity, "runs": runs, "sites": [astuple(s) for s in packed.sites]}
    said |= {"hash": _digest(floats, packed.index)}
    tensors = {"floats": torch.from_numpy(floats), "index": torch.from_numpy(packed.index)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        safe.write(path_of(folder, packed.identity), tensors, {"plures": json.dumps(said)})
    except (PluresError, OSError):
        return False
    return True


def find(folder: Path, identity: str) -> Packed | None:
    """The packed variant, its numbers mapped from the file; None where there is none, or it is damaged."""
    path = path_of(folder, identity)
    if not path.exists():
        return None
    try:
        head = safe.header(path)
        said = json.loads(head["__metadata__"]["plures"])
        with path.open("rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
        data = np.memmap(path, np.uint8, "r", start)
        floats = _view(data, head["floats"]["data_offsets"], np.float32)
        index = _view(data, head["index"]["data_offsets"], np.int16)
        if (said["schema"], said["identity"], said["hash"]) != (_SCHEMA, identity, _digest(floats, index)):
            raise BadInput("another schema, variant or content")
        sites = tuple(Site(Place(*place), *rest) for place, *rest in said["sites"])
        runs = {key: floats[at : at + size] for key, (at, size) in said["runs"].items()}
    except (BadInput, OSError, ValueError, KeyError, TypeError):
        path.unlink(missing_ok=True)
        return None
    return Packed(identity, runs, index, sites)


def _view(data: Any, span: list[int], kind: Any) -> Any:
    return np.asarray(data[span[0] : span[1]]).view(kind)


def _digest(floats: Any, index: Any) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(floats).data)
    digest.update(np.ascontiguousarray(index).data)
    return digest.hexdigest()
