"""The recipe of a run: YAML to plain dataclasses, with everything that is wrong said at once.

A recipe's shape is a stdlib dataclass whose fields come from `opt`: scalars, `Literal`, `Optional`, lists and tuples,
`dict[str, scalar]` for a method's options, and dataclasses of these. pydantic checks types without coercion, limits
are checked here. YAML is read as version 1.2: `1e-3` is a number, `no` a string, a key twice an error.
"""

from __future__ import annotations

import copy
import json
import operator
import re
import reprlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from plures.core.errors import BadInput, RecipeErrors, WrongUse, disk, nearest

T = TypeVar("T")
REQUIRED: Any = MISSING
_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least {}"),
    "gt": (operator.gt, "above {}"),
    "le": (operator.le, "at most {}"),
    "lt": (operator.lt, "below {}"),
    "choices": (lambda value, allowed: value in allowed, "one of {}"),
}
_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxdict, _short.maxlist = 2, 80, 80, 4, 6


def opt(default: Any = REQUIRED, help: str = "", *, default_factory: Any = MISSING, **limits: Any) -> Any:
    """A dataclass field with a sentence of help and limits (`ge`, `gt`, `le`, `lt`, `choices`), in a list of each item.

    A list or dict as default is copied for each recipe, a class is called; `REQUIRED`, or nothing, is no default.
    """
    unknown = set(limits) - set(_LIMITS)
    assert not unknown, f"limits are {', '.join(_LIMITS)}, got {sorted(unknown)}"
    metadata = {"help": help, "limits": limits}
    if default_factory is not MISSING or isinstance(default, type):
        return field(default_factory=default if default_factory is MISSING else default_factory, metadata=metadata)
    assert not is_dataclass(default), f"give the class {type(default).__name__}: a section's defaults are its class's"
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    assert default is MISSING or not _broken(default, limits), f"the default {default!r} breaks its own limits {limits}"
    return field(default=default, metadata=metadata)


def load(
    schema: type[T], source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), where: str = "recipe"
) -> T:
    """The recipe in `source`, a YAML file or a mapping, with `a.b=c` overrides applied in their order.

    Raises: BadInput for a file that cannot be read as one YAML mapping, WrongUse for a source of another kind, and
        RecipeErrors with every wrong key and value at once.
    """
    if isinstance(source, Mapping):
        data = copy.deepcopy(dict(source))
    elif isinstance(source, Path) or (isinstance(source, str) and "\n" not in source and "\0" not in source):
        data = read_yaml(Path(source), where)
        where = f"{where} {str(source)!r}"
    else:
        raise WrongUse(f"{where}: {_short.repr(source)} is neither a path nor a mapping; write YAML to a file first")
    problems: dict[str, str] = {}
    for text in overrides:
        _override(schema, data, text, problems)
    problems |= (odd := _odd(data, ""))
    value = None if odd else _validate(schema, data, problems)
    _check_limits(schema, data, "", problems)
    if problems:
        raise RecipeErrors(list(problems.values()), where)
    return cast(T, value)


def to_dict(recipe: Any) -> Any:
    """The recipe as dicts, lists and scalars, every field in the order of its dataclass."""
    if is_dataclass(recipe):
        return {f.name: to_dict(getattr(recipe, f.name)) for f in fields(recipe) if f.init}
    if isinstance(recipe, Mapping):
        return {str(k): to_dict(v) for k, v in recipe.items()}
    if isinstance(recipe, list | tuple):
        return [*map(to_dict, recipe)]
    return str(recipe) if isinstance(recipe, Path) else recipe


def dump(recipe: Any) -> str:
    """The resolved recipe as YAML: all fields, in stable order; loads back to an equal recipe."""
    return _to_yaml(to_dict(recipe), flow=False)


def template(schema: type) -> str:
    """A commented YAML recipe: each field's help, type and limits above it, its default as its value.

    A required field stands without a value and is marked; once these are filled the text loads.
    """
    return "\n".join(_template_lines(schema)).strip() + "\n"


def schema_paths(schema: type | None) -> list[str]:
    """Every dotted key of a recipe, sections included, in order."""
    return [p for f, k in _fields(schema) for p in (f.name, *(f"{f.name}.{q}" for q in schema_paths(_section(k))))]


