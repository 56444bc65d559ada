"""Variants as Hugging Face adapter folders, both ways, strict.

A folder is `adapter_config.json`, `adapter_model.safetensors`, `README.md` and `plures.json`. A variant of method
`lora` is written as PEFT's own LoRA, so that any LoRA server loads it as it is; every other method is written as
PEFT type PLURES, which needs `import plures`, and `as_lora` turns each low-rank one into plain LoRA without loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plures.adapt import adapts
from plures.adapt._lay import Laid, lay
from plures.bridges.on_model import PREFIX
from plures.bridges.peft import FORMAT_VERSION
from plures.core.errors import BadInput, PluresError, WrongUse, disk
from plures.core.units import lora_alpha, lora_scale
from plures.tensors import safe
from plures.tensors.site import Site, grouped
from plures.tensors.together import new_folder
from plures.tensors.variant import BaseRef, Variant, from_flat

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "plures.json"
Shapes = Mapping[str, tuple[int, int]]  # site -> (out, into), of the base


# ---------------------------------------------------------------- variant -> folder


def write_folder(variant: Variant, folder: Path, *, name: str = "") -> None:
    """Write `variant` as a Hugging Face adapter folder, which is whole or not there.

    Raises: WrongUse where `folder` exists and is not empty; DiskTrouble.
    """
    keys = _lora_keys(variant) if variant.method == "lora" else _plures_keys(variant)
    config = _lora_config(variant) if variant.method == "lora" else _plures_config(variant)
    manifest = variant.manifest() | {"tensors": {k: safe.tensor_hash(t) for k, t in keys.items()}}
    with new_folder(folder) as part:
        for file, text in (
            (CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n"),
            (MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n"),
            ("README.md", model_card(variant, name)),
        ):
            safe.write_bytes(part / file, text.encode())
        safe.write(part / WEIGHTS, keys, {"format": "pt"})


def _extra_keys(variant: Variant) -> dict[str, Tensor]:
    return {f"{PREFIX}{k}": t for k, t in variant.extra.items()}


def _plures_keys(variant: Variant) -> dict[str, Tensor]:
    """PEFT's names: own tensors at their site, each pool at the first site of its group."""
    out = {f"{PREFIX}{s}.plures_own.{k}": t for s, leaves in variant.own.items() for k, t in leaves.items()}
    for group, leaves in variant.pool.items():
        out |= {f"{PREFIX}{_owner(variant, group)}.plures_pool.{k}": t for k, t in leaves.items()}
    return out | _extra_keys(variant)


def _owner(variant: Variant, group: str) -> str:
    return next(s.name for s in variant.sites if variant.group_of[s.name] == group and s.at == 0)


def _lora_keys(variant: Variant) -> dict[str, Tensor]:
    out = {f"{PREFIX}{s}.lora_{k}.weight": t for s, leaves in variant.own.items() for k, t in leaves.items()}
    return out | _extra_keys(variant)


def _targets(variant: Variant) -> list[str]:
    """Short names where the variant is known to adapt every site that bears them (servers like these), else full names.

    It is known where we trained it on all layers and by short names; an imported one may stand on a few layers only.
    """
    chosen = variant.provenance.get("targets", ())
    short = bool(chosen) and not isinstance(chosen, str) and not any("." in name for name in chosen)
    whole = not variant.provenance.get("layers") and (chosen == "all-linear" or short)
    return sorted({s.name.rpartition(".")[2] if whole else s.name for s in variant.sites})


def _common_config(variant: Variant) -> dict[str, Any]:
    return {
        "base_model_name_or_path": variant.base.name,
        "revision": variant.base.revision or None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "target_modules": _targets(variant),
        "bias": "none",
        "modules_to_save": sorted({k.rpartition(".")[0] for k in variant.extra}) or None,
    }


def _plures_config(variant: Variant) -> dict[str, Any]:
    own = {
        "peft_type": "PLURES",
        "method": variant.method,
        "options": dict(variant.options),
        "format_version": FORMAT_VERSION,
    }
    return _common_config(variant) | own


