"""A fleet's variants in fewer bytes: each coded with what all share, its error measured, and published in a fleet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from plures.bridges.on_model import factors
from plures.core.errors import BadInput, WrongUse
from plures.core.folder import options_of
from plures.engine.model import Base, load_base
from plures.flows.pack_metric import examples, moments
from plures.flows.pack_report import AS_IS, Compared, Line, Packed, Plan
from plures.flows.pack_score import Scorer
from plures.flows.pack_search import FINEST, coarsest, share
from plures.flows.recipes import PackRecipe
from plures.pack import ENCODING, Codec, Factors, Packer, packs
from plures.pack._metric import LEAVES, Measured, codec, finer, fit, metric
from plures.store import Store, Version
from plures.store.unpack import GROUP, METHOD, as_plain
from plures.tensors import safe
from plures.tensors.gauge import difference, singular_values
from plures.tensors.site import Site, natural
from plures.tensors.variant import Variant

Say = Callable[[str], None]
LAST: tuple[str, dict[str, Any]] = ("rtn", {"bits": 8})  # what a variant is packed by where nothing else will do
COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("rtn", {"bits": 8}), "int4": ("rtn", {"bits": 4}), "svd": ("svd", {}),
}  # fmt: skip


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
            if not recipe.variants:
                new = _not_older(new, source, there, say)
            if not new:
                return Packed(str(out), (), len(chosen), 0, None, ())
            work = _Work(source, new, recipe.held_out)
            if found is None and work.coded:
                leaves = _metric(work, recipe, options, say) if recipe.metric else {}
                say(f"fitting {name} to {len(work.coded)} variants at {len(work.sites)} sites")
                found = _Shared.of(work.sites, fit(packer, work.fleet, work.sites, leaves), len(work.coded))
            elif found is not None and recipe.metric and LEAVES[0] not in found.tensors:
                raise WrongUse(f"the variants in {str(out)!r} are packed in no metric; leave out metric, or refit=true")
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
    """The versions that are packed: those named, or the latest of all and those with an alias, the oldest first.

    Raises: WrongUse where there are none.
    """
    latest = {v.ref for v in source.versions()}
    chosen = [source.resolve(ref) for ref in recipe.variants]
    chosen = chosen or [v for v in source.versions(all=True) if v.ref in latest or v.aliases]
    if not chosen:
        raise WrongUse(f"{recipe.fleet!r} has no variants to pack; train or import some first")
    return chosen


def _not_older(new: Sequence[Version], source: Store, there: Collection[tuple[str, str]], say: Say) -> list[Version]:
    """Those that are not older than what is packed under their name: what is published last is the latest."""
    newest: dict[str, int] = {}
    for v in source.versions(all=True):
        if (v.name, v.identity) in there:
            newest[v.name] = max(newest.get(v.name, 0), v.version)
    old = [v for v in new if v.version < newest.get(v.name, 0)]
    for v in old:
        say(f"{v.ref} ({', '.join(v.aliases)}) is older than what is packed of {v.name!r}: it is left out; refit=true "
            "packs both in their order")  # fmt: skip
    return [v for v in new if v not in old]


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
    asked, had = ({k: v for k, v in o.items() if k not in ENCODING} for o in
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
        self._base: Base | None = None
        self.scorer = Scorer(self.base(), held_out) if held_out else None
        self.step = 0  # that did for the variant before
        self._codecs: dict[tuple[str, tuple[str, ...]], Codec] = {}

    def base(self) -> Base:
        """The base, loaded once."""
        if self._base is None:
            self._base = load_base(self.source.base)
        return self._base

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
            self._codecs[key] = codec(packer, shared.sites, shared.tensors)
        return self._codecs[key]


def _metric(work: _Work, recipe: PackRecipe, options: Mapping[str, Any],
            say: Callable[[str], None]) -> dict[str, torch.Tensor]:  # fmt: skip
    """The metric of the recipe's rows, as finely as so many variants are worth."""
    names = [v.name for v in work.coded]
    chosen = examples(work.base(), recipe.metric, names, recipe.metric_tokens)
    rows = sum(work.numbers.values()) / sum(s.out + s.into for s in work.sites)
    many = int(options.get("expect", 0)) or len(names)
    return metric(moments(work.base(), work.sites, chosen, say), rows * many / len(names))


