"""Packers: the low-rank factors of many variants in fewer bytes.

One file here is one method. It is fitted once to a fleet, which gives what all its variants share, and then codes and
decodes each variant by itself: a variant may be added or taken away and no other changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias

from plures.core.folder import Folder
from plures.tensors.site import Site

if TYPE_CHECKING:
    from torch import Tensor

Factors: TypeAlias = "Mapping[str, tuple[Tensor, Tensor]]"
"""By site, `B [out, r]` and `A [r, into]` of a variant's delta `B A`, float32."""
Fleet: TypeAlias = Callable[[], Iterable[Factors]]
"""Goes over a fleet's variants, from the first, as often as it is called."""
packs = Folder("plures.pack", "pack")
ENCODING = frozenset({"error", "expect"})  # options that decoding does not depend on


class Codec(Protocol):
    """Codes variants of some sites with what their fleet shares, as the options of `of` say.

    A shallow copy with one of `of.finer` in its place is the codec of that packer.
    """

    of: Packer

    def encode(self, factors: Factors) -> Tensor:
        """A variant's code, uint8 `[bytes]`."""
        ...

    def decode(self, code: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The variant of a code, as near to the coded one as the method's options say."""
        ...


class Packer(Protocol):
    """A way to pack; `bounds` says whether its option `error` bounds that of every decoded variant, and `free` whether
    it codes each variant by itself, so that its codes stand beside those of any other packer."""

    bounds: ClassVar[bool]
    free: ClassVar[bool]

    def finer(self, share: float) -> Packer | None:
        """The packer of `share` of the error that was asked for, in (0, 1]; None where no error can be asked for."""
        ...

    def fit(self, fleet: Fleet, sites: Sequence[Site]) -> dict[str, Tensor]:
        """What all variants share, by leaf; {} for a method that codes each variant by itself."""
        ...

    def codec(self, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> Codec:
        """What codes and decodes, made once for many variants."""
        ...