def _lora_config(variant: Variant) -> dict[str, Any]:
    method = adapts.make("lora", **variant.options)
    ranks = {s: int(leaves["A"].shape[0]) for s, leaves in variant.own.items()}
    top = max(method.r, *ranks.values())  # servers make room by `r` alone, and scale every site by `lora_alpha`
    odd, alpha = {s: r for s, r in ranks.items() if r != top}, lora_alpha(method.scale, top, method.rslora)
    return _common_config(variant) | {
        "peft_type": "LORA", "r": top, "lora_alpha": method.alpha if top == method.r else alpha, "lora_dropout": 0.0,
        "fan_in_fan_out": False, "use_rslora": method.rslora, "init_lora_weights": True, "rank_pattern": odd,
        "alpha_pattern": {s: lora_alpha(method.scale, r, method.rslora) for s, r in odd.items()},
    }  # fmt: skip


def model_card(variant: Variant, name: str = "") -> str:
    """The README.md of an adapter folder: what it is, how to load it, where it came from."""
    plain = variant.method == "lora"
    options = ", ".join(f"{k}={v}" for k, v in variant.options.items()) or "defaults"
    import_us = "" if plain else "import plures.bridges.peft  # registers PEFT's type PLURES\n"
    load = (
        f"{import_us}from peft import AutoPeftModelForCausalLM\n"
        "model = AutoPeftModelForCausalLM.from_pretrained('this/folder')"
    )
    note = "" if plain else (
        "\nPlain PEFT cannot load this folder without `import plures.bridges.peft`. `plures export --as lora` writes "
        "one that needs nothing of ours.\n"
    )  # fmt: skip
    facts = "\n".join(
        f"- {k}: {json.dumps(v, default=str)}" for k, v in sorted(variant.provenance.items()) if k != "recipe"
    )
    return (
        f"---\nbase_model: {variant.base.name}\nlibrary_name: peft\ntags:\n- plures\n- {variant.method}\n---\n\n"
        f"# {name or 'A variant'}\n\nMethod `{variant.method}` ({options}) on `{variant.base.name}`.\n\n"
        f"```python\n{load}\n```\n{note}\n## Where it came from\n\n{facts or '- not recorded'}\n"
    )


# ---------------------------------------------------------------- folder -> variant


_STRANGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, re.error)


def read_folder(folder: Path, base: BaseRef, shapes: Shapes, whole: Mapping[str, tuple[int, ...]]) -> Variant:
    """The variant in an adapter folder: ours, one saved by PEFT, or a plain PEFT LoRA.

    `shapes` are the base's linear maps and `whole` the shapes of all its tensors, against which every tensor of the
    folder is checked; a missing or an extra tensor is an error.
    Raises: BadInput for a damaged folder, a pickle, an adapter of another base or of an unknown kind.
    """
    if not folder.is_dir():
        raise BadInput(f"{str(folder)!r} is no folder")
    if not (folder / WEIGHTS).is_file():
        for pickle in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*")):
            safe.refuse_pickle(pickle)
        inner = sorted([*folder.glob(f"*/{WEIGHTS}"), *folder.glob(f"*/*/{WEIGHTS}")])
        hint = f"; there is one in it: {str(inner[0].parent)!r} ({len(inner)} in all)" if inner else ""
        raise BadInput(f"{str(folder)!r} is no adapter folder: it has no {WEIGHTS}{hint}")
    try:
        return _read(folder, base, shapes, whole)
    except PluresError:
        raise
    except _STRANGE as error:  # a value of a kind that no question here expects: the files are anybody's
        raise BadInput(f"{str(folder)!r} is damaged: {CONFIG} or {MANIFEST} holds a value of the wrong kind "
                       f"({type(error).__name__}: {str(error)[:200]})") from error  # fmt: skip


