"""The folder is the registry: a public module of a capability folder is a method, and nothing else names it."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, overload

from plures.core.errors import RecipeErrors, WrongUse, nearest

Status = Literal["trial", "stable", "retired"]


@dataclass(frozen=True)
class Card:
    """What a listing says of a method, read from its source without importing it.

    Status: `trial` (conformance green) -> `stable` (an oracle and one end-to-end result) -> `retired`.
    """

    name: str
    kind: str
    title: str
    paper: str
    summary: str
    status: Status
    when: str
    module: str


def method(*, paper: str, title: str, status: Status = "trial", when: str = "") -> Callable[[type], type]:
    """Mark the one frozen dataclass of a module as its method.

    Arguments are literals, because listings read them with `ast`.

    Args:
        paper: `arXiv:2306.01708`, or a DOI, or "none".
        title: the paper's title.
        status: see `Card`.
        when: one honest line on when to use it and when not.
    """

    def mark(cls: type) -> type:
        params = getattr(cls, "__dataclass_params__", None)
        assert is_dataclass(cls) and params is not None and params.frozen, f"{cls.__name__} must be a frozen dataclass"
        module = cls.__module__
        cls.card = Card(  # type: ignore[attr-defined]
            module.rpartition(".")[2],
            module.rpartition(".")[0],
            title,
            paper,
            first_line(cls.__doc__),
            status,
            when,
            module,
        )
        return cls

    return mark


def first_line(doc: str | None) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join(inspect.cleandoc(doc or "").partition("\n\n")[0].split())


def option_help(cls: type) -> dict[str, str]:
    """The `Options:` section of a method's docstring, by option; the text runs to the next option or section."""
    out: dict[str, str] = {}
    inside, current = False, ""
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        if line.rstrip() == "Options:":
            inside = True
        elif inside and line and not line.startswith(" "):
            break
        elif inside and line.startswith("    ") and not line.startswith("     ") and ":" in line:
            current, _, text = line.strip().partition(":")
            out[current] = text.strip()
        elif inside and current and line.strip():
            out[current] += " " + line.strip()
    return out


def options_of(cls: type) -> dict[str, tuple[str, Any, str]]:
    """Every option of a method as `(type in words, default, help)`."""
    hints, text = get_type_hints(cls), option_help(cls)
    out = {}
    for f in fields(cls):
        kind = hints[f.name]
        out[f.name] = (_words(kind), None if f.default is MISSING else f.default, text.get(f.name, ""))
    return out


def _words(kind: Any) -> str:
    """A type as people read it: float, 'a' | 'b', float | 'inf'."""
    if get_origin(kind) is Literal:
        return " | ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(map(_words, get_args(kind)))
    return str(getattr(kind, "__name__", kind))


class Folder(Mapping[str, type]):
    """The methods of one capability folder, by name: `adapts["mos"]` imports that one file.

    Plug-ins from other packages join through the entry-point group of the folder's name (`plures.adapt`).
    """

    def __init__(self, package: str, verb: str) -> None:
        self.package, self.verb = package, verb

    def _path(self) -> Path:
        return Path(__file__).parent.parent / self.package.rpartition(".")[2]

    def _plugins(self) -> dict[str, Any]:
        from importlib.metadata import entry_points  # slow to import, and most commands name methods of ours alone

        return {e.name: e for e in entry_points(group=self.package)}

    def _modules(self) -> list[str]:
        return sorted(m.name for m in pkgutil.iter_modules([str(self._path())]) if not m.name.startswith("_"))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._modules(), *self._plugins()}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in set(self)

    def __getitem__(self, name: str) -> type:
        if name in self._modules():
            module = importlib.import_module(f"{self.package}.{name}")
            found = [
                c
                for c in vars(module).values()
                if isinstance(c, type) and "card" in vars(c) and c.__module__ == module.__name__
            ]
            assert len(found) == 1, f"{module.__name__} must hold exactly one @method class, found {len(found)}"
            return found[0]
        plugins = self._plugins()
        if name in plugins:
            loaded = plugins[name].load()
            if not (isinstance(loaded, type) and hasattr(loaded, "card")):
                raise WrongUse(f"plug-in {plugins[name].value!r} of {self.package} is not a class marked with @method")
            card = replace(loaded.card, name=name, kind=self.package)  # tensors are drawn by this name, too
            loaded.card = card
            return loaded
        raise WrongUse(f"no {self.verb} method named {name!r}.{nearest(name, self)} There are: {', '.join(self)}")

    @overload
    def get(self, name: str, /) -> type | None: ...
    @overload
    def get(self, name: str, /, default: Any) -> Any: ...
    def get(self, name: str, /, default: Any = None) -> Any:
        """The method, or `default` where there is none of that name."""
        if name in self:
            return self[name]
        return default

    def make(self, name: str, **options: Any) -> Any:
        """The method `name` with `options`; every wrong option is named at once."""
        cls = self[name]
        known = options_of(cls)
        problems = [
            f"{name}.{key} is not an option of {name}.{nearest(key, known)} There are: {', '.join(known)}"
            for key in options
            if key not in known
        ]
        hints = get_type_hints(cls)
        clean = {}
        for key in (k for k in options if k in known):
            try:
                clean[key] = _scalar(options[key], hints[key])
            except (TypeError, ValueError):
                problems.append(f"{name}.{key} must be {known[key][0]}, got {options[key]!r}")
        if problems:
            raise RecipeErrors(problems, f"{self.verb} options")
        return cls(**clean)

    def cards(self) -> list[Card]:
        """All methods' cards; the files are parsed, not imported."""
        own = [_card_from_source(self._path() / f"{name}.py", name, self.package) for name in self._modules()]
        others = sorted(set(self._plugins()) - set(self._modules()))
        return own + [self[n].card for n in others]  # type: ignore[attr-defined]


def _scalar(value: Any, kind: Any) -> Any:
    """`value` as the scalar type `kind`, or the first that fits of several, without loss; ValueError or TypeError."""
    if get_origin(kind) in (Union, UnionType):
        for one in get_args(kind):
            with suppress(TypeError, ValueError):
                return _scalar(value, one)
        raise TypeError
    if get_origin(kind) is Literal:
        if any(value == v and type(value) is type(v) for v in get_args(kind)):
            return value
        raise ValueError
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise TypeError
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        return tuple(_scalar(v, inner) for v in value) if isinstance(value, list | tuple) else _scalar(None, inner)
    if isinstance(value, bool) or (kind is str) != isinstance(value, str):
        raise TypeError
    if kind is str:
        return value
    number = float(value)
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError
    return int(number) if kind is int else number


def _card_from_source(path: Path, name: str, package: str) -> Card:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "method":
                said = {k.arg: ast.literal_eval(k.value) for k in mark.keywords}
                return Card(
                    name, package, said["title"], said["paper"], first_line(ast.get_docstring(node)),
                    said.get("status", "trial"), said.get("when", ""), f"{package}.{name}",
                )  # fmt: skip
    raise AssertionError(f"{path} holds no class under @method")