def _one(work: _Work, into: Store, version: Version, packer: Packer, found: _Shared | None,
         recipe: PackRecipe) -> Line:  # fmt: skip
    """Pack and publish one variant: by the packer, finer where its score falls short, or as it is."""
    variant = work.source.load(version.ref)
    exact = factors(variant)
    before = work.scorer.gain(version.name, variant) if work.scorer else None
    if exact is not None and found is not None:
        trial = _Trial(work, version, variant, exact, before, recipe.recovery)
        last: Packer = packs.make(LAST[0], **LAST[1])
        made = trial.best(recipe.method()[0], packer, found) or trial.best(
            LAST[0], last, _Shared.of(variant.sites, {}))  # fmt: skip
        size = made[0].pool[GROUP]["code"].numel() + found.paid + _extra(variant) if made else 0.0
        if made and size < work.native[version.ref]:  # else what it is now takes less
            return _publish(into, version, *made, work)
    line = Line.as_is(version.ref, version.n_bytes, None if before is None else 1.0)
    return _publish(into, version, work.source.load(version.ref, packed=True), line, work)


@dataclass
class _Trial:
    """One variant, its factors, what it gains on held-out rows, and how much of that must be left."""

    work: _Work
    version: Version
    variant: Variant
    exact: Factors
    before: float | None
    least: float
    tried: dict[int, tuple[Variant, Line]] = field(default_factory=dict)

    def best(self, name: str, packer: Packer, shared: _Shared) -> tuple[Variant, Line] | None:
        """The variant as coarsely as may be by this packer; None where it loses too much."""
        self.tried.clear()
        fixed = self.before is None or packer.finer(1.0) is None
        at = coarsest(lambda step: self._left(step, name, packer, shared), self.least, 0 if fixed else self.work.step,
                      0 if fixed else FINEST)  # fmt: skip
        if at is None:
            return None
        self.work.step = self.work.step if fixed else at
        return self.tried[at]

    def _left(self, step: int, name: str, packer: Packer, shared: _Shared) -> float:
        """Of the gain, so many steps finer; -1 where the error is not what was asked for."""
        way, coder = (packer.finer(share(step)) if step else packer), self.work.codec(packer, shared)
        assert way is not None
        coder = finer(coder, way) if step else coder
        made = _coded(self.variant, name, way, shared, coder.encode(self.exact))
        line = _line(self.version, name, made, coder, self.exact, self.work)
        error = line.error if line.in_metric is None else line.in_metric
        if way.bounds and error > 1.01 * _options(way)["error"]:
            return -1.0
        left = 1.0
        if self.work.scorer and self.before is not None:
            gain = self.work.scorer.gain(self.version.name, as_plain(made, coder))
            left = gain / self.before if self.before > 0 else 1.0
            line = _with(line, recovery=left)
        self.tried[step] = made, line
        return left


def _extra(variant: Variant) -> int:
    return sum(t.nbytes for t in variant.extra.values())


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


def _line(version: Version, how: str, made: Variant, coder: Codec, exact: Factors, work: _Work) -> Line:
    """What packing cost the variant, from the singular values of what is off."""
    code = made.pool[GROUP]["code"]
    back = coder.decode(code)
    error, off, own = _off(exact, back)
    sites = {n: float(off[n].norm() / s.norm()) for n, s in own.items() if float(s.norm()) > 0}
    site = max(sites, key=lambda n: sites[n], default="")
    spectral = max((float(off[n][0] / own[n][0]) for n in sites), default=0.0)
    bits = 8 * code.numel() / max(1, work.numbers[version.ref])
    measured = coder.to if isinstance(coder, Measured) else None
    in_metric = _off(measured.there(exact), measured.there(back))[0] if measured else None
    return Line("", version.ref, how, code.numel() + _extra(made), version.n_bytes, bits, error, sites.get(site, 0.0),
                site, spectral, None, in_metric)  # fmt: skip


def _with(line: Line, **more: Any) -> Line:
    return Line(**{**asdict(line), **more})


def _publish(into: Store, version: Version, made: Variant, line: Line, work: _Work) -> Line:
    """Publish it under its name and aliases, its source as its parent."""
    facts = {k: v for k, v in asdict(line).items() if k not in ("ref", "was_bytes") and v is not None}
    facts = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in facts.items()}
    kept = {k: v for k, v in work.source.manifest(version.ref)["provenance"].items() if k == "trained"}
    provenance = {**kept, METHOD: facts} if line.how != AS_IS else {**made.provenance}
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
        plain = packer.codec(work.sites, shared)
        sizes, errors = [], []
        for exact in work.fleet():
            code = plain.encode(exact)
            sizes.append(code.numel())
            errors.append(_off(exact, plain.decode(code))[0])
        out.append(Compared(said, sum(sizes) / len(sizes), len(safe.to_bytes(shared)) if shared else 0,
                            sum(errors) / len(errors)))  # fmt: skip
    return tuple(out)