def _loader() -> Any:
    """A safe YAML loader with the scalars of YAML 1.2, without duplicate keys and without aliases."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # they make a few lines endless, or gigabytes
                raise yaml.MarkedYAMLError(None, None, "aliases are not allowed; write the value out", self.get_mark())
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key.value, str) and key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
                seen.add(key.value if isinstance(key.value, str) else None)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {}
    for tag, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)
    Loader.add_constructor("tag:yaml.org,2002:int", lambda _, n: int(n.value, 0 if set(n.value) & {"x", "o"} else 10))
    return Loader


def read_yaml(path: Path, where: str) -> dict[str, Any]:
    """The mapping in a YAML file; {} where the file says nothing, so that what is required gets named."""
    with disk(path, "read"):
        raw = path.read_bytes()
    try:
        found = _parse(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{where} {str(path)!r} is not UTF-8 text: line {line}; save it as UTF-8") from error
    except ValueError as error:
        raise BadInput(f"{where} {str(path)!r} is not YAML: {error}") from error
    if found is not None and not isinstance(found, dict):
        raise BadInput(f"{where} {str(path)!r} must be a mapping of keys to values, got {_say(found)}")
    return found or {}


def _parse(text: str) -> Any:
    """The value of one YAML document. Raises: ValueError, in one line with line and column."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, RecursionError) as error:
        place = f"line {m.line + 1}, column {m.column + 1}: " if (m := getattr(error, "problem_mark", None)) else ""
        raise ValueError(place + " ".join(str(getattr(error, "problem", None) or error).split())) from error


def _scalar(text: str) -> Any:
    """An override's value: a plain scalar as YAML reads it, or a quoted, list or mapping value in flow style."""
    import yaml

    if text[:1] in ("[", "{", "'", '"'):
        return _parse(text)
    loader = _loader()("")
    return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))


def _to_yaml(value: Any, flow: bool) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    # 1.1 takes `1e-3` for a string and would write the string "1e-3" bare; here it is a number, so it needs quotes
    looks = re.compile(r"^[-+]?[0-9._]+([eE][-+]?[0-9]+)?$|^0[ox][0-9a-fA-F]+$")
    Dumper.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}
    Dumper.add_implicit_resolver("tag:plures,looks-like-number", looks, list("-+.0123456789"))
    form: Any = {"default_flow_style": flow, "default_style": '"' if flow and "\n" in str(value) else None}
    text: str = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**9, **form)
    return text.removesuffix("...\n").rstrip("\n") if flow else text


def _override(schema: type, data: dict[str, Any], text: str, problems: dict[str, str]) -> None:
    """Put `a.b=c` into `data`; below a `dict[str, …]` the rest of the path is one key."""
    path, equals, value = text.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        problems[f"={text}"] = f"{text!r} is not an override; write one as path.to.key=value"
        return
    room, kind = data, cast(Any, schema)
    for i, part in enumerate(parts[:-1]):
        if get_origin(_plain(kind)) is dict:
            parts[i:] = [".".join(parts[i:])]
            break
        found, kind = _child(kind, part)
        if room.get(part) is None:  # one key of a mapping leaves the rest of its default as it was
            default = to_dict(_default(found)) if found is not None else None
            room[part] = default if isinstance(default, dict) else {}
        room = room[part]
        if not isinstance(room, dict):
            problems[f"={text}"] = f"{path.strip()}: cannot be set, because {part} is {_say(room)} and not a mapping"
            return
    try:
        room[parts[-1]] = _scalar(value.strip())
    except ValueError as error:
        problems[f"={text}"] = f"{path.strip()}: {value!r} is not a YAML value: {error}"


def _odd(data: Any, at: str) -> dict[str, str]:
    """What in `data` cannot be JSON: keys must be strings, which JSON would make them without a word."""
    out: dict[str, str] = {}
    named = isinstance(data, Mapping)
    for key, value in data.items() if named else enumerate(data) if isinstance(data, list | tuple) else ():
        path = f"{at}.{key}".removeprefix(".") if named else f"{at}[{key}]"
        if named and not isinstance(key, str):
            out[path] = f"{path}: the key {_say(key)} must be a string; put it in quotes"
        out |= _odd(value, path)
    if not (data is None or isinstance(data, bool | int | float | str | Path | Mapping | list | tuple)):
        out[at] = f"{at}: got {_say(data)}; it must be text, a number, true, false, null, a list or a mapping"
    return out


