"""What a user should know of an adapter folder as it comes in or goes out, beside its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be (vllm/config/lora.py, MaxLoRARanks; 1 is left out)."""


def _config(folder: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return said


def named_base(folder: Path) -> str:
    """The base that the config of a readable adapter folder names; "" where it names none, or a hash proves it."""
    return "" if (folder / "plures.json").exists() else str(_config(folder).get("base_model_name_or_path") or "")


def other_base(named: str, base: str) -> str:
    """A line where an adapter of equal shapes may still be of another base than `base`; "" where the names agree."""
    if not named or Path(named).name == Path(base).name:
        return ""
    return f"its config names the base {named!r}, this fleet's is {base!r}: shapes agree, weights cannot be compared"


def for_servers(folder: Path, ref: str) -> list[str]:
    """What a server of plain LoRAs must be told of the exported folder of `ref`, or why it will refuse it."""
    config = _config(folder)
    if config.get("peft_type") != "LORA":
        return []
    rank, saved = int(config["r"]), config.get("modules_to_save") or ()
    room = next((r for r in RANKS if r >= rank), 0)
    if saved:
        return [f"rank {rank}, and {', '.join(saved)} whole (modules_to_save), which vLLM refuses: use --as merged"]
    if not room:
        return [f"rank {rank}, and vLLM takes {RANKS[-1]} at most; "
                f"for one that fits: plures merge {ref}=1 --name NAME --rank {RANKS[-1]}"]  # fmt: skip
    return [f"rank {rank}; with vLLM: --max-lora-rank {room}"]
