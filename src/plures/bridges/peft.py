"""Every `adapt/` method as a PEFT plug-in: one PEFT type, `PLURES`, whose config names the method.

`config_for("mos", r=16, target_modules="all-linear")` works wherever a LoraConfig does: get_peft_model, save and
load, several adapters (of different methods) in one model, mixed batches, merge, Trainer, TRL. One type for all
methods means that a new file in `adapt/` is a PEFT method at once, and that MoS and LoRA variants can stand in one
model and one batch.

A pool that sites share is held by the first site of its group (its owner) and reached by the others through a plain
reference, so it is saved once, follows `delete_adapter` and `deepcopy`, and needs no state on the tuner: PEFT's
`inject_adapter_in_model` and transformers' `model.load_adapter` work too. Names are `plures_own.<adapter>.<leaf>`
and `plures_pool.<adapter>.<leaf>`, because TRL copies a policy into its reference by `.default.` in the middle.

Importing this module registers the type with PEFT. The config is in `peft_config`, the layer in `peft_layer`; both are
imported from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.model import _adapter_names_pre_forward_hook, _get_encoder
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, _get_submodules, register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from plures.adapt._lay import Laid, lay
from plures.bridges.peft_config import FORMAT_VERSION, PluresConfig, config_for
from plures.bridges.peft_layer import Leaves, PluresLayer, fill_layers, site_of, take_auxiliary
from plures.core.errors import WrongUse
from plures.tensors.lowrank import truncate, weighted_sum
from plures.tensors.rng import normal, rng

__all__ = ["FORMAT_VERSION", "Leaves", "PluresConfig", "PluresLayer", "PluresModel", "config_for", "fill_layers",
           "site_of", "take_auxiliary"]  # fmt: skip


class PluresModel(BaseTuner):
    """PEFT's tuner for all Plures methods."""

    prefix = "plures_"
    tuner_layer_cls = PluresLayer
    target_module_mapping: dict[str, list[str]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def _create_and_replace(self, peft_config: PluresConfig, adapter_name: str, target: nn.Module, target_name: str,
                            parent: nn.Module, current_key: str, parameter_name: Any = None) -> None:  # fmt: skip
        if isinstance(target, PluresLayer):
            layer = target
        elif isinstance(target, NonDynamicallyQuantizableLinear):
            raise ValueError(f"{current_key!r} belongs to torch's MultiheadAttention, which reads its weight and never "
                             "calls it: an adapter there has no effect. Name it in `exclude_modules`.")  # fmt: skip
        else:
            how = get_quantization_kwargs(self.model)
            linear = isinstance(target, (nn.Linear, Conv1D)) or resolve_quantization_backend(target, **how)
            if isinstance(target, BaseTunerLayer) or not linear:
                raise ValueError(f"Target module {target} is not supported: {current_key!r} is no linear map. Plures "
                                 "adapts torch.nn.Linear, its quantised kin, and transformers' Conv1D.")  # fmt: skip
            layer = PluresLayer(target, current_key, **how).train(target.training)
            self._replace_module(parent, target_name, layer, target)
        layer.plan(adapter_name, peft_config.make(), peft_config.dropout)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # whole already; PEFT's version fails on unloaded trainable tokens

    def inject_adapter(self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True,
                       low_cpu_mem_usage: bool = False, state_dict: Any = None) -> None:  # fmt: skip
        """Replace the targets, then lay the tensors: a pool's size is known only when all its sites are."""
        config: PluresConfig = self.peft_config[adapter_name]
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            layers = {m.name: m for m in model.modules() if isinstance(m, PluresLayer) and adapter_name in m.methods}
            method = config.make()
            with torch.device("meta" if low_cpu_mem_usage else "cpu"):
                laid = lay(method, [site_of(layer) for layer in layers.values()], config.seed)
        except Exception:
            _clear(model, adapter_name)
            raise
        if not config.init_weights and not low_cpu_mem_usage:
            laid = _without_zeros(laid, method.frozen, config.seed)
        fill_layers(layers, adapter_name, laid)
        train = adapter_name in self.active_adapters and not config.inference_mode
        for layer in layers.values():
            layer.set_requires_grad(adapter_name, train)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Trained tensors are float32, or the base's dtype where the caller wants no autocast; constants keep theirs.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in (m for m in self.modules() if isinstance(m, PluresLayer) and not autocast_adapter_dtype):
            dtype = layer._get_base_layer_device_and_dtype(layer.base_layer)[1]
            for p in (p for leaves in layer.leaves(adapter_name) for p in leaves.parameters()):
                p.data = p.data.to(dtype) if dtype and dtype.is_floating_point else p.data

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` to every layer for one forward call, each name checked."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for m in self.modules() if isinstance(m, PluresLayer) for name in m.plures_own}
        if unknown := sorted({n for n in adapter_names if n != "__base__"} - known):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        if not isinstance(adapter_names, (list, tuple)):
            raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
        wanted = {**vars(kwargs.get("generation_config") or object), **kwargs}
        beams, returned = (wanted.get(k) or 1 for k in ("num_beams", "num_return_sequences"))
        repeat: int = beams if beams > 1 else returned  # how often `generate` repeats each row
        repeated = [n for n in adapter_names for _ in range(repeat)]
        encoder = _get_encoder(self.model) if repeat > 1 else None  # an encoder runs before rows are repeated
        encoding = set(encoder.modules()) if encoder is not None else set()
        handles = []
        for m in (m for m in self.modules() if isinstance(m, (PluresLayer, AuxiliaryTrainingWrapper))):
            hook = partial(_adapter_names_pre_forward_hook, adapter_names=adapter_names if m in encoding else repeated)
            handles.append(m.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str,
                             combination_type: str = "cat", svd_rank: int | None = None) -> None:  # fmt: skip
        """Add an adapter whose delta is the weighted sum of others' deltas, whatever their methods.

        "cat" is exact: the sum of low-rank deltas, as a LoRA of the summed ranks. "svd" is its best approximation of
        rank `svd_rank` (by default the largest rank among the parts). A sum with a dense delta in it, or of more ranks
        than a site has, is dense. PEFT's "linear" (adding factors, which is not the sum of the deltas) is refused.
        """
        if adapter_name in self.peft_config:
            return
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} does not exist")
            if self.peft_config[name].modules_to_save:
                raise WrongUse(f"adapter {name!r} has modules_to_save, whole modules that no sum of deltas can hold")
        if len(adapters) != len(weights) or not adapters:
            raise WrongUse(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter")
        if combination_type not in ("cat", "svd"):
            raise WrongUse(f"combination_type {combination_type!r} is not one of 'cat' (exact) and 'svd' (of svd_rank)")
        mixed: dict[PluresLayer, dict[str, Tensor]] = {}
        for layer in (m for m in self.modules() if isinstance(m, PluresLayer)):
            here = [(n, w) for n, w in zip(adapters, weights, strict=True) if n in layer.plures_own]
            if all(hasattr(layer.methods[n], "factors") for n, _ in here) and here:
                parts = [layer.methods[n].factors(*layer.tensors(n)) for n, _ in here]
                B, A = weighted_sum(parts, [w for _, w in here])
                if combination_type == "svd":
                    B, A = truncate(B, A, svd_rank or max(a.shape[0] for _, a in parts))
                mixed[layer] = {"A": A, "B": B}
            elif here:
                mixed[layer] = {"D": sum((w * layer.delta(n) for n, w in here), torch.zeros(()))}
        rank = max((t["A"].shape[0] for t in mixed.values() if "A" in t), default=0)
        low = all("A" in t and rank <= min(t["A"].shape[1], t["B"].shape[0]) for t in mixed.values())
        self.peft_config[adapter_name] = config = replace(
            self.peft_config[adapters[0]], method="lora" if low else "full", init_weights=True, dropout=0.0,
            options={"r": rank, "alpha": float(rank)} if low else {}, inference_mode=True, exclude_modules=None,
            target_modules=sorted(m.name for m in mixed), layers_to_transform=None, layers_pattern=None,
        )  # fmt: skip
        for layer, t in mixed.items():
            if low:  # one config has one rank: pad with zeros
                spare = rank - t["A"].shape[0]
                own = {"A": nn.functional.pad(t["A"], (0, 0, 0, spare)), "B": nn.functional.pad(t["B"], (0, spare))}
            else:
                own = t if "D" in t else {"D": t["B"].float() @ t["A"].float()}
            layer.plan(adapter_name, config.make(), 0.0)
            layer.fill(adapter_name, replace(site_of(layer), W=None), own, None, None)
            layer.set_requires_grad(adapter_name, False)


def _clear(model: nn.Module, adapter: str) -> None:
    """Take back an injection that failed: forget the adapter, and give layers that hold no other their base again."""
    for key, layer in [(k, m) for k, m in model.named_modules() if isinstance(m, PluresLayer) and adapter in m.methods]:
        del layer.methods[adapter], layer.plures_dropout[adapter]
        if not layer.methods:
            parent, _, name = _get_submodules(model, key)
            setattr(parent, name, layer.base_layer)


def _without_zeros(laid: Laid, frozen: frozenset[str], seed: int) -> Laid:
    """The same tensors, with trained ones that start at zero drawn from a small normal."""

    def drawn(of: str, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        zero = [k for k, t in leaves.items() if k not in frozen and t.is_floating_point() and not t.any()]
        return {**leaves, **{k: normal(rng(seed, "init_weights", of, k), tuple(leaves[k].shape), 0.1) for k in zero}}

    own = {site: drawn(f"own {site}", leaves) for site, leaves in laid.own.items()}
    return replace(laid, own=own, pool={group: drawn(f"pool {group}", leaves) for group, leaves in laid.pool.items()})


if PeftType.PLURES not in PEFT_TYPE_TO_TUNER_MAPPING:  # type: ignore[attr-defined]
    register_peft_method(name="plures", config_cls=PluresConfig, model_cls=PluresModel)