def _validate(schema: type, data: dict[str, Any], problems: dict[str, str]) -> Any:
    """The dataclass of `data` by pydantic, or one problem for each path that is wrong."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    # JSON is the strict mode that still takes mappings for dataclasses and lists for tuples; the tuple around the
    # schema is there because pydantic lets no configuration be given for a dataclass at the top
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    data = _filled(schema, to_dict(data))
    try:
        return TypeAdapter(tuple[schema], config=config).validate_json(json.dumps([data]))[0]  # type: ignore[valid-type]
    except ValidationError as error:
        for e in error.errors(include_url=False):
            steps, value = _steps(data, e["loc"][1:], e["type"] == "missing")
            path = _dotted(steps)
            said = e.get("ctx", {}).get("error") if e["type"] in ("value_error", "assertion_error") else None
            problems[path] = f"{path}: {said}".removeprefix(": ") if said else _problem(schema, steps, value, e["type"])
        return None


def _filled(schema: type, data: Any) -> Any:
    """`data` with every absent section as an empty one, so that what is required in it gets named by its path."""
    for f, kind in _fields(schema) if isinstance(data, dict) else ():
        if _section(kind) is kind and f.default_factory in (kind, MISSING) and f.default is MISSING:
            data[f.name] = _filled(kind, data.get(f.name, {}))
    return data


def _steps(data: Any, loc: Sequence[str | int], missing: bool) -> tuple[list[str | int], Any]:
    """pydantic's location without the tags that it adds for the members of a union, and the value there."""
    out: list[str | int] = []
    for i, part in enumerate(loc):
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            if not (missing and isinstance(part, str) and i == len(loc) - 1):
                continue
            data = None
        out.append(part)
    return out, data


def _problem(schema: type, steps: list[str | int], value: Any, fault: str) -> str:
    """One line on what is wrong at `steps`: path, value, what is allowed, the nearest key."""
    path, kind, owner, found = _dotted(steps), cast(Any, schema), cast(Any, None), cast("Field[Any] | None", None)
    for step in steps:
        owner, (found, kind) = kind, _child(kind, step)
    if kind is None:
        known, key = [f.name for f, _ in _fields(_section(owner))], str(steps[-1])
        far = next((f" Did you mean {p!r}?" for p in schema_paths(schema) if p.endswith(f".{key}")), "")
        near = nearest(key, known) or far or nearest(path, schema_paths(schema))
        return f"{path}: {_say(value)} is given to a key that does not exist.{near} There are: {', '.join(known)}"
    allowed = "finite" if fault == "finite_number" else _words(kind, found)
    if value is None and found is not None and (fault == "missing" or _default(found) is MISSING):
        return f"{path}: is required, {allowed}" + f" ({found.metadata.get('help')})" * bool(found.metadata.get("help"))
    near = nearest(value, map(str, get_args(kind))) if get_origin(kind) is Literal else ""
    return f"{path}: got {_say(value)}; it must be {allowed}.{near}".removesuffix(".")


def _check_limits(schema: type, data: Any, at: str, problems: dict[str, str]) -> None:
    """The limits of every field whose value has the right type."""
    for f, kind in _fields(schema):
        path = f"{at}{f.name}"
        if not isinstance(data, Mapping) or data.get(f.name) is None or path in problems:
            continue
        section, value = _section(kind), data[f.name]
        if section is not None:
            for i, item in enumerate(value) if isinstance(value, list | tuple) else [(None, value)]:
                _check_limits(section, item, f"{path}." if i is None else f"{path}[{i}].", problems)
        elif _broken(value, f.metadata.get("limits", {})):
            near = nearest(value, map(str, f.metadata["limits"].get("choices", ())))
            problems[path] = f"{path}: got {_say(value)}; it must be {_words(kind, f)}.{near}".removesuffix(".")


