"""Variants on PEFT models, and the other forms of a variant: plain LoRA, merged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from plures.adapt import adapts
from plures.adapt._lay import Laid
from plures.bridges.peft import PluresConfig, PluresLayer, fill_layers
from plures.core.errors import BadInput, WrongUse
from plures.tensors.site import grouped
from plures.tensors.variant import BaseRef, Variant, plain_lora

PREFIX = "base_model.model."

# ---------------------------------------------------------------- variant <-> PEFT model


def capture(model: Any, adapter: str, base: BaseRef, provenance: Mapping[str, Any]) -> Variant:
    """The variant that `adapter` is on a PEFT model, tensors copied to the CPU."""
    layers = [m for m in model.modules() if isinstance(m, PluresLayer) and adapter in m.plures_own]
    assert layers, f"the model has no adapter {adapter!r}"
    config: PluresConfig = model.peft_config[adapter]
    method = layers[0].methods[adapter]
    found = [layer.sites[adapter] for layer in layers]
    owned = {s.name: method.group(s) for s in found}
    sites = tuple(s for members in grouped(found, owned).values() for s in members)  # one order, whoever made it
    pools = {
        owned[layer.sites[adapter].name]: _copied(layer.plures_pool[adapter].tensors())  # type: ignore[operator]
        for layer in layers
        if adapter in layer.plures_pool
    }
    own = {layer.name: _copied(layer.plures_own[adapter].tensors()) for layer in layers}  # type: ignore[operator]
    extra = {
        f"{_bare(name)}.{key}": t.detach().cpu().clone()
        for name, m in model.named_modules()
        if isinstance(m, ModulesToSaveWrapper) and adapter in m.modules_to_save
        for key, t in m.modules_to_save[adapter].state_dict().items()
    }
    return Variant(config.method, asdict(method), base, sites, owned, own, pools, extra, dict(provenance))


def put_on(model: Any, config: PluresConfig, slot: str, low_cpu_mem_usage: bool = False) -> Any:
    """`model` (a base, or a PEFT model) with a new adapter of `config` under the name `slot`."""
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5 by a name that is going away
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # `_put` unties on merging
        if isinstance(model, PeftModel):
            model.add_adapter(slot, config, low_cpu_mem_usage=low_cpu_mem_usage)
            return model
        return get_peft_model(model, config, adapter_name=slot, low_cpu_mem_usage=low_cpu_mem_usage)


def take_off(model: Any) -> Any:
    """The base under a PEFT model, as it was. PEFT's own `unload` leaves trained modules_to_save in it."""
    saved = {_bare(n): m.original_module for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    base = model.unload()
    for name, module in saved.items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, module)
    return base


def attach(model: Any, variant: Variant, slot: str) -> Any:
    """`model` (a base, or a PEFT model) with `variant` on it under the adapter name `slot`.

    `slot` is ours, never a customer's name: PEFT cuts keys by adapter name.
    """
    names = [s.name for s in variant.sites]
    heads = sorted({k.rpartition(".")[0] for k in variant.extra})
    config = PluresConfig(
        task_type="CAUSAL_LM", method=variant.method, options=dict(variant.options), target_modules=names,
        inference_mode=True, modules_to_save=heads or None,
    )  # fmt: skip
    model = put_on(model, config, slot, low_cpu_mem_usage=True)
    layers = {m.name: m for m in model.modules() if isinstance(m, PluresLayer) and slot in m.methods}
    if set(layers) != set(names):
        raise BadInput(f"the variant's sites are not the base's: {sorted(set(names) ^ set(layers))[:3]} …")
    for site in variant.sites:
        if (layers[site.name].out_features, layers[site.name].in_features) != (site.out, site.into):
            raise BadInput(f"the variant is of another base: {site.name!r} is [{site.out}, {site.into}] in it")
    with torch.no_grad():
        fill_layers(layers, slot, Laid(variant.sites, variant.group_of, variant.own, variant.pool))
        for layer in layers.values():
            layer.set_requires_grad(slot, False)
        for name, m in model.named_modules():
            if isinstance(m, ModulesToSaveWrapper) and slot in m.modules_to_save:
                found = {k: t for k, t in variant.extra.items() if k.startswith(_bare(name) + ".")}
                m.modules_to_save[slot].load_state_dict(
                    {k.removeprefix(_bare(name) + "."): t for k, t in found.items()}, assign=True
                )
    for m in model.modules():
        if isinstance(m, ModulesToSaveWrapper):
            for other in (n for n in model.peft_config if n not in m.modules_to_save):
                m.modules_to_save[other] = m.original_module
                m._adapters.add(other)
            m._mixed_batch_forward = partial(_by_row, m)  # type: ignore[method-assign]
    return model


