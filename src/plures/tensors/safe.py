"""safetensors on disk: checked reads, atomic writes, hashes. A pickle is refused before a byte of it is run."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from plures.core.errors import BadInput, disk
from plures.tensors.together import sync_folder

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def refuse_pickle(path: Path, by_content: bool = False) -> None:
    """Raise BadInput where `path` is a pickle by name, or (`by_content`) by its first bytes: loading one runs code.

    Content is asked only of what is no safetensors file: a header of 640 bytes begins with a pickle's magic too.
    """
    magic = b""
    if by_content and path.is_file():
        with disk(path, "read"), path.open("rb") as f:
            magic = f.read(4)
    if path.suffix in PICKLES or magic.startswith(_PICKLE_MAGIC):
        raise BadInput(f"{str(path)!r} is a pickle, which can run code when loaded; Plures reads safetensors only. "
                       "Convert it: torch.load(FILE, weights_only=True), safetensors.torch.save_file.")  # fmt: skip


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, `{name: {"dtype", "shape", "data_offsets"}}`, with every bound checked.

    Raises: BadInput where the file is missing, a pickle, truncated, or not safetensors.
    """
    refuse_pickle(path)
    with disk(path, "read"), path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        start = f.read(8)
        if len(start) < 8:
            raise BadInput(f"{str(path)!r} is not a safetensors file: it has {size} bytes")
        n = struct.unpack("<Q", start)[0]
        if n > min(size - 8, 100_000_000):
            refuse_pickle(path, by_content=True)
            raise BadInput(
                f"{str(path)!r} is not a safetensors file, or is truncated: its header claims {n} bytes of {size}"
            )
        try:
            found: dict[str, Any] = json.loads(f.read(n))
            spans = [e["data_offsets"] for k, e in found.items() if k != "__metadata__"]
            strange = next((s for s in spans if not 0 <= s[0] <= s[1] or {type(s[0]), type(s[1])} != {int}), None)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            refuse_pickle(path, by_content=True)
            raise BadInput(f"{str(path)!r} is not a safetensors file: its header is not valid JSON") from error
    if strange is not None:
        raise BadInput(f"{str(path)!r} is damaged: its header puts a tensor at the bytes {strange[0]} to {strange[1]}")
    want = 8 + n + max((s[1] for s in spans), default=0)
    if want != size:
        raise BadInput(f"{str(path)!r} is truncated or damaged: its header promises {want} bytes, it has {size}")
    return found


def read(path: Path, names: list[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file (only `names`, where given), on the CPU."""
    header(path)
    try:
        with safe_open(str(path), framework="pt") as f:
            return {k: f.get_tensor(k) for k in (f.keys() if names is None else names)}
    except SafetensorError as error:
        raise BadInput(f"{str(path)!r} cannot be read as safetensors: {error}") from error


def metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file; {} where it has none."""
    return dict(header(path).get("__metadata__", {}))


def to_bytes(tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> bytes:
    """The safetensors file of `tensors` as bytes; equal tensors in, equal bytes out, whatever the order."""
    from safetensors.torch import save

    whole = {k: tensors[k].detach().cpu().contiguous().clone() for k in sorted(tensors)}
    return save(whole, metadata=dict(meta) if meta else None)


def from_bytes(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file that is in memory. Raises: BadInput."""
    from safetensors.torch import load

    try:
        return dict(load(data))
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadInput(f"{len(data)} bytes in memory cannot be read as safetensors: {error}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path` atomically: a temporary file beside it, fsync, rename, fsync of the folder."""
    write_chunks(path, (data,))


def write_chunks(path: Path, chunks: Iterable[bytes]) -> int:
    """`write_bytes` of what need not be in memory at once; returns how many bytes it was."""
    n = 0
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as f:
                for chunk in chunks:
                    n += f.write(chunk)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return n


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write numpy arrays as safetensors, atomically and without a copy of them; for what is as large as memory."""
    import numpy as np

    kinds = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32"}
    told, at, whole = dict[str, Any](), 0, {k: np.ascontiguousarray(arrays[k]) for k in sorted(arrays)}
    for name, array in whole.items():
        end = at + array.nbytes
        told[name] = {"dtype": kinds[array.dtype.name], "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts: list[Any] = [a.reshape(-1).view(np.uint8).data for a in whole.values()]  # buffers, not copies
    write_chunks(path, [struct.pack("<Q", len(text)) + text, *parts])


def write(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    write_bytes(path, to_bytes(tensors, meta))


def tensor_hash(t: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes, in hex: equal content, equal hash, wherever it stands."""
    import torch

    flat = t.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{str(flat.dtype).removeprefix('torch.')}{list(flat.shape)}".encode())
    digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with disk(path, "read"), path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