def _read(folder: Path, base: BaseRef, shapes: Shapes, whole: Mapping[str, tuple[int, ...]]) -> Variant:
    config = _json(folder / CONFIG)
    tensors = safe.read(folder / WEIGHTS)
    kind = config.get("peft_type")
    if kind not in ("PLURES", "LORA"):
        raise BadInput(f"{str(folder)!r} holds an adapter of type {kind!r}; Plures reads LORA and PLURES. "
                       "Other PEFT types that add to the weight: use PEFT's convert_to_lora first.")  # fmt: skip
    ours = folder / MANIFEST
    said = _json(ours) if ours.is_file() else None
    if said is not None:
        hashes, told = said.get("tensors"), said.get("base")
        if not isinstance(hashes, dict) or not isinstance(told, dict):
            raise BadInput(f"{str(ours)!r} is damaged: it names no tensors or no base")
        if base.hash and told.get("hash") and told["hash"] != base.hash:
            raise BadInput(f"{str(folder)!r} is an adapter of another base: made for {told.get('name')!r} "
                           f"({told['hash'][:12]}), this fleet's is {base.name!r} ({base.hash[:12]})")  # fmt: skip
        _check_hashes(folder, tensors, hashes)
        plain = said.get("method") == "lora"
        facts = {} if plain else {"method": said.get("method"), "options": said.get("options")}
        _agree(folder, config, {"peft_type": "LORA" if plain else "PLURES"} | facts)
    if config.get("bias", "none") != "none":
        raise BadInput(f"{str(folder)!r} trains biases (bias={config['bias']!r}), which a variant does not hold; "
                       "merge it into the base with PEFT")  # fmt: skip
    if kind == "LORA":
        variant = _from_lora(folder, config, tensors, ours=said is not None)
    else:
        variant = _from_plures(folder, config, tensors, shapes)
    if said is not None:  # the manifest knows sites, groups and provenance better than PEFT's config does
        variant = from_flat(said | {"tensors": None}, variant.flat(), str(folder))
        if kind == "LORA":
            scales = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
            _agree(folder, config, {k: v for k, v in _lora_config(variant).items() if k in scales})
    check_shapes(repr(str(folder)), variant, shapes)
    _check_whole(folder, variant, config.get("modules_to_save") or (), whole)
    return replace(variant, base=base)


