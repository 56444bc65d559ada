"""A fleet's variants in fewer bytes: each coded with what all share, its error measured, and published in a fleet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from plures.bridges.on_model import factors
from plures.core.errors import BadInput, WrongUse
from plures.core.folder import options_of
from plures.core.units import si_bytes
from plures.flows.pack_score import Scorer
from plures.flows.recipes import PackRecipe
from plures.pack import Codec, Factors, Packer, packs
from plures.store import Store, Version
from plures.store.unpack import GROUP, METHOD, as_plain
from plures.tensors import safe
from plures.tensors.gauge import difference, singular_values
from plures.tensors.site import Site, natural
from plures.tensors.variant import Variant

Say = Callable[[str], None]
DRIFT = 1.2  # times as many bits as variants took that the pack was fitted to
FINER = (0.7, 0.5, 0.35, 0.25)  # of the error that was asked for, where the score falls short
LAST: tuple[str, dict[str, Any]] = ("rtn", {"bits": 8})  # what a variant is packed by where nothing else will do
COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("rtn", {"bits": 8}), "int4": ("rtn", {"bits": 4}), "svd": ("svd", {}),
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A variant as it was packed.

    `n_bytes` are its own; `bits` they are for every number of its factors. `error` is the norm of what is off over the
    delta's, over all sites; `worst` that of the worst site, and `spectral` the most that any input's output can be off
    there, over the most that the delta can do. `recovery` is the share of its gain on held-out rows that is left. `how`
    is the packer, or "as it is".
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
    recovery: float | None


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
        coded = [line for line in self.lines if line.how != "as it is"]
        out = [f"{n} variants in {self.out}: {si_bytes(now)} and {si_bytes(self.shared_bytes)} that they share, "
               f"{was / max(1, now + self.shared_bytes):.1f} times less than {si_bytes(was)}"]  # fmt: skip
        if coded:
            worst = max(coded, key=lambda line: line.error)
            bits = sum(line.bits for line in coded) / len(coded)
            out.append(f"{bits:.2f} bits a number; error {sum(x.error for x in coded) / len(coded):.4f} on average, "
                       f"{worst.error:.4f} at most ({worst.was})")  # fmt: skip
        scored = [line for line in self.lines if line.recovery is not None]
        if scored:
            least = min(scored, key=lambda line: line.recovery or 0.0)
            mean = sum(line.recovery or 0.0 for line in scored) / len(scored)
            out.append(f"{100 * mean:.2f} % of the gain on held-out rows is left on average, "
                       f"{100 * (least.recovery or 0.0):.2f} % at least ({least.was})")  # fmt: skip
        for how, many in sorted(Counter(line.how for line in self.lines).items()):
            out.append(f"{many} {how}" if how == "as it is" else f"{many} by {how}")
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


def pack(recipe: PackRecipe, say: Say = lambda _: None) -> Packed:
    """Pack a fleet's variants into another fleet, which is made where it is not there.

    Where `out` has packed variants, new ones are coded with what those share, and nothing that is there changes. A run
    that was stopped goes on. The source is only read.

    Raises: WrongUse for a fleet packed into itself, no variants, another base, or options that are not those of the
        pack that is there; what the packer and the store raise.
    """
    name, options = recipe.method()
    packer, out = _checked(recipe)
    with Store.open(recipe.fleet) as source:
        chosen = _chosen(recipe, source)
        with _open(out, source) as into:
            found, had = _shared(into, name, options) if not recipe.refit else (None, [])
            packed = into.versions(all=True) if not recipe.refit else []
            there = {(v.name, v.parents[0]) for v in packed if v.parents}
            new = [v for v in chosen if (v.name, v.identity) not in there]
            if not new:
                return Packed(str(out), (), len(chosen), 0, None, ())
            work = _Work(source, new, recipe.held_out)
            if found is None and work.coded:
                say(f"fitting {name} to {len(work.coded)} variants at {len(work.sites)} sites")
                found = _Shared.of(work.sites, packer.fit(work.fleet, work.sites), len(work.coded))
            lines = [_one(work, into, v, packer, found, recipe) for v in new]
            compared = _compare(work, COMPARED) if recipe.compare and work.coded else ()
    n_shared = found.file.numel() if found else 0
    coded = [line.bits for line in lines if line.how == name]
    drift = sum(coded) / len(coded) / (sum(had) / len(had)) if coded and had else None
    return Packed(str(out), tuple(lines), len(chosen) - len(new), n_shared, drift, compared)


def plan(recipe: PackRecipe) -> Plan:
    """What there is to pack; nothing is written. Raises: as `pack`, where it is known by then."""
    out = _checked(recipe)[1]
    with Store.open(recipe.fleet) as source:
        chosen = _chosen(recipe, source)
        work = _Work(source, chosen, "")
    numbers, n_bytes = sum(work.numbers.values()), sum(v.n_bytes for v in chosen)
    return Plan(str(out), recipe.method()[0], len(chosen), len(work.coded), len(work.sites), numbers, n_bytes, numbers,
                (numbers + 1) // 2)  # fmt: skip


def _checked(recipe: PackRecipe) -> tuple[Packer, Path]:
    """The packer, and the fleet that variants go to. Raises: WrongUse for options, or one packed into itself."""
    name, options = recipe.method()
    out = Path(recipe.out or _beside(recipe.fleet))
    packer: Packer = packs.make(name, **options)
    if out.resolve() == Path(recipe.fleet).resolve():
        raise WrongUse(f"{str(out)!r} cannot be packed into itself; name another fleet as out")
    return packer, out


def _chosen(recipe: PackRecipe, source: Store) -> list[Version]:
    """The versions that are packed. Raises: WrongUse where there are none."""
    chosen = [source.resolve(ref) for ref in recipe.variants] or source.versions()
    if not chosen:
        raise WrongUse(f"{recipe.fleet!r} has no variants to pack; train or import some first")
    return chosen


def _beside(fleet: str) -> str:
    path = Path(fleet)
    return str(path.with_name(f"{path.name.removesuffix('.fleet')}.packed.fleet"))


def _open(out: Path, source: Store) -> Store:
    """The fleet that variants go to; made of the source's base where nothing is there."""
    if not (out / "fleet.db").exists():
        return Store.create(out, source.base)
    into = Store.open(out)
    if into.base.hash != source.base.hash:
        into.close()
        raise WrongUse(f"{str(out)!r} is a fleet of {into.base.name!r}, not of {source.base.name!r}; name another")
    return into


