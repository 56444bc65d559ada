"""A linear map of the base with Plures adapters on it: what stands in the model where a site was."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from plures.adapt._lay import Laid
from plures.core.errors import WrongUse
from plures.tensors.rng import rng
from plures.tensors.site import Site


class Leaves(nn.Module):
    """Tensors by name: trained ones as parameters, constants as buffers, both saved."""

    def __init__(self, tensors: Mapping[str, Tensor], frozen: frozenset[str]) -> None:
        super().__init__()
        for name, t in tensors.items():
            if t.is_floating_point() and name not in frozen:
                self.register_parameter(name, nn.Parameter(t))
            else:
                self.register_buffer(name, t)

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return {k: v for d in (self._parameters, self._buffers) for k, v in d.items() if v is not None}


class PluresLayer(nn.Module, BaseTunerLayer):
    """A linear map of the base with any number of Plures adapters on it."""

    adapter_layer_names = ("plures_own", "plures_pool")
    other_param_names = ("plures_dropout", "methods", "sites", "owners")

    def __init__(self, base_layer: nn.Module, name: str, **quantisation: Any) -> None:
        super().__init__()
        self.base_layer, self.name = base_layer, name
        self.quantization_backend = resolve_quantization_backend(base_layer, **quantisation)
        self.transposed = isinstance(base_layer, Conv1D)  # GPT-2 stores [into, out]
        self.in_features, self.out_features = map(int, _get_in_out_features(base_layer))  # type: ignore[arg-type]
        self.plures_own = nn.ModuleDict()
        self.plures_pool = nn.ModuleDict()  # only on the owner of a group
        self.plures_dropout = nn.ModuleDict()
        self.methods: dict[str, Any] = {}
        self.sites: dict[str, Site] = {}
        self.owners: dict[str, PluresLayer | None] = {}
        self.auxiliary: dict[str, Tensor] = {}  # what the last forward pass in training adds to the loss
        self._merged_deltas: dict[str, Tensor] = {}
        self.merged_adapters: list[str] = []

    def plan(self, adapter: str, method: Any, dropout: float) -> None:
        """Take on an adapter whose tensors come with `fill`."""
        self.methods[adapter] = method
        self.plures_dropout[adapter] = (nn.Dropout(dropout) if dropout else nn.Identity()).train(self.training)

    def fill(self, adapter: str, site: Site, own: Mapping[str, Tensor], owner: PluresLayer | None,
             pool: Mapping[str, Tensor] | None) -> None:  # fmt: skip
        """Lay the adapter's tensors; `pool` is given to the owner of the group alone."""
        frozen = self.methods[adapter].frozen
        self.sites[adapter], self.owners[adapter] = site, owner
        self.plures_own[adapter] = Leaves(own, frozen)
        if pool is not None:
            self.plures_pool[adapter] = Leaves(pool, frozen)
        self._move_adapter_to_device_of_base_layer(adapter)

    def leaves(self, adapter: str) -> list[Leaves]:
        """What this layer itself holds of the adapter."""
        return [room[adapter] for room in (self.plures_own, self.plures_pool) if adapter in room]  # type: ignore[misc]

    def tensors(self, adapter: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The adapter's own tensors here, and its pool wherever that is held."""
        own = self.plures_own[adapter].tensors()  # type: ignore[operator]
        owner = self.owners[adapter]
        pool = {} if owner is None else owner.plures_pool[adapter].tensors()  # type: ignore[operator]
        if owner is not self and own:  # a model spread over devices: follow this layer
            device = next(iter(own.values())).device
            pool = {k: t.to(device) for k, t in pool.items()}
        return own, pool

    def _move_adapter_to_device_of_base_layer(self, adapter: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base's dtype, which would round constants, and looks for `meta` among
        # parameters only, where most sites of a pool have none. The dtype is `_cast_adapter_dtype`'s business.
        device = device or self._get_base_layer_device_and_dtype(self.base_layer)[0]
        for leaves in self.leaves(adapter):
            if device is not None and not any(t.is_meta for t in leaves.tensors().values()):
                leaves.to(device)

    def base_weight(self) -> Tensor:
        """The base's weight as `[out, into]`, dequantised where PEFT knows how."""
        backend, weight = self.quantization_backend, self.weight
        if not (backend.supports_merge if backend else weight.is_floating_point()):
            kind = backend.backend_name if backend else weight.dtype
            raise WrongUse(f"{self.name!r} is quantised ({kind}) with no way back; use the unquantised base for this")
        W: Tensor = self.get_base_weight()
        return W.T if self.transposed else W

    def delta(self, adapter: str) -> Tensor:
        """What the adapter adds to the base's weight, `[out, into]` in float32."""
        rooms = self.tensors(adapter)
        own, pool = ({k: t.float() if t.is_floating_point() else t for k, t in room.items()} for room in rooms)
        method: Any = self.methods[adapter]
        if hasattr(method, "factors"):
            B, A = method.factors(own, pool)
            return B @ A
        if not hasattr(method, "weight"):
            raise WrongUse(f"{method.card.name} acts on each token by itself: no weight stands for it, so it cannot be "
                           "merged or summed; serve it, or export it as it is")  # fmt: skip
        W = self.base_weight().float()
        return method.weight(W, own, pool) - W

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base's weight, in the base's layout and dtype."""
        W, delta = self.weight, self.delta(adapter)
        return (delta.T if self.transposed else delta).to(W.dtype if W.is_floating_point() else delta.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas of the active (or named) adapters to the base's weight; `safe_merge` checks for NaN first."""
        named = [a for a in check_adapters_to_merge(self, adapter_names) if a in self.plures_own]
        for adapter, delta in {a: self.delta(a) for a in named}.items():  # all first: a method may read the weight
            W = self.base_weight()
            merged = (W + delta).to(W.dtype) if safe_merge else W.add_(delta)  # summed in float32, rounded once
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            self.set_base_weight(merged.T if self.transposed else merged)
            if not hasattr(self.methods[adapter], "factors"):
                self._merged_deltas[adapter] = delta  # a method that reads W cannot be recomputed from the merged one
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged deltas out of the base's weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.plures_own:
                W, kept = self.base_weight(), self._merged_deltas.pop(adapter, None)
                W.sub_(self.delta(adapter) if kept is None else kept)
                self.set_base_weight(W.T if self.transposed else W)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the method adds to the weight."""
        return hasattr(self.methods.get(adapter_name), "weight")

    def _adapt(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        own, pool = self.tensors(adapter)
        method = self.methods[adapter]
        dtype = next((t.dtype for t in (*own.values(), *pool.values()) if t.is_floating_point()), x.dtype)
        x = self.plures_dropout[adapter](self._cast_input_dtype(x, dtype))
        if self.training and hasattr(method, "aux"):
            self.auxiliary[adapter] = method.aux(x, own, pool)
        if self.training and hasattr(method, "sample"):  # from torch's generator, as dropout: runs repeat
            own, pool = method.sample(own, pool, rng(int(torch.randint(2**62, ()))))
        if hasattr(method, "act"):
            return method.act(x, y, own, pool)
        if hasattr(method, "forward"):
            return method.forward(x, y, own, pool)
        W = self.base_weight().to(x.dtype)
        return y + nn.functional.linear(x, method.weight(W, own, pool) - W).to(y.dtype)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError("Length of `adapter_names` should be the same as the number of inputs, but got "
                             f"{len(adapter_names)} and {len(x)} respectively.")  # fmt: skip
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, please call "
                             "`unmerge_adapter` first.")  # fmt: skip
        y = self.base_layer(x, *args, **kwargs)
        for adapter in (a for a in dict.fromkeys(adapter_names) if a in self.plures_own):  # "__base__" never is
            if adapter_names.count(adapter) == len(x):
                return self._adapt(adapter, x, y)
            rows = torch.tensor([i for i, n in enumerate(adapter_names) if n == adapter], device=x.device)
            y = y.index_copy(0, rows, self._adapt(adapter, x[rows], y[rows]))
        return y

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base's output with the active adapters on it; `adapter_names` gives every row its own."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        for adapter in (a for a in self.active_adapters if a in self.plures_own and not self.merged):
            y = self._adapt(adapter, x, y)
        return y


def take_auxiliary(model: nn.Module) -> Tensor | None:
    """What the last forward pass in training adds to the loss, over all sites; None where no method adds anything."""
    layers = [m for m in model.modules() if isinstance(m, PluresLayer) and m.auxiliary]
    terms = [term for layer in layers for term in layer.auxiliary.values()]
    for layer in layers:
        layer.auxiliary = {}
    return torch.stack([t.float().to(terms[0].device) for t in terms]).sum() if terms else None


def site_of(layer: PluresLayer) -> Site:
    """The site that a layer stands on."""
    packed = layer.quantization_backend or not layer.weight.is_floating_point()
    W = None if packed else layer.base_weight().detach()  # a quantised base is not unpacked whole
    return Site(layer.name, layer.out_features, layer.in_features, W)


def fill_layers(layers: Mapping[str, PluresLayer], adapter: str, laid: Laid) -> None:
    """Hand every layer its tensors, and each group's pool to its first layer."""
    owners = {group: layers[next(s.name for s in laid.sites if laid.group_of[s.name] == group)] for group in laid.pool}
    for site in laid.sites:
        layer, owner = layers[site.name], owners.get(laid.group_of[site.name])
        pool = laid.pool[laid.group_of[site.name]] if owner is layer else None
        layer.fill(adapter, replace(site, W=None), laid.own[site.name], owner, pool)