def _agree(folder: Path, config: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """PEFT's config and our manifest say the same of what the tensors mean."""
    for key, value in want.items():
        if (config.get(key) or None) != (value or None):
            raise BadInput(f"{str(folder)!r}: {CONFIG} has {key} = {config.get(key)!r}, which is not what {MANIFEST} "
                           f"says; restore it, or remove {MANIFEST} to read the folder as PEFT does")  # fmt: skip


def _check_whole(folder: Path, variant: Variant, modules: Sequence[str], whole: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor beside the adapter is of a module that the config names, complete, and in the base's shape."""
    for name, t in variant.extra.items():
        owner = name.rpartition(".")[0]
        if not any(f"{m}." in f"{owner}." for m in modules):  # PEFT: each module whose name ends so
            raise BadInput(f"{str(folder / WEIGHTS)!r} has an unknown tensor {name!r}")
        if whole.get(name) != tuple(t.shape):
            here = list(whole[name]) if name in whole else "absent"
            raise BadInput(f"{str(folder)!r} is an adapter of another base: {name!r} is {list(t.shape)} in it "
                           f"and {here} in this base")  # fmt: skip
    for m in modules:
        wanted = {n for n in whole if f"{m}." in f"{n.rpartition('.')[0]}."}
        lacking = sorted(wanted - set(variant.extra))
        if lacking or not wanted:
            raise BadInput(f"{str(folder / WEIGHTS)!r} lacks {lacking[0] if lacking else m!r} of modules_to_save")


def _json(path: Path) -> dict[str, Any]:
    with disk(path, "read"):
        text = path.read_bytes()
    try:
        found = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadInput(f"{str(path)!r} must hold a JSON object")
    return found


def _check_hashes(folder: Path, tensors: Mapping[str, Tensor], want: Mapping[str, str]) -> None:
    missing, extra = sorted(set(want) - set(tensors)), sorted(set(tensors) - set(want))
    if missing or extra:
        word, which = ("lacks", missing) if missing else ("has unknown", extra)
        raise BadInput(f"{str(folder / WEIGHTS)!r} {word} tensor {which[0]!r} ({len(which)} in all)")
    for name, t in tensors.items():
        if safe.tensor_hash(t) != want[name]:
            raise BadInput(
                f"{str(folder / WEIGHTS)!r}: tensor {name!r} is not the one {MANIFEST} names (damaged or edited)"
            )


def _from_plures(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes) -> Variant:
    """A folder saved by PEFT itself, without plures.json: sites from the keys, places by the method's groups."""
    if config.get("trainable_token_indices"):
        raise BadInput(f"{str(folder)!r} uses trained token embeddings, which a variant does not hold; "
                       "merge it into the base with PEFT")  # fmt: skip
    if config.get("format_version") != FORMAT_VERSION:
        raise BadInput(f"{str(folder)!r}: format_version {config.get('format_version')!r} is not {FORMAT_VERSION}; "
                       "it was written by another Plures")  # fmt: skip
    options, name = dict(config.get("options", {})), str(config.get("method"))
    try:
        method = adapts.make(name, **options)
    except WrongUse as error:
        raise BadInput(f"{str(folder)!r}: {' '.join(str(error).split())}") from error
    own: dict[str, dict[str, Tensor]] = {}
    held: dict[str, dict[str, Tensor]] = {}
    extra: dict[str, Tensor] = {}
    for key, t in tensors.items():
        found = re.fullmatch(r"(.+)\.plures_(own|pool)\.(\w+)", key.removeprefix(PREFIX))
        if found:
            (own if found[2] == "own" else held).setdefault(found[1], {})[found[3]] = t
        else:
            extra[key.removeprefix(PREFIX)] = t
    unknown, lost = sorted(set(own) - set(shapes)), sorted(set(held) - set(own))
    if unknown:
        raise BadInput(f"{str(folder)!r} is an adapter of another base: this one has no site {unknown[0]!r}")
    if lost:
        raise BadInput(f"{str(folder / WEIGHTS)!r} has a pool at {lost[0]!r} and lacks that site's own tensors")
    bare = [Site(s, *shapes[s]) for s in own]
    group_of = {s.name: method.group(s) for s in bare}
    sites = tuple(s for members in grouped(bare, group_of).values() for s in members)
    pool = {group_of[s]: leaves for s, leaves in held.items()}
    return Variant(
        name, options, BaseRef(str(config.get("base_model_name_or_path"))), sites, group_of, own, pool, extra
    )


_NOT_LORA = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "block-diagonal factors", "kasa_config": "KaSA",
    "arrow_config": "Arrow routing", "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "aLoRA", "target_parameters": "targets of single parameters",
    "trainable_token_indices": "trained token embeddings", "layer_replication": "layer replication",
    "lora_bias": "a LoRA bias",
}  # fmt: skip
_HEAVY = re.compile(r"\)[*+{]|(?:(?<!\()[*+?{].*){4}", re.S)  # a group repeated, or four repeats
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others move the base's own weights


def _from_lora(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], ours: bool) -> Variant:
    """A plain PEFT LoRA; rank and alpha patterns are folded into B, so that one scale serves all sites.

    In a folder of `ours` they are so already, and the tensors stay as they are to the last bit.
    """
    for key, word in _NOT_LORA.items():
        if config.get(key):
            raise BadInput(
                f"{str(folder)!r} uses {word} ({key}), which is no plain LoRA; merge it into the base with PEFT"
            )
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        start = config["init_lora_weights"]
        raise BadInput(f"{str(folder)!r} began as {start!r}, which also changes the base's own weights; convert it to "
                       "plain LoRA with PEFT's path_initial_model_for_weight_conversion")  # fmt: skip
    own: dict[str, dict[str, Tensor]] = {}
    extra: dict[str, Tensor] = {}
    for key, t in tensors.items():
        bare = key.removeprefix(PREFIX)
        found = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", bare)
        if found:
            own.setdefault(found[1], {})[found[2]] = t
        elif "lora_" in bare:
            raise BadInput(f"{str(folder)!r}: tensor {key!r} is no plain LoRA factor of a linear map")
        else:
            extra[bare] = t
    halves = [s for s, leaves in own.items() if set(leaves) != {"A", "B"}]
    if halves or not own:
        raise BadInput(f"{str(folder)!r} " + (f"lacks a factor of {halves[0]!r}" if halves else "has no LoRA tensors"))
    r, alpha = int(config.get("r", 8)), float(config.get("lora_alpha", 8))
    method = adapts.make("lora", r=r, alpha=alpha, rslora=bool(config.get("use_rslora", False)))
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for pattern in (*ranks, *alphas):
        if _HEAVY.search(pattern) or len(pattern) > 2000 or max(map(pattern.count, "([")) > 2:
            raise BadInput(f"{str(folder)!r}: the pattern {pattern[:80]!r} of its ranks or alphas could take for ever; "
                           "use names of sites, at most 2 groups and 3 repeats, no group repeated")  # fmt: skip
    for site, leaves in own.items():
        rank = int(_by_pattern(ranks, site, r))
        if leaves["A"].shape[0] != rank or leaves["B"].shape[1] != rank:
            raise BadInput(
                f"{str(folder)!r}: the factors of {site!r} have rank {leaves['A'].shape[0]}, its config says {rank}"
            )
        scale = lora_scale(float(_by_pattern(alphas, site, alpha)), rank, method.rslora)
        if scale != method.scale and not ours:
            leaves["B"] = leaves["B"] * (scale / method.scale)
    group_of = dict.fromkeys(own, "")
    loose = [Site(s, int(v["B"].shape[0]), int(v["A"].shape[1])) for s, v in own.items()]
    sites = tuple(s for members in grouped(loose, group_of).values() for s in members)
    options = {"r": r, "alpha": alpha, "rslora": method.rslora}
    ref = BaseRef(str(config.get("base_model_name_or_path")))
    return Variant("lora", options, ref, sites, group_of, own, {}, extra)


