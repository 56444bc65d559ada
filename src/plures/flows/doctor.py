"""Is this machine ready? Checks that import nothing they do not need."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from plures.core.units import si_bytes

NEEDED = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "pydantic", "PyYAML", "typer")
OPTIONAL = ("trl", "datasets", "tensorboard", "pyarrow", "matplotlib")


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, whether it is good, and whether Plures needs it."""

    what: str
    found: str
    good: bool
    needed: bool = True


def examine() -> list[Check]:
    """Look at Python, packages, devices and the disk here."""
    checks = [Check("python", sys.version.split()[0], sys.version_info >= (3, 11))]
    for names, needed in ((NEEDED, True), (OPTIONAL, False)):
        for name in names:
            try:
                checks.append(Check(name, version(name), True, needed))
            except PackageNotFoundError:
                checks.append(Check(name, "not installed", False, needed))
    checks.append(Check("cores", str(os.cpu_count()), True))
    free = shutil.disk_usage(".").free
    checks.append(Check("disk free here", si_bytes(free), free > 1e9))
    checks.append(Check("folder writable", os.getcwd(), os.access(".", os.W_OK)))
    try:
        import torch

        cuda = torch.cuda.is_available()
        checks.append(Check("CUDA", torch.cuda.get_device_name(0) if cuda else "none; the CPU is used", cuda, False))
    except ImportError:
        pass
    return checks
