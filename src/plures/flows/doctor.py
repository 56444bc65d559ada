"""Is this machine ready? Checks that import nothing they do not need."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

from plures.core.units import si_bytes

if TYPE_CHECKING:
    from packaging.requirements import Requirement

EXTRAS = {
    "data": "rows of the Hub, like data.train=org/name",
    "demo": "the openai client that the demo asks its server with",
    "schema": "answers that keep to a JSON schema",
    "gpu": "serving on a GPU",
    "ray": "--on ray: bench, select and serve on several machines",
    "embed": "plures embed with a sentence-transformers model",
    "near": "the index of plures near over a million rows",
    "track": "TensorBoard's record of a run",
    "trl": "training a plug-in with TRL",
}
"""What each optional part of the package is for; dev, which is for its developers, is left out."""


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, whether it is good, whether Plures needs it, and what it is for."""

    what: str
    found: str
    good: bool
    needed: bool = True
    use: str = ""


def examine() -> list[Check]:
    """Look at Python, packages, devices and the disk here."""
    checks = [Check("python", sys.version.split()[0], sys.version_info >= (3, 11)), *packages()]
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


def packages() -> list[Check]:
    """What the package says that it needs, and what it has as extras, with the versions that are here."""
    from packaging.requirements import Requirement

    try:
        said = [Requirement(line) for line in requires("plures") or ()]
    except PackageNotFoundError:
        return [Check("plures", "not installed as a package: pip install it, so that its parts can be checked", False)]
    needed = [_package(r, "") for r in said if r.marker is None or r.marker.evaluate({"extra": ""})]
    return needed + [
        _package(r, extra) for extra in EXTRAS for r in said
        if not (r.marker is None or r.marker.evaluate({"extra": ""})) and r.marker.evaluate({"extra": extra})
    ]  # fmt: skip


def _package(wanted: Requirement, extra: str) -> Check:
    use = f"{EXTRAS[extra]} (plures[{extra}])" if extra else ""
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return Check(wanted.name, "not installed", False, not extra, use)
    good = wanted.specifier.contains(found, prereleases=True)
    return Check(wanted.name, found if good else f"{found}, and {wanted.specifier} is wanted", good, not extra, use)