@dataclass(frozen=True)
class _Shared:
    """What variants of some sites share: tensors by leaf, the file that the fleet holds them as, and what of its bytes
    counts for each variant where it is new."""

    sites: tuple[Site, ...]
    tensors: Mapping[str, torch.Tensor]
    file: torch.Tensor
    paid: float = 0.0

    @classmethod
    def of(cls, sites: Sequence[Site], tensors: Mapping[str, torch.Tensor], new_for: int = 0) -> _Shared:
        """Of the tensors; `new_for` so many variants, where no fleet has them yet."""
        file = torch.frombuffer(bytearray(safe.to_bytes(tensors)), dtype=torch.uint8)
        return cls(tuple(sites), tensors, file, file.numel() / new_for if new_for else 0.0)


def _shared(into: Store, name: str, options: Mapping[str, Any]) -> tuple[_Shared | None, list[float]]:
    """The sites and what is shared of the packed variants that are there, and the bits that each took.

    Raises: WrongUse where they were packed by another method, or by options that decoding depends on.
    """
    every = [v for v in into.versions(all=True) if v.method == METHOD and v.options["packer"] == name]
    others = {str(v.options["packer"]) for v in into.versions() if v.method == METHOD} - {name}
    if not every and (others := {n for n in others if not packs[n].free}):  # type: ignore[attr-defined]
        raise WrongUse(f"the variants in {str(into.path)!r} are packed by {', '.join(sorted(others))}, not by {name}; "
                       f"say pack.method={min(others)}, or refit=true")  # fmt: skip
    if not every:
        return None, []
    last = max(every, key=lambda v: v.created)
    asked, had = ({k: v for k, v in o.items() if k not in ("error", "expect")} for o in
                  (_options(packs.make(name, **options)), last.options["options"]))  # fmt: skip
    if asked != had:
        odd = next(k for k in asked if asked[k] != had.get(k))
        raise WrongUse(f"the variants in {str(into.path)!r} are packed with {odd} = {had.get(odd)}, not {asked[odd]}; "
                       "say the same, or refit=true")  # fmt: skip
    variant = into.load(last.ref, packed=True)
    shared = _Shared.of(variant.sites, safe.from_bytes(variant.pool[GROUP]["shared"].numpy().tobytes()))
    bits = [into.manifest(v.ref)["provenance"].get(METHOD, {}).get("bits") for v in every]
    return shared, [b for b in bits if b]


