"""The PEFT config of every Plures method, and PEFT's type `PLURES` that it stands for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig, PeftType

from plures.adapt import adapts
from plures.core.errors import WrongUse, nearest

FORMAT_VERSION = 1


if "PLURES" not in PeftType.__members__:  # a closed enum, and PEFT discovers no plug-ins (huggingface/peft#2273)
    member = str.__new__(PeftType, "PLURES")
    member._name_ = member._value_ = "PLURES"
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, "PLURES", member)
    PeftType._member_names_.append("PLURES")
    PeftType._member_map_["PLURES"] = PeftType._value2member_map_["PLURES"] = member


@dataclass
class PluresConfig(PeftConfig):
    """A PEFT config that names a Plures method and its options.

    Fields are PEFT's own where it has them. `init_weights=False` draws what would start at zero, so that the adapter
    is no identity (PEFT's tests ask for it). Raises: WrongUse for an unknown method or option.
    """

    method: str = field(default="mos", metadata={"help": "a file of plures/adapt"})
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "the method's options"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "names, a regex, or all-linear"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "names or a regex to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "layer numbers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved whole"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None, metadata={"help": "tokens"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input, in training"})
    bias: Literal["none", "all", "plures_only"] = field(default="none", metadata={"help": "biases to train"})
    seed: int = field(default=0, metadata={"help": "seed of every stream the starting tensors are drawn from"})
    init_weights: bool = field(default=True, metadata={"help": "start as the identity"})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "layout of the saved tensors"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PLURES  # type: ignore[attr-defined]
        for name in ("target_modules", "exclude_modules"):  # sets, as PEFT has them
            if isinstance(given := getattr(self, name), list):
                setattr(self, name, set(given))
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise WrongUse(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise WrongUse("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.format_version != FORMAT_VERSION:
            raise WrongUse(f"format_version {self.format_version} is not {FORMAT_VERSION}: written by another Plures")
        if not 0 <= self.dropout < 1:
            raise WrongUse(f"dropout must be in [0, 1), got {self.dropout}")
        self.make()  # all errors now, not at injection

    def make(self) -> Any:
        """The method, with its options checked."""
        return adapts.make(self.method, **self.options)


def config_for(name: str, **settings: Any) -> PluresConfig:
    """The PeftConfig of method `name`; settings are the method's options and PluresConfig's own fields, mixed.

    Example: `get_peft_model(model, config_for("mos", r=16, e=2, target_modules="all-linear", seed=3))`.
    """
    own = set(PluresConfig.__dataclass_fields__) - {"method", "options"}
    options = {k: v for k, v in settings.items() if k not in own}
    known = [*adapts[name].__dataclass_fields__, *own]  # type: ignore[attr-defined]
    for k in (k for k in options if k not in known):
        raise WrongUse(f"{k!r} is neither an option of {name} nor a setting of its PEFT config.{nearest(k, known)}")
    return PluresConfig(method=name, options=options, **{k: v for k, v in settings.items() if k in own})