def _by_pattern(patterns: Mapping[str, Any], site: str, otherwise: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the name."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", site)), otherwise)


def check_shapes(where: str, variant: Variant, shapes: Shapes) -> None:
    """Raise BadInput unless every site is the base's, and every tensor what the method lays there."""
    for site in variant.sites:
        if shapes.get(site.name) != (site.out, site.into):
            here = list(shapes[site.name]) if site.name in shapes else "no site (a linear map, not the output head)"
            raise BadInput(f"{where} is an adapter of another base: {site.name!r} is "
                           f"[{site.out}, {site.into}] in it and {here} in this base")  # fmt: skip
    check_tensors(variant, where)


def check_tensors(variant: Variant, where: str) -> None:
    """Raise BadInput unless every tensor that the method defines is there, in its shape, and no other."""
    method = adapts.make(variant.method, **variant.options)
    with torch.device("meta"):
        laid = lay(method, variant.sites, 0)
    for room, have, want in (("own", variant.own, laid.own), ("pool", variant.pool, laid.pool)):
        for owner in sorted({*have, *want}):
            mine, theirs = have.get(owner, {}), want.get(owner, {})
            for leaf in sorted({*mine, *theirs}):
                if leaf not in mine or leaf not in theirs:
                    word = "missing" if leaf not in mine else "unknown"
                    raise BadInput(f"{where}: {room} tensor {leaf!r} of {owner!r} is {word}")
                want_shape = list(theirs[leaf].shape)
                if variant.method == "lora" and mine[leaf].ndim == 2:  # an imported LoRA may vary its rank by site
                    want_shape[leaf == "B"] = mine["A"].shape[0]
                if list(mine[leaf].shape) != want_shape:
                    raise BadInput(f"{where}: {room} tensor {leaf!r} of {owner!r} is {list(mine[leaf].shape)}, "
                                   f"the method lays {want_shape}")  # fmt: skip
                points = mine[leaf] if not mine[leaf].is_floating_point() else torch.zeros(1, dtype=torch.long)
                if int(points.min()) < 0 or int(points.max()) >= _rows(laid, variant, owner):
                    raise BadInput(f"{where}: {room} tensor {leaf!r} of {owner!r} points past its pool")


def _rows(laid: Laid, variant: Variant, site: str) -> int:
    pool: Sequence[Tensor] = list(laid.pool.get(variant.group_of.get(site, ""), {}).values())
    return min((t.shape[0] for t in pool), default=1 << 62)
