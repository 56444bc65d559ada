"""How commands speak: tables for people, `--json` for scripts, one fleet found where only one is meant."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from plures.core.errors import RecipeErrors, WrongUse

FleetOption = Annotated[
    str, typer.Option("--fleet", "-f", envvar="PLURES_FLEET", help="The fleet's folder; none: the only *.fleet here.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
_OVERRIDE = re.compile(r"[^\s/\\=]+=")


def fleet_path(given: str) -> Path:
    """The fleet that is meant: the one named, that of PLURES_FLEET, or the only `*.fleet` folder here."""
    if given := given or os.environ.get("PLURES_FLEET", ""):
        return Path(given)
    here = sorted(p for p in Path().glob("*.fleet") if os.path.exists(p / "fleet.db"))
    if len(here) == 1:
        return here[0]
    found = f"{len(here)} are here: {', '.join(map(str, here))}" if here else "no *.fleet folder is here"
    raise WrongUse(f"which fleet? {found}; say --fleet PATH or set PLURES_FLEET")


def said_fleet(fleet: str, context: typer.Context) -> str:
    """The fleet that an option names; "" where the environment does, which a recipe comes before."""
    source = context.get_parameter_source("fleet")
    return fleet if source is not None and source.name == "COMMANDLINE" else ""


def split_said(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files (or texts) among a command's arguments, and the overrides key=value.

    An override has a key without spaces and slashes before its first =, and nothing of its name is there as a file.
    """
    said = [w for w in words if _OVERRIDE.match(w) and not os.path.exists(w)]
    return [w for w in words if w not in said], said


def is_recipe(name: str) -> bool:
    """Whether a file's name is that of a recipe."""
    return name.endswith((".yaml", ".yml"))


def read_recipe(kind: type, verb: str, words: Sequence[str], given: Mapping[str, Any] | None = None,
                others: str = "") -> Any:  # fmt: skip
    """The recipe of a command's arguments: one file or none, options as values by their dotted keys, and overrides
    key=value, which come last.

    `others` is the key that takes a list of all files that do not end in .yaml or .yml; without it there is one file.
    Where the recipe must name a fleet and nothing does, it is the one that `fleet_path` finds.
    Raises: WrongUse for several recipes; BadInput; RecipeErrors.
    """
    from plures.core.recipe import load, read_yaml

    files, said = split_said(words)
    recipes = [f for f in files if is_recipe(f)] if others else files
    rest = [f for f in files if f not in recipes]
    if len(recipes) > 1:
        raise WrongUse(f"one recipe at a time, got {', '.join(map(repr, recipes))}; overrides are written key=value")
    where = f"{verb} {recipes[0]!r}" if recipes else verb
    data = read_yaml(Path(recipes[0]), verb) if recipes else {}
    options = ({others: rest} if rest else {}) | {k: v for k, v in (given or {}).items() if is_said(v)}
    said = [*(f"{k}={quoted(v)}" for k, v in options.items()), *said]
    unknown, asks = "", any(f.name == "fleet" and not has_default(f) for f in fields(kind))
    if asks and data.get("fleet") is None and not any(s.partition("=")[0].strip() == "fleet" for s in said):
        try:
            said.insert(0, f"fleet={quoted(str(fleet_path('')))}")
        except WrongUse as error:
            unknown = str(error).replace("say --fleet PATH", "say fleet=PATH")
    try:
        return load(kind, data, said, where=where)
    except RecipeErrors as error:
        lines = [f"fleet: {unknown}" if unknown and p.startswith("fleet: is required") else p for p in error.problems]
        raise RecipeErrors(lines, where) from error


def has_default(field: Field[Any]) -> bool:
    """Whether a dataclass's field may be left out."""
    return field.default is not MISSING or field.default_factory is not MISSING


def is_said(value: object) -> bool:
    """Whether an option was given: none, "", False and an empty list are what stands for its absence."""
    return not (value is None or value is False or value == "" or value == [])


def quoted(value: Any) -> str:
    """A value as YAML in one line, whatever characters are in it."""
    return re.sub(r"[^ -~]", lambda m: f"\\U{ord(m[0]):08x}", json.dumps(value, ensure_ascii=False))


def refuse_unused(mode: str, **options: object) -> None:
    """Raises: WrongUse where one of these options was said, which this way of using the verb does not read."""
    odd = [f"--{k.replace('_', '-')}" for k, v in options.items() if is_said(v)]
    if odd:
        raise WrongUse(f"{', '.join(odd)} {'says' if len(odd) == 1 else 'say'} nothing to {mode}; leave "
                       f"{'it' if len(odd) == 1 else 'them'} out")  # fmt: skip


def plain(value: object) -> str:
    """A value as text in which nothing steers the terminal: what files say may be printed, and not obeyed."""
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in str(value))


def say_text(text: str) -> None:
    """Print what a model or a file says: as it is into a file or a pipe, and so that it steers no terminal."""
    typer.echo(plain(text) if sys.stdout.isatty() else text, color=True)  # or typer drops escape sequences in pipes


def say_json(value: Any) -> None:
    """Print one JSON value; numbers that are not finite, which JSON has not, as null."""
    from plures.core.events import finite

    typer.echo(json.dumps(finite(value), indent=1, default=_path, allow_nan=False))


def say_plan(plan: Any, json: bool) -> None:
    """Print a flow's Plan, as people read it or as JSON."""
    say_json(asdict(plan)) if json else typer.echo("\n".join(plan.lines()))


def told(version: Any) -> dict[str, Any]:
    """A version as JSON: all its fields, and `ref`, which is name@3."""
    return {"ref": version.ref, **vars(version)}


def _path(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns; numbers to the right."""
    cells = [[plain(c) for c in row] for row in rows]
    widths = [max(len(h), *(len(r[i]) for r in cells)) if cells else len(h) for i, h in enumerate(header)]
    right = [bool(rows) and all(isinstance(r[i], (int, float)) for r in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()

    typer.echo(line(header))
    for row in cells:
        typer.echo(line(row))
