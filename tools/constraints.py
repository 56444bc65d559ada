"""Write constraints.txt anew: the versions installed beside this Python of all that Plures and some extras need.

    .venv/bin/python tools/constraints.py                  # after the tests passed in a fresh .venv
    .venv/bin/python tools/constraints.py --extras dev     # fewer extras

What is installed but not needed (by any of them, however deep) is left out, and so are local parts of versions (+cpu).
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "demo,dev,ray,gpu"
HEAD = """\
# Versions known good together (Python 3.11 and 3.12): all that `make demo` and `make test EXTRAS=dev,ray,gpu` install.
# pyproject.toml holds lower bounds only. Written by tools/constraints.py, which takes the versions from the environment
# it runs in: make a fresh .venv without `-c constraints.txt`, run the tests there, then run it.
"""

# torch's builds with CUDA ask for exactly one triton. Its build for CPUs, which may be what is installed here, asks for
# none, and then a newer one is found that pip refuses on machines with a GPU. By the version of torch.
TRITON = {"2.13.0": "3.7.1"}

# The newest whose commands start without pydantic, which costs each 0.1 s and 8 MB.
TYPER = "0.28.0"


def asked(extras: list[str]) -> list[Requirement]:
    """What pyproject.toml asks for, with these extras. Raises: SystemExit for an extra that it does not have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"]
    if odd := [e for e in extras if e not in known]:
        raise SystemExit(f"extra {odd[0]!r} is not one of {', '.join(known)}; say it as pyproject.toml does")
    return [Requirement(r) for r in [*project["dependencies"], *(r for e in extras for r in known[e])]]


def needed(first: list[Requirement]) -> dict[str, str]:
    """Name and version of every installed distribution that `first` needs here, however deep.

    Raises: SystemExit where one of them is not installed.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(r, frozenset[str]()) for r in first]
    while todo:
        want, outer = todo.pop()
        if want.marker and not any(want.marker.evaluate({"extra": e}) for e in outer or {""}):
            continue
        key = (canonicalize_name(want.name), frozenset(want.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            there = distribution(want.name)
        except PackageNotFoundError:
            told = f"{str(want)!r} is not installed beside {sys.executable}; install the extras first"
            raise SystemExit(told) from None
        found[there.metadata["Name"]] = Version(there.version).public
        todo += [(Requirement(r), key[1]) for r in there.requires or []]
    return found


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--extras", default=EXTRAS, help=f"extras of pyproject.toml, comma-separated; {EXTRAS}")
    told.add_argument("--out", type=Path, default=ROOT / "constraints.txt", help="the file to write")
    args = told.parse_args()
    found = needed(asked(args.extras.split(",")))
    if found["torch"] not in TRITON:
        raise SystemExit(
            f"torch {found['torch']!r} is not one of {', '.join(TRITON)}; add the triton that its build with CUDA asks "
            "for to TRITON (Requires-Dist of its wheel on the package index)"
        )
    found |= {"triton": TRITON[found["torch"]], "typer": TYPER}
    lines = [f"{name}=={found[name]}" for name in sorted(found, key=str.lower)]
    part = args.out.with_name(args.out.name + ".part")
    part.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    os.replace(part, args.out)
    print(f"{args.out}: {len(lines)} versions")


if __name__ == "__main__":
    main()
