"""Numbers as people read them."""

from __future__ import annotations

import math


def si_bytes(n: float) -> str:
    """`1536` -> `1.5 KB` (powers of 1000, as disks are sold and `ls --si` prints)."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(n) < 999.95 or unit == "TB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """`75` -> `1m15s`; not finite -> `?`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def lora_scale(alpha: float, r: int, rslora: bool) -> float:
    """What LoRA's `B A` is multiplied by: alpha / r, or alpha / sqrt(r) where it is rank-stabilised."""
    return alpha / (r**0.5 if rslora else r)


def lora_alpha(scale: float, r: int, rslora: bool) -> float:
    """The alpha that has this scale at this rank."""
    return scale * (r**0.5 if rslora else r)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Summed negative log-likelihood in nats over `n_bytes` bytes of text, as bits per byte."""
    return nats / (math.log(2) * n_bytes) if n_bytes else math.nan
