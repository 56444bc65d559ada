"""Every random number has a path from the seed: `stream(7, "mos", "own", "layers.0.q_proj")`."""

from __future__ import annotations

import hashlib


def stream(seed: int, *path: object) -> int:
    """A 63-bit seed for the purpose named by `path`, derived from `seed` by SHA-256.

    Two different paths give independent streams, and a stream does not depend on what else was drawn or in which
    order: adding a layer or a method never shifts another's numbers. Path parts are separated by NUL, so that
    ("a", "bc") and ("ab", "c") differ.
    """
    text = "\0".join([str(int(seed)), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
