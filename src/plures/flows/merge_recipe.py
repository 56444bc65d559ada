"""mergekit's recipes: read strictly (an unknown key is an error with the nearest one) and resolved tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from plures.core.errors import BadInput, WrongUse, disk, nearest

KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_TOP = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
        "tokenizer", "chat_template", "name", "sweep", "align")  # fmt: skip
FLEET = "::"
"""Between a fleet's folder and a variant of it: `acme.fleet::support@3`."""
MOST_PARTS, DEEPEST = 100_000, 50  # of a recipe's YAML, what an alias stands for counted each time
_POWER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", re.ASCII)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Model:
    """A model of a recipe: its folder or hub id, a LoRA adapter upon it or "", and what is said of it."""

    path: str
    lora: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """As in the recipe."""
        return f"{self.path}+{self.lora}" if self.lora else self.path


@dataclass(frozen=True)
class Slice:
    """Layers of the result: of each source as many."""

    sources: tuple[Model, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Token:
    """Where a token's rows come from: `model` ("": by the rule) and its token, by text or number; or zeros. `force`
    takes it for the models too that have the token themselves."""

    model: str = ""
    token: str = ""
    number: int = -1
    zero: bool = False
    force: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """Which tokens the result has: `base`, `union`, or those of a model; and a multiple that its rows are padded to."""

    source: str
    tokens: Mapping[str, Token] = field(default_factory=dict)
    multiple: int = 1


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. Without slices all models count for all tensors; `sweep` has a parameter's values, of which each
    makes a result of its own. `align` is "permutation" or ""."""

    method: str
    models: tuple[Model, ...]
    slices: tuple[Slice, ...]
    base: Model | None
    parameters: Mapping[str, Any]
    dtype: str
    tokenizer: Tokenizer | None
    sweep: Mapping[str, list[Any] | int] = field(default_factory=dict)
    align: str = ""
    chat: str = ""

    def sources(self) -> list[Model]:
        """Every model that is read, each once, the base last."""
        said = [*self.models, *(m for s in self.slices for m in s.sources), *([self.base] if self.base else [])]
        return list({m.name: Model(m.path, m.lora) for m in said}.values())


def load(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises: BadInput where it cannot be read, WrongUse for what it may not say."""
    with disk(path, "read"):
        raw = path.read_bytes()
    try:
        text = raw.decode()
        said = yaml.safe_load(text) if _parts(yaml.compose(text, yaml.SafeLoader)) <= MOST_PARTS else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, a number of 5,000 digits
        raise BadInput(f"{str(path)!r} is no YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(said, dict):
        raise BadInput(f"{str(path)!r} is no recipe: it must be a mapping of keys to values, of {MOST_PARTS} at most")
    return parse(said)


def _parts(node: Any, deep: int = 0, left: int = MOST_PARTS) -> int:
    """How many parts a YAML node has, its aliases written out; where they are more than `left`, more than that.

    Raises: ValueError where it is too deep, as an alias to what it stands in is.
    """
    if deep > DEEPEST:
        raise ValueError(f"it is nested deeper than {DEEPEST}, or an alias stands in itself")
    n, value = 1, getattr(node, "value", "")
    inner = [part for pair in value for part in pair] if isinstance(node, yaml.MappingNode) else value
    for part in inner if isinstance(inner, list) else ():
        n += _parts(part, deep + 1, left - n)
        if n > left:
            break
    return n


def parse(said: Any) -> Recipe:
    """The recipe that a mapping says. Raises: WrongUse."""
    _keys(said, _TOP, "the recipe")
    if "merge_method" not in said:
        raise WrongUse("the recipe has no merge_method; say which, e.g. merge_method: ties")
    if ("models" in said) == ("slices" in said):
        raise WrongUse("the recipe has either models or slices, one of them")
    models = tuple(_model(m, "models") for m in _list(said["models"], "models")) if "models" in said else ()
    slices = tuple(_slice(s) for s in _list(said["slices"], "slices")) if "slices" in said else ()
    if "tokenizer" in said and "tokenizer_source" in said:
        raise WrongUse("tokenizer and tokenizer_source say the same: give one of them")
    kind = said.get("out_dtype") or said.get("dtype") or ""
    for key in ("dtype", "out_dtype"):
        if said.get(key) and said[key] not in KINDS:
            raise WrongUse(f"{key} {said[key]!r} is none of {', '.join(KINDS)}.{nearest(str(said[key]), KINDS)}")
    if (align := said.get("align") or "") not in ("", "permutation"):
        raise WrongUse(f"align {align!r} is not 'permutation'; leave it out to merge the models as they are")
    base = _reference(said["base_model"], "base_model") if said.get("base_model") else None
    return Recipe(str(said["merge_method"]), models, slices, base, _mapping(said.get("parameters"), "the recipe"), kind,
                  _tokenizer(said), _sweep(said.get("sweep")), align, _chat(said.get("chat_template")))  # fmt: skip


def _chat(said: Any) -> str:
    """A chat template; "" for that of the model whose tokens the result has."""
    if said is None or said == "auto":
        return ""
    if not isinstance(said, str) or not ("{{" in said or "{%" in said):
        raise WrongUse(f"chat_template is {said!r}; auto (that of the model whose tokens the result has) or the text "
                       "of a Jinja template is meant: mergekit's names for templates are not known here")  # fmt: skip
    return said


def _sweep(said: Any) -> dict[str, list[Any] | int]:
    """Every parameter's values, of all as many: one for each result."""
    if said is None:
        return {}
    if not isinstance(said, dict) or not said:
        raise WrongUse("sweep names parameters with a list of values each, like sweep: {weight: [[1, 0], [0.5, 0.5]]}")
    for key, values in said.items():
        many = values if isinstance(values, int) and not isinstance(values, bool) else (
            len(values) if isinstance(values, list) else 0)  # fmt: skip
        if many < 2:
            raise WrongUse(f"sweep: {key!r} has {values!r}; a list of at least two values is meant, or, of weights of "
                           "two models, how many points lie between them")  # fmt: skip
    lengths = {key: v if isinstance(v, int) else len(v) for key, v in said.items()}
    if len(set(lengths.values())) > 1:
        raise WrongUse(f"sweep has {', '.join(f'{n} values of {k!r}' for k, n in lengths.items())}: the first of each "
                       "make the first result, so give as many of each")  # fmt: skip
    return {str(k): v for k, v in said.items()}


def _tokenizer(said: Mapping[str, Any]) -> Tokenizer | None:
    if said.get("tokenizer_source"):
        return Tokenizer(_named(said["tokenizer_source"], "tokenizer_source"))
    told = said.get("tokenizer")
    if not told:
        return None
    if not isinstance(told, dict):
        return Tokenizer(_named(told, "tokenizer"))
    _keys(told, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
    multiple = told.get("pad_to_multiple_of")
    if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
        raise WrongUse(f"tokenizer: pad_to_multiple_of is {multiple!r}, and a whole number of at least 1 is needed")
    tokens = told.get("tokens") or {}
    if not isinstance(tokens, dict):
        raise WrongUse(f"tokenizer: tokens is {type(tokens).__name__}, and tokens with what is said of them are needed")
    given = {str(t): _token(of, f"tokenizer: token {t!r}") for t, of in tokens.items()}
    return Tokenizer(_named(told.get("source") or "union", "tokenizer"), given, multiple or 1)


def _named(said: Any, where: str) -> str:
    return _reference(said, where).name


def _token(said: Any, where: str) -> Token:
    """What is said of a token."""
    _keys(said, ("source", "force"), where)
    source, force = said.get("source"), said.get("force", False)
    if not isinstance(force, bool):
        raise WrongUse(f"{where}: force is {force!r}, and true or false is meant")
    kind = source.get("kind") if isinstance(source, dict) else None
    if source is None:
        return Token(force=force)
    if kind is None:
        return Token(_named(source, where), force=force)
    if kind == "zero":
        _keys(source, ("kind",), where)
        return Token(zero=True, force=force)
    if kind != "model_token":
        near = nearest(str(kind), ("zero", "model_token"))
        raise WrongUse(f"{where}: kind {kind!r} is none of zero, model_token.{near}")
    _keys(source, ("kind", "model", "token", "token_id"), where)
    number = source.get("token_id", -1)
    odd = isinstance(number, bool) or not isinstance(number, int) or ("token_id" in source and number < 0)
    if source.get("model") is None or ("token" in source) == ("token_id" in source) or odd:
        raise WrongUse(f"{where}: a model_token names a model, and either token or token_id (0 or more)")
    return Token(_named(source["model"], where), str(source.get("token", "")), number, force=force)


def _keys(said: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(said, dict):
        raise WrongUse(f"{where} is {type(said).__name__}, and keys with values are needed")
    for key in said:
        if key not in known:
            raise WrongUse(f"{where} has no key {str(key)!r}.{nearest(str(key), known)} There are: {', '.join(known)}")


def _list(said: Any, where: str) -> list[Any]:
    if not isinstance(said, list) or not said:
        raise WrongUse(f"{where} is {said!r}; a list of at least one is meant")
    return said


def _mapping(said: Any, where: str) -> dict[str, Any]:
    """Parameters by name; none where nothing is said."""
    if said is not None and not isinstance(said, dict):
        raise WrongUse(f"parameters of {where} is {said!r}; names with values are meant, like weight: 0.5")
    return dict(said or {})


def _reference(said: Any, where: str, **more: Any) -> Model:
    """A model by "path", "path+lora", or {model: {path: ..}, lora: ..}."""
    if isinstance(said, dict):
        _keys(said, ("model", "lora"), where)
        path, lora = said.get("model"), said.get("lora")
        path = path.get("path") if isinstance(path, dict) else path
        lora = lora.get("path") if isinstance(lora, dict) else lora
        return Model(_path(path, where), str(lora or ""), **more)
    path, _, lora = _path(said, where).partition("+")
    return Model(path, lora, **more)


def _path(said: Any, where: str) -> str:
    if not said or isinstance(said, bool | list | dict):
        raise WrongUse(f"{where} names no model, but '{said}'; give its folder or hub id")
    return str(said)


def _model(said: Any, where: str) -> Model:
    _keys(said, ("model", "parameters"), f"an entry of {where}")
    if "model" not in said:
        raise WrongUse(f"an entry of {where} names no model")
    entry = f"an entry of {where}"
    return _reference(said["model"], entry, parameters=_mapping(said.get("parameters"), entry))


def _slice(said: Any) -> Slice:
    _keys(said, ("sources", "parameters"), "an entry of slices")
    sources = []
    for source in _list(said.get("sources", []), "sources"):
        _keys(source, ("model", "layer_range", "parameters"), "a source")
        layers = source.get("layer_range")
        if not (isinstance(layers, list) and len(layers) == 2 and all(isinstance(v, int) for v in layers)
                and 0 <= layers[0] < layers[1]):  # fmt: skip
            raise WrongUse(f"layer_range {layers!r} is no pair of a first layer and one behind the last, like [0, 16]")
        sources.append(_reference(source.get("model"), "a source", layers=(layers[0], layers[1]),
                                  parameters=_mapping(source.get("parameters"), "a source")))  # fmt: skip
    if len({b - a for a, b in (s.layers for s in sources if s.layers)}) != 1:
        raise WrongUse("the sources of a slice have layer_ranges of one length")
    return Slice(tuple(sources), _mapping(said.get("parameters"), "an entry of slices"))


def with_base(recipe: Recipe) -> tuple[Model, ...]:
    """The models of a recipe without slices and, as in mergekit, a base_model that is not among them as one more.

    Raises: WrongUse where models have weights of their own and it has none.
    """
    base, models = recipe.base, recipe.models
    if base is None or any(m.name == base.name for m in models):
        return models
    if "weight" not in recipe.parameters and any("weight" in m.parameters for m in models):
        raise WrongUse(f"base_model {base.name!r} is one more model of {recipe.method}, and it is not said how much it "
                       "counts: list it under models with a weight, or leave base_model out")  # fmt: skip
    return (*models, base)


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor is of."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def behind(name: str) -> str:
    """What stands behind the layer's number in a tensor's name."""
    found = _LAYER.search(name)
    assert found is not None
    return name[found.end(1) :].removeprefix(".")


def moved(name: str, layer: int) -> str:
    """The tensor of the same kind in another layer."""
    found = _LAYER.search(name)
    assert found is not None
    return name[: found.start(1)] + str(layer) + name[found.end(1) :]


def value(said: Any, name: str, t: float, where: str) -> float:
    """A parameter for a tensor: a number; a list of numbers along the layers (t in [0, 1]); or a list of values by
    filters, parts of tensors' names, of which the first that fits counts. Raises: WrongUse."""
    said = [_number(v) for v in said] if isinstance(said, list) else _number(said)
    if isinstance(said, bool):
        return float(said)
    if isinstance(said, int | float):
        return float(said)
    if isinstance(said, list) and said and all(isinstance(v, int | float) and not isinstance(v, bool) for v in said):
        at = t * (len(said) - 1)
        low = min(int(at), len(said) - 1)
        high = min(low + 1, len(said) - 1)
        return float(said[low] + (said[high] - said[low]) * (at - low))
    if isinstance(said, list) and said and all(isinstance(v, dict) for v in said):
        return value(_fitting(said, name, where), name, t, where)
    raise WrongUse(f"{where} is {said!r}; a number, a list of numbers along the layers, or values by filter are meant")


def _number(said: Any) -> Any:
    """`1e-8` as the number that is meant, which YAML 1.1 takes for a word; all else as it is."""
    return float(said) if isinstance(said, str) and _POWER.fullmatch(said) else said


def word(said: Any, name: str, where: str) -> str:
    """A parameter that is a word for a tensor: one for all, or a list of words by filters, as in `value`. Raises:
    WrongUse."""
    if isinstance(said, str):
        return said
    if isinstance(said, list) and said and all(isinstance(v, dict) for v in said):
        return word(_fitting(said, name, where), name, where)
    raise WrongUse(f"{where} is '{said}'; a word, or words by filter are meant")


def _fitting(said: list[dict[str, Any]], name: str, where: str) -> Any:
    """The value of the first filter that is part of a tensor's name. Raises: WrongUse where none is."""
    for entry in said:
        _keys(entry, ("filter", "value"), where)
        if entry.get("filter") in (None, "*") or str(entry["filter"]) in name:
            return entry.get("value")
    raise WrongUse(f"{where}: no filter fits {name!r}; end the list with a value without filter")
