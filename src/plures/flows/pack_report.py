"""What was packed, and what there is to pack, as people and programs read it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from plures.core.units import si_bytes

DRIFT = 1.2  # times as many bits as variants took that the pack was fitted to
AS_IS = "as it is"


@dataclass(frozen=True)
class Line:
    """A variant as it was packed.

    `n_bytes` are its own; `bits` they are for every number of its factors. `error` is the norm of what is off over the
    delta's, over all sites; `worst` that of the worst site, and `spectral` the most that any input's output can be off
    there, over the most that the delta can do. `recovery` is the share of its gain on held-out rows that is left,
    `in_metric` the error in the metric that the pack has. `how` is the packer, or "as it is".
    """

    ref: str
    was: str
    how: str
    n_bytes: int
    was_bytes: int
    bits: float
    error: float
    worst: float
    worst_site: str
    spectral: float
    recovery: float | None = None
    in_metric: float | None = None

    @classmethod
    def as_is(cls, ref: str, n_bytes: int, recovery: float | None) -> Line:
        """Of a variant that is not packed."""
        return cls("", ref, AS_IS, n_bytes, n_bytes, 0.0, 0.0, 0.0, "", 0.0, recovery)


@dataclass(frozen=True)
class Compared:
    """What another way to pack takes for the same variants: bytes each, bytes that they share, the mean error."""

    name: str
    n_bytes: float
    shared_bytes: int
    error: float


@dataclass(frozen=True)
class Packed:
    """What was packed: a line for each variant that is new in `out`, how many were there, and bytes."""

    out: str
    lines: tuple[Line, ...]
    there: int
    shared_bytes: int
    drift: float | None
    compared: tuple[Compared, ...]

    def told(self) -> list[str]:
        """As people read it."""
        if not self.lines:
            return [f"all {self.there} variants are in {self.out} already"]
        n, was = len(self.lines), sum(line.was_bytes for line in self.lines)
        now = sum(line.n_bytes for line in self.lines)
        coded = [line for line in self.lines if line.how != AS_IS]
        out = [f"{n} variants in {self.out}: {si_bytes(now)} and {si_bytes(self.shared_bytes)} that they share, "
               f"{was / max(1, now + self.shared_bytes):.1f} times less than {si_bytes(was)}"]  # fmt: skip
        if coded:
            worst = max(coded, key=lambda line: line.error)
            bits = sum(line.bits for line in coded) / len(coded)
            out.append(f"{bits:.2f} bits a number; error {sum(x.error for x in coded) / len(coded):.4f} on average, "
                       f"{worst.error:.4f} at most ({worst.was})")  # fmt: skip
        measured = [line.in_metric for line in coded if line.in_metric is not None]
        if measured:
            out.append(f"in the metric {sum(measured) / len(measured):.4f} on average, {max(measured):.4f} at most")
        scored = [line for line in self.lines if line.recovery is not None]
        if scored:
            least = min(scored, key=lambda line: line.recovery or 0.0)
            mean = sum(line.recovery or 0.0 for line in scored) / len(scored)
            out.append(f"{100 * mean:.2f} % of the gain on held-out rows is left on average, "
                       f"{100 * (least.recovery or 0.0):.2f} % at least ({least.was})")  # fmt: skip
        for how, many in sorted(Counter(line.how for line in self.lines).items()):
            out.append(f"{many} {how}" if how == AS_IS else f"{many} by {how}")
        out += [f"beside it {c.name}: {si_bytes(c.n_bytes)} each and {si_bytes(c.shared_bytes)} shared, "
                f"error {c.error:.4f}" for c in self.compared]  # fmt: skip
        if self.drift is not None and self.drift > DRIFT:
            out.append(f"these took {self.drift:.2f} times the bits of those that the pack was fitted to: "
                       "pack anew with refit=true")  # fmt: skip
        return out


@dataclass(frozen=True)
class Plan:
    """What there is to pack: variants, how many of them are low-rank, their sites, numbers and bytes as they are."""

    out: str
    method: str
    variants: int
    low_rank: int
    sites: int
    numbers: int
    n_bytes: int
    int8_bytes: int
    int4_bytes: int

    def lines(self) -> list[str]:
        """The plan as people read it."""
        return [f"{self.variants} variants, {self.low_rank} of them low-rank, at {self.sites} sites",
                f"{self.numbers:,} numbers in {si_bytes(self.n_bytes)}; int8 would take {si_bytes(self.int8_bytes)}, "
                f"int4 {si_bytes(self.int4_bytes)}", f"by {self.method} into {self.out}"]  # fmt: skip
