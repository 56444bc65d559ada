"""How large a serving engine is."""

from __future__ import annotations

import os
from dataclasses import dataclass

from plures.core.errors import WrongUse


@dataclass(frozen=True)
class Settings:
    """How large the engine is.

    Options:
        rows: requests that are answered at once.
        prefill_tokens: prompt tokens computed in one step, beside the rows that decode.
        kv_tokens: tokens whose keys and values fit in memory, all rows together; 0 takes what a quarter of the
            machine's memory holds, at most 65,536.
        slots: variants resident at once.
        bank_bytes: memory for the resident variants' numbers, touched as it is used.
        host_bytes: memory for variants that are packed and wait for a slot.
        share_prefixes: whether equal prefixes of one variant are computed once.
        spare_rows: rows beside these, for the requests of other tenants while one is heavy; -1 takes a quarter.
        policy: "vtc", fair between tenants, or "fcfs", first come first served.
        bfloat16: whether the base runs in bfloat16 (on the CPU adapters, attention and logits stay float32).
        device: "cpu", "cuda", or "auto": CUDA where there is one, triton is installed and the base is native.
        engines: that share this machine; where kv_tokens is 0, each takes its part of that quarter.
    """

    rows: int = 32
    prefill_tokens: int = 256
    kv_tokens: int = 0
    slots: int = 64
    bank_bytes: int = 1 << 30
    host_bytes: int = 1 << 30
    share_prefixes: bool = True
    spare_rows: int = -1
    policy: str = "vtc"
    bfloat16: bool = False
    device: str = "auto"
    engines: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "prefill_tokens", "slots", "bank_bytes", "host_bytes", "engines"):
            if getattr(self, name) < 1:
                raise WrongUse(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.spare_rows < -1:
            raise WrongUse(f"spare_rows must be 0 or more, or -1 for a quarter of rows, got {self.spare_rows}")
        if self.kv_tokens < 0:
            raise WrongUse(f"kv_tokens must be at least 0, got {self.kv_tokens}; 0 takes a quarter of the memory")
        if self.device not in ("auto", "cpu", "cuda"):
            raise WrongUse(f"device must be 'auto', 'cpu' or 'cuda', got {self.device!r}")
        if self.policy not in ("vtc", "fcfs"):
            raise WrongUse(f"policy must be 'vtc' or 'fcfs', got {self.policy!r}")

    @property
    def spare(self) -> int:
        """Rows beside `rows` for tenants that are not heavy; none under "fcfs"."""
        if self.policy == "fcfs":
            return 0
        return self.rows // 4 if self.spare_rows < 0 else self.spare_rows

    def tokens_kept(self, bytes_per_token: int, context: int, memory: int) -> int:
        """Tokens whose keys and values are kept: as asked, or by `memory` in bytes; one whole request at least."""
        most = self.kv_tokens or min(65_536, memory // 4 // self.engines // bytes_per_token)
        return max(most, context)


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
