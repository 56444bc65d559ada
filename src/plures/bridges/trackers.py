"""Events to other people's trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plures.core.errors import missing


class TensorBoard:
    """Writes the numbers of `step` and `eval` events as TensorBoard scalars, by step."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing("tensorboard", "track", "tracking with TensorBoard") from error
        self._writer: Any = SummaryWriter(str(folder))

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        if kind in ("step", "eval"):
            for key, value in fields.items():
                if key not in ("step", "steps") and isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{kind}/{key}", value, fields["step"])

    def close(self) -> None:
        self._writer.close()