def _broken(value: Any, limits: Mapping[str, Any]) -> bool:
    """Whether a limit does not hold for `value`, or for an item of it; False where they cannot be compared."""
    try:
        if isinstance(value, list | tuple):
            return any(_broken(item, limits) for item in value)
        return value is not None and not all(_LIMITS[name][0](value, bound) for name, bound in limits.items())
    except TypeError:
        return False


def _fields(schema: type | None) -> Iterator[tuple[Field[Any], Any]]:
    """Each field that a recipe may set, with its resolved type."""
    hints = get_type_hints(schema) if schema is not None else {}
    return ((f, hints[f.name]) for f in (fields(cast(Any, schema)) if hints else ()) if f.init)


def _plain(kind: Any) -> Any:
    """`X` of `X | None`; other types as they are."""
    rest = [k for k in get_args(kind) if k is not NoneType] if get_origin(kind) in (Union, UnionType) else []
    return rest[0] if len(rest) == 1 else kind


def _section(kind: Any) -> Any:
    """The dataclass that `kind` is, or is a list of, or may be; None for a leaf."""
    for option in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        item = get_args(option)[0] if get_origin(option) in (list, tuple) else option
        if isinstance(item, type) and is_dataclass(item):
            return item
    return None


def _child(kind: Any, key: str | int) -> tuple[Field[Any] | None, Any]:
    """The field and the type at `key` below `kind`; (None, None) where there is no such key."""
    plain = _plain(kind)
    args = get_args(plain)
    if isinstance(key, int):
        return None, args[0] if len(args) == 1 or args[-1] is ... else args[min(key, len(args) - 1)]
    if get_origin(plain) is dict:
        return None, args[1]
    return next(((f, k) for f, k in _fields(_section(kind)) if f.name == key), (None, None))


def _default(f: Field[Any]) -> Any:
    """The default of a field; MISSING where it is required, or is a section with something required in it."""
    try:
        return f.default_factory() if f.default_factory is not MISSING else f.default
    except TypeError:
        return MISSING


def _words(kind: Any, f: Field[Any] | None = None) -> str:
    """The type in words, with the field's limits: `an integer, at least 1`."""
    limits = f.metadata.get("limits", {}).items() if f is not None else ()
    said = [_LIMITS[k][1].format(", ".join(map(repr, v)) if k == "choices" else v) for k, v in limits]
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        text = " or ".join(_words(k) for k in args)
    elif origin is Literal:
        text = "one of " + ", ".join(map(repr, args))
    elif origin in (list, tuple) and (origin is list or args[-1] is ...):
        text = f"a list, each {_words(args[0])}"
    elif origin is tuple:
        text = f"a list of {len(args)}: {', '.join(map(_words, args))}"
    elif origin is dict or kind is dict:
        text = "a mapping" + (f", each value {_words(args[1])}" if args and args[1] is not Any else "")
    elif isinstance(kind, type) and is_dataclass(kind):
        text = "a mapping with the keys " + ", ".join(g.name for g, _ in _fields(kind))
    else:
        text = "any value" if kind is Any else _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
    return ", ".join([text, *said])


def _say(value: Any) -> str:
    """The value in quotes, with its type where the quotes would hide it."""
    if isinstance(value, str):
        return f"{_short.repr(value)} (text)"
    return f"'{json.dumps(value) if value is None or isinstance(value, bool) else _short.repr(value)}'"


def _dotted(steps: Sequence[str | int]) -> str:
    return "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps).removeprefix(".")


def _template_lines(schema: type) -> Iterator[str]:
    for f, kind in _fields(schema):
        section = _section(kind)
        note = "required; " * (_default(f) is MISSING) + ("" if kind is section else _words(_plain(kind), f))
        yield from ("", *(f"# {line}" for line in (f.metadata.get("help"), note.removesuffix("; ")) if line))
        if kind is section:
            yield f"{f.name}:"
            yield textwrap.indent("\n".join(_template_lines(section)), "  ")
        else:
            yield f"{f.name}:" if _default(f) is MISSING else f"{f.name}: {_to_yaml(to_dict(_default(f)), flow=True)}"
            if section is not None:
                yield textwrap.indent("\n".join(_template_lines(section)), "#   ")