def _options(packer: Any) -> dict[str, Any]:
    """All options of a packer, as its manifest says them."""
    return {k: getattr(packer, k) for k in options_of(type(packer))}


class _Work:
    """The source's variants as factors; which of them can be coded, their sites, and how many numbers they are."""

    def __init__(self, source: Store, versions: Sequence[Version], held_out: str) -> None:
        self.source = source
        self.coded: list[Version] = []
        self.numbers: dict[str, int] = {}
        self.native: dict[str, float] = {}
        sites: dict[str, Site] = {}
        users, owned = Counter[str](), dict[str, dict[str, int]]()
        for version in versions:
            variant = source.load(version.ref)
            owned[version.ref] = {safe.tensor_hash(t): t.nbytes for t in variant.flat().values()}
            users.update(list(owned[version.ref]))  # each of them once
            found = factors(variant)
            if found is None:
                continue
            self.coded.append(version)
            self.numbers[version.ref] = sum(B.numel() + A.numel() for B, A in found.values())
            for site in variant.sites:
                known = sites.setdefault(site.name, site)
                if (known.out, known.into) != (site.out, site.into):
                    raise BadInput(f"{version.ref!r} has {site.name!r} of {site.out} x {site.into}, others of "
                                   f"{known.out} x {known.into}; they cannot be of one base")  # fmt: skip
        self.sites = sorted(sites.values(), key=lambda s: natural(s.name))
        for ref, of in owned.items():  # what several have counts for each as its part
            self.native[ref] = sum(n / users[h] for h, n in of.items())
        self.scorer = Scorer(source.base, held_out) if held_out else None
        self._codecs: dict[tuple[str, tuple[str, ...]], Codec] = {}

    def fleet(self) -> Iterator[Factors]:
        """The variants that can be coded."""
        for version in self.coded:
            found = factors(self.source.load(version.ref))
            assert found is not None
            yield found

    def codec(self, packer: Packer, shared: _Shared) -> Codec:
        """A packer's codec, made once."""
        key = repr(packer), tuple(s.name for s in shared.sites)
        if key not in self._codecs:
            self._codecs[key] = packer.codec(shared.sites, shared.tensors)
        return self._codecs[key]


def _one(work: _Work, into: Store, version: Version, packer: Packer, found: _Shared | None,
         recipe: PackRecipe) -> Line:  # fmt: skip
    """Pack and publish one variant: by the packer, finer where its score falls short, or as it is."""
    variant = work.source.load(version.ref)
    exact = factors(variant)
    name, _ = recipe.method()
    before = work.scorer.gain(version.name, variant) if work.scorer else None
    tries: list[tuple[str, Packer]] = []
    if exact is not None and found is not None:
        finer = [packer.finer(share) for share in FINER] if work.scorer else []
        tries = [(name, packer), *((name, way) for way in finer if way is not None)]
        tries.append((LAST[0], packs.make(LAST[0], **LAST[1])))
    for how, way in tries:
        assert exact is not None and found is not None
        shared = found if how == name else _Shared.of(variant.sites, {})
        codec = work.codec(way, shared)
        made = _coded(variant, how, way, shared, codec.encode(exact))
        coded = made.pool[GROUP]["code"].numel()
        line = _line(version, how, made, codec, exact, work)
        if way.bounds and line.error > 1.01 * _options(way)["error"]:
            continue
        if work.scorer and before is not None:
            left = work.scorer.gain(version.name, as_plain(made, codec)) / before if before > 0 else 1.0
            line = _with(line, recovery=left)
            if left < recipe.recovery:
                continue
        if coded + shared.paid + sum(t.nbytes for t in variant.extra.values()) >= work.native[version.ref]:
            break  # what it is now takes less
        return _publish(into, version, made, line, work)
    line = Line("", version.ref, "as it is", version.n_bytes, version.n_bytes, 0.0, 0.0, 0.0, "", 0.0,
                None if before is None else 1.0)  # fmt: skip
    return _publish(into, version, work.source.load(version.ref, packed=True), line, work)