def _by_row(wrapper: Any, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Tensor:
    """A whole module of one adapter in a batch of several: each row by its own.

    PEFT's version takes linear maps and embeddings only, and fails on the rows of an adapter that has no such module.
    """
    y: Tensor = wrapper.original_module(x, *args, **kwargs)
    for name in (n for n in dict.fromkeys(adapter_names) if n in wrapper.modules_to_save):
        rows = torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=x.device)
        y = y.index_copy(0, rows, wrapper.modules_to_save[name](x[rows], *args, **kwargs))
    return y


def _bare(name: str) -> str:
    return name.removeprefix(PREFIX).removeprefix("base_model.")


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.detach().cpu().clone() for k, t in tensors.items()}


# ---------------------------------------------------------------- other forms of a variant


def as_lora(variant: Variant) -> Variant:
    """The same variant as plain LoRA, exact: `B A` is the delta, scaled already (alpha = r).

    Raises: WrongUse where the method is not low-rank.
    """
    if variant.method == "lora":
        return variant
    method = adapts.make(variant.method, **variant.options)
    if not hasattr(method, "factors"):
        other = "export it merged (--as merged)" if hasattr(method, "weight") else "export it as it is (--as peft)"
        raise WrongUse(f"a {variant.method!r} variant has no low-rank factors; {other} instead")
    own, rank = {}, 0
    for site in variant.sites:
        B, A = method.factors(variant.own[site.name], variant.pool.get(variant.group_of[site.name], {}))
        own[site.name] = {"A": A.contiguous().clone(), "B": B.contiguous().clone()}
        rank = max(rank, A.shape[0])
    facts = {**variant.provenance, "was": {"method": variant.method, "options": dict(variant.options)}}
    return plain_lora(variant.base, variant.sites, own, rank, variant.extra, facts)


def factors(variant: Variant) -> dict[str, tuple[Tensor, Tensor]] | None:
    """By site, `B [out, r]` and `A [r, into]` of a variant's delta, float32, scale included; None for other methods."""
    method = adapts.make(variant.method, **variant.options)
    if not hasattr(method, "factors"):
        return None
    out = {}
    for site in variant.sites:
        own, pool = variant.own[site.name], variant.pool.get(variant.group_of[site.name], {})
        B, A = method.factors(_floats(own), _floats(pool))
        out[site.name] = B.float(), A.float()
    return out


def has_factors(variant: Variant) -> bool:
    """Whether its method's delta is low-rank factors."""
    return hasattr(adapts.make(variant.method, **variant.options), "factors")


def weigher(variant: Variant) -> Callable[[str, Tensor], Tensor]:
    """What makes the adapted weight `[out, into]` of a site's name and the base's, float32: the method's definition.

    Raises: WrongUse for a method that no weight stands for.
    """
    method: Any = adapts.make(variant.method, **variant.options)
    if not hasattr(method, "weight"):
        raise WrongUse(f"a {variant.method!r} variant acts on each token by itself: no merged model is the same; "
                       "serve it, or export it as it is (--as peft)")  # fmt: skip

    @torch.no_grad()
    def weight(site: str, W: Tensor) -> Tensor:
        own, pool = _floats(variant.own[site]), _floats(variant.pool.get(variant.group_of[site], {}))
        made: Tensor = method.weight(W.float(), own, pool)
        return made

    return weight


@torch.no_grad()
def merge_into(model: Any, variant: Variant) -> Any:
    """`model`, a fresh base, with the variant's deltas added to its weights in place.

    Raises: WrongUse for a method that no weight stands for; BadInput where the base is another.
    """
    weight = weigher(variant)
    modules = dict(model.named_modules())
    for site in variant.sites:
        module = modules.get(site.name)
        if module is None:
            raise BadInput(f"the variant is of another base: this one has no site {site.name!r}")
        transposed = type(module).__name__ == "Conv1D"
        W = module.weight.data.T if transposed else module.weight.data
        if tuple(W.shape) != (site.out, site.into):
            raise BadInput(
                f"the variant is of another base: {site.name!r} is {list(W.shape)} here, not {[site.out, site.into]}"
            )
        merged = weight(site.name, W).to(W.dtype)
        module.weight.data = merged.T.contiguous() if transposed else merged
    for name, t in variant.extra.items():
        owner, _, leaf = name.rpartition(".")
        if owner not in modules or leaf not in modules[owner].state_dict():
            raise BadInput(f"the variant is of another base: this one has no tensor {name!r}")
        _put(model, modules[owner], leaf, t)
    return model


def _put(model: Any, module: Any, leaf: str, t: Tensor) -> None:
    """Put a whole tensor into `module`; one that the base ties to another (a head to the embedding) is untied first."""
    old = getattr(module, leaf)
    if sum(p is old for _, p in model.named_parameters(remove_duplicate=False)) > 1:
        setattr(module, leaf, torch.nn.Parameter(t.to(old.dtype), requires_grad=False))
        model.config.tie_word_embeddings = False
    else:
        old.data = t.to(old.dtype)


def _floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}