def _coded(variant: Variant, name: str, packer: Packer, shared: _Shared, code: torch.Tensor) -> Variant:
    """The variant that a store holds in place of `variant`."""
    options, sites = {"packer": name, "options": _options(packer)}, shared.sites
    return Variant(METHOD, options, variant.base, sites, {s.name: GROUP for s in sites},
                   {s.name: {} for s in sites}, {GROUP: {"code": code, "shared": shared.file}},
                   variant.extra)  # fmt: skip


def _off(exact: Factors, back: Factors) -> tuple[float, Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """The relative error over all sites, and the singular values of what is off and of the delta, by site."""
    off, own = singular_values(difference(exact, back)), singular_values(exact)
    lost, whole = (sum(float(s.double().square().sum()) for s in of.values()) ** 0.5 for of in (off, own))
    return lost / whole if whole else 0.0, off, own


def _line(version: Version, how: str, made: Variant, codec: Codec, exact: Factors, work: _Work) -> Line:
    """What packing cost the variant, from the singular values of what is off."""
    code = made.pool[GROUP]["code"]
    error, off, own = _off(exact, codec.decode(code))
    sites = {n: float(off[n].norm() / s.norm()) for n, s in own.items() if float(s.norm()) > 0}
    site = max(sites, key=lambda n: sites[n], default="")
    spectral = max((float(off[n][0] / own[n][0]) for n in sites), default=0.0)
    extra = sum(t.nbytes for t in made.extra.values())
    bits = 8 * code.numel() / max(1, work.numbers[version.ref])
    return Line("", version.ref, how, code.numel() + extra, version.n_bytes, bits, error, sites.get(site, 0.0), site,
                spectral, None)  # fmt: skip


def _with(line: Line, **more: Any) -> Line:
    return Line(**{**asdict(line), **more})


def _publish(into: Store, version: Version, made: Variant, line: Line, work: _Work) -> Line:
    """Publish it under its name and aliases, its source as its parent."""
    facts = {k: v for k, v in asdict(line).items() if k not in ("ref", "was_bytes") and v is not None}
    facts = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in facts.items()}
    kept = {k: v for k, v in work.source.manifest(version.ref)["provenance"].items() if k == "trained"}
    provenance = {**kept, METHOD: facts} if line.how != "as it is" else {**made.provenance}
    done = into.publish(Variant(made.method, made.options, made.base, made.sites, made.group_of, made.own, made.pool,
                                made.extra, provenance), version.name, aliases=version.aliases,
                        parents=[version.identity])  # fmt: skip
    return _with(line, ref=done.ref)


def _compare(work: _Work, ways: Mapping[str, tuple[str, dict[str, Any]]]) -> tuple[Compared, ...]:
    """What other packers make of the same variants."""
    out = []
    for said, (name, options) in ways.items():
        packer: Packer = packs.make(name, **options)
        shared = packer.fit(work.fleet, work.sites)
        codec = packer.codec(work.sites, shared)
        sizes, errors = [], []
        for exact in work.fleet():
            code = codec.encode(exact)
            sizes.append(code.numel())
            errors.append(_off(exact, codec.decode(code))[0])
        out.append(Compared(said, sum(sizes) / len(sizes), len(safe.to_bytes(shared)) if shared else 0,
                            sum(errors) / len(errors)))  # fmt: skip
    return tuple(out)

