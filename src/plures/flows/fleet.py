"""The Python face: `fleet = plures.Fleet("acme.fleet"); v = fleet.train("support", data="tickets.jsonl")`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from plures.adapt import adapts
from plures.bridges.adapter_folder import check_shapes, read_folder, write_folder
from plures.bridges.on_model import as_lora, capture, merge_into
from plures.core.errors import RecipeErrors, WrongUse, disk, nearest
from plures.core.events import Sink
from plures.core.folder import options_of
from plures.core.recipe import load
from plures.engine.ask import Prompt, Sampling
from plures.engine.data import HeldOut, Rows, encode, read_rows
from plures.engine.generate import Completion, Session
from plures.engine.loop import Score, evaluate
from plures.engine.model import empty_base, linear_names, load_base, reference
from plures.engine.rate import Alone
from plures.engine.together import Together
from plures.flows.evolve import Evolved, evolve
from plures.flows.evolve import Score as Scorer
from plures.flows.handover import named_base
from plures.flows.pack import pack
from plures.flows.pack_report import Packed
from plures.flows.recipes import DataPart, EvolveRecipe, LoopPart, PackRecipe, TrainRecipe
from plures.flows.train import device, on_device, pad_id, train
from plures.route import make as make_route
from plures.store import Store, Version
from plures.store.names import check_name
from plures.tensors.together import new_folder
from plures.tensors.variant import Variant

Data = str | Path | Iterable[Mapping[str, Any]]
Form = Literal["peft", "lora", "merged"]


class Fleet:
    """A base and all its variants, in one folder.

    `Fleet(path)` opens one; `Fleet(path, base="org/model")` begins one where there is none, and says where the base
    is where it was moved. The base is loaded when text is first asked for, once, and shared by all variants of this
    object.

    Raises: BadInput where `path` is no fleet and no base is named, or where it is the fleet of another base.
    """

    def __init__(self, path: str | Path, base: str | None = None, revision: str = "") -> None:
        self.path = Path(path)
        if base is not None and not (self.path / "fleet.db").exists():
            Store.create(self.path, reference(base, revision)).close()
        self.store = Store.open(self.path)
        if base is not None:
            try:
                self.store.move_base(reference(base, revision))
            except BaseException:
                self.store.close()
                raise
        self._session: Session | None = None

    def close(self) -> None:
        """Let go of the store."""
        self.store.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def session(self) -> Session:
        """The base in memory, ready to answer."""
        if self._session is None:
            self._session = Session(load_base(self.store.base, device=device("auto")))
        return self._session

    def train(self, name: str, data: Data, *, method: str = "mos", held_out: Data | None = None, resume: bool = False,
              sinks: tuple[Sink, ...] = (), **settings: Any) -> FleetVariant:  # fmt: skip
        """Train a variant and publish it as the next version of `name`.

        `data` and `held_out` are files, folders, `datasets` ids, or rows in memory. `settings` are the method's
        options (`r=16`), the loop's (`steps=300, lr=1e-2`), the data's (`max_tokens=256`) and the recipe's
        (`targets=["q_proj"]`), by their plain names.

        Raises: RecipeErrors for an unknown setting or a wrong value, all at once.
        """
        rows = None if isinstance(data, (str, Path)) else read_rows(data)
        held = None if held_out is None or isinstance(held_out, (str, Path)) else read_rows(held_out)
        told = str(data) if rows is None else _in_memory(rows)
        told_held = str(held_out) if isinstance(held_out, (str, Path)) else _in_memory(held) if held else None
        recipe = _recipe(str(self.path), name, method, told, told_held, settings)
        done = train(recipe, sinks=sinks, resume=resume, rows=rows, held=held)
        return FleetVariant(self, done.version)

    def versions(self, name: str | None = None, all: bool = False) -> list[Version]:
        """The latest version of every name, or of `name`; with `all`, every version."""
        return self.store.versions(name, all=all)

    def __getitem__(self, ref: str) -> FleetVariant:
        """`fleet["support"]` (latest), `fleet["support@2"]`, `fleet["support@prod"]`."""
        return FleetVariant(self, self.store.resolve(ref))

    def __iter__(self) -> Iterator[FleetVariant]:
        return (FleetVariant(self, v) for v in self.versions())

    def generate(self, requests: Sequence[tuple[str | None, Prompt]], **how: Any) -> list[Completion]:
        """Answer `(variant, prompt)` pairs in one batch, each row by its own variant; None is the base."""
        session = self.session()
        slots = [session.slot(None) if ref is None else self[ref].slot() for ref, _ in requests]
        return session.generate([p for _, p in requests], slots, Sampling(**how))

    def together(self, refs: Sequence[str | None], route: str = "mean", **options: Any) -> FleetTogether:
        """Variants that answer as one (None: the base among them); `route` weighs them: "mean", "drm" or "posterior".

        Options are given by name, or after the route's: `"posterior prior=0.7,0.3"`.

        Raises: WrongUse for fewer than two variants, one that is named twice, or an unknown route or option.
        """
        way, asked = make_route(route, **options), [None if ref is None else self[ref] for ref in refs]
        session = self.session()
        slots = [session.slot(None) if variant is None else variant.slot() for variant in asked]
        return FleetTogether(self, Together(session, slots, way))

    def evolve(self, variants: Sequence[str], name: str, *, score: Scorer | None = None, check: Scorer | None = None,
               sinks: tuple[Sink, ...] = (), **settings: Any) -> Evolved:  # fmt: skip
        """Search among mixtures of `variants` and publish the best: all-round as `name`, at a task as `name-<task>`.

        Tasks are files of rows (`tasks=["a.jsonl", "b.jsonl"]`), or what `score(variant)` gives by task, higher being
        better; `check` is the like for the comparison in the end. `settings` are keys of `plures recipe evolve`.

        Raises: RecipeErrors for an unknown setting or a wrong value, all at once; as `plures.flows.evolve.evolve`.
        """
        said = {"fleet": str(self.path), "name": name, "variants": list(variants), **settings}
        return evolve(load(EvolveRecipe, said, where="evolve"), score=score, check=check, sinks=sinks)

    def bring_in(self, folder: str | Path, name: str, *, aliases: Sequence[str] = ()) -> FleetVariant:
        """Import an adapter folder (a PEFT LoRA, or one of ours) as the next version of `name`."""
        return self.bring_in_all({name: folder}, aliases=aliases)[0]

    def bring_in_all(self, folders: Mapping[str, str | Path], *, aliases: Sequence[str] = ()) -> list[FleetVariant]:
        """Import adapter folders by the names that they get; each is read and checked before the first is published."""
        base = empty_base(self.store.base)
        whole, sites = {k: tuple(t.shape) for k, t in base.state_dict().items()}, linear_names(base)

        def read(folder: Path) -> Variant:
            variant, named = read_folder(folder, self.store.base, sites, whole), named_base(folder)
            facts = _counted(variant) | ({"named_base": named} if named else {})
            return variant.with_provenance(imported_from=str(folder), **facts)

        for name in (*folders, *aliases) if len(folders) > 1 else ():
            check_name(name)
            if name in folders:
                read(Path(folders[name]))
        return [FleetVariant(self, self.store.publish(read(Path(folder)), name, aliases=aliases))
                for name, folder in folders.items()]  # fmt: skip

    def pack(self, out: str | Path = "", **settings: Any) -> Packed:
        """Put the variants in fewer bytes into another fleet (beside this one where `out` is not said).

        `settings` are keys of `plures recipe pack`: `pack={"error": 0.05}`, `held_out=…`, `refit=…`.
        Raises: RecipeErrors for an unknown setting or a wrong value, all at once; as `plures.flows.pack.pack`.
        """
        return pack(load(PackRecipe, {"fleet": str(self.path), "out": str(out), **settings}, where="pack"))

    def publish(self, model: Any, name: str, *, adapter: str = "default", aliases: Sequence[str] = (),
                **facts: Any) -> FleetVariant:  # fmt: skip
        """Publish an adapter of a PEFT model, whoever trained it: transformers' Trainer, TRL, accelerate, a loop.

        The model must have been made of this fleet's base with `plures.config_for(…)`; `facts` are JSON for the
        lineage. Raises: WrongUse where it has no such adapter of ours; BadInput where it is of another base.
        """
        config = getattr(model, "peft_config", {}).get(adapter)
        if config is None or getattr(config, "method", None) not in adapts:
            have = ", ".join(getattr(model, "peft_config", {})) or "none"
            raise WrongUse(
                f"the model has no adapter {adapter!r} made with plures.config_for (its adapters: {have}); "
                "save a plain LoRA with save_pretrained and import the folder"
            )
        variant = capture(model, adapter, self.store.base, {"trainer": "outside Plures", **facts})
        check_shapes("the model", variant, linear_names(empty_base(self.store.base)))
        variant = variant.with_provenance(**_counted(variant))
        return FleetVariant(self, self.store.publish(variant, name, aliases=aliases))

    def score(self, ref: str | None, data: Data, *, columns: Mapping[str, str] | None = None, max_tokens: int = 512,
              batch_rows: int = 8) -> Score:  # fmt: skip
        """The held-out loss of a variant (None: the base) on rows; a variant's is kept where the fleet is writable."""
        asked = None if ref is None else self[ref]  # an unknown name is told before anything is read
        rows = read_rows(data, columns=columns)
        session = self.session()
        base = session.base
        examples = encode(rows, base.tokenizer, max_tokens=max_tokens)
        slot = session.slot(None) if asked is None else asked.slot()
        session.make_room([slot])
        model = Alone(session, slot).eval()
        n_bytes = sum(e.n_bytes for e in examples)
        batches = HeldOut(examples, batch_rows, max_tokens, pad_id(base))
        got = evaluate(model, lambda: on_device(batches, base.model.device), n_bytes)
        if asked is not None and self.store.writable:
            for metric in ("nats_per_token", "bits_per_byte", "perplexity"):
                self.store.score(asked.version.ref, _label(data, rows), metric, getattr(got, metric))
        return got


class FleetVariant:
    """One version in a fleet: train made it, the store keeps it, and it answers."""

    def __init__(self, fleet: Fleet, version: Version) -> None:
        self.fleet, self.version = fleet, version

    def __repr__(self) -> str:
        return f"<{self.version.ref} {self.version.method} {self.version.identity[:12]}>"

    def load(self) -> Variant:
        """The variant's tensors, each checked against its hash."""
        return self.fleet.store.load(self.version.ref)

    def slot(self) -> str:
        """Where the variant stands in the fleet's session, loaded on first use."""
        session = self.fleet.session()
        known = session.slots.get(self.version.identity)
        return known or session.slot(self.load(), self.version.identity)

    def generate(self, prompt: Prompt, **how: Any) -> str:
        """Text that follows `prompt`; `how` is `max_tokens`, `temperature`, `top_p`, `seed` (greedy by default)."""
        return self.fleet.session().generate([prompt], [self.slot()], Sampling(**how))[0].text

    def score(self, data: Data, **how: Any) -> Score:
        """Held-out loss on rows, recorded in the store."""
        return self.fleet.score(self.version.ref, data, **how)

    def export(self, out: str | Path, as_: Form = "peft") -> Path:
        """Write the variant as a PEFT folder, as plain LoRA ("lora"), or merged into a whole model ("merged").

        Raises: WrongUse for another form, an `out` that is not empty, or "lora" of a method that is not low-rank.
        """
        if as_ not in ("peft", "lora", "merged"):
            raise WrongUse(
                f"export form {as_!r} is not one of peft, lora, merged.{nearest(as_, ('peft', 'lora', 'merged'))}"
            )
        folder = Path(out)
        if as_ != "merged":
            variant = self.load()
            write_folder(as_lora(variant) if as_ == "lora" else variant, folder, name=self.version.ref)
            return folder
        with new_folder(folder) as part:
            base = load_base(self.fleet.store.base)
            with disk(folder):
                merge_into(base.model, self.load()).save_pretrained(part)
                base.tokenizer.save_pretrained(part)
        return folder


class FleetTogether:
    """Several variants of a fleet that answer as one."""

    def __init__(self, fleet: Fleet, model: Together) -> None:
        self.fleet, self.model = fleet, model

    def generate(self, prompt: Prompt, **how: Any) -> str:
        """Text that follows `prompt`; `how` is `max_tokens`, `temperature`, `top_p`, `seed` (greedy by default)."""
        return self.model.generate([prompt], Sampling(**how))[0].text

    def score(self, data: Data, *, columns: Mapping[str, str] | None = None, max_tokens: int = 512,
              batch_rows: int = 8) -> Score:  # fmt: skip
        """Held-out loss of what they predict together. It is recorded nowhere: it is no one version's."""
        base = self.fleet.session().base
        examples = encode(read_rows(data, columns=columns), base.tokenizer, max_tokens=max_tokens)
        batches = HeldOut(examples, batch_rows, max_tokens, pad_id(base))
        return evaluate(self.model, lambda: on_device(batches, base.model.device), batches.n_bytes)

    def posterior(self, prompts: Sequence[Prompt], prior: Sequence[float] = (),
                  batch_rows: int = 8) -> list[list[float]]:  # fmt: skip
        """How probable each member's domain is, prompt by prompt: the route `posterior` at the prompt's end.

        Raises: WrongUse for a prior that is not of these members, or an empty prompt.
        """
        way = make_route("posterior", prior=",".join(map(repr, map(float, prior))))
        encoded = [self.fleet.session().encode(p) for p in prompts]
        if odd := [p for p, ids in zip(prompts, encoded, strict=True) if not ids]:
            raise WrongUse(f"prompt {odd[0]!r} is empty: it has no tokens")
        out: list[list[float]] = []
        for at in range(0, len(encoded), batch_rows):
            past = self.model.likelihoods(encoded[at : at + batch_rows]).double()
            out += way.weigh(past.unsqueeze(-1), past).T.tolist()
        return out

    def prior(self, data: Data, *, columns: Mapping[str, str] | None = None, max_tokens: int = 512,
              batch_rows: int = 8) -> list[float]:  # fmt: skip
        """How much of some rows is of each member's domain: the mean of their posteriors, for `posterior`'s `prior`.

        Longer rows count by their windows of `max_tokens`; no member gets less than a millionth.
        """
        base = self.fleet.session().base
        examples = encode(read_rows(data, columns=columns), base.tokenizer, max_tokens=max_tokens)
        totals = [0.0] * len(self.model.slots)
        for at in range(0, len(examples), batch_rows):
            past = self.model.likelihoods([e.ids for e in examples[at : at + batch_rows]]).double()
            totals = [t + s for t, s in zip(totals, past.softmax(0).sum(1).tolist(), strict=True)]
        return [max(t / len(examples), 1e-6) for t in totals]


def _counted(variant: Variant) -> dict[str, int]:
    """The number that trained, for a variant that came without one."""
    frozen = adapts[variant.method].frozen  # type: ignore[attr-defined]
    leaves = [(k.rpartition("/")[2], t) for k, t in variant.flat().items()]
    return {"trained": sum(t.numel() for k, t in leaves if t.is_floating_point() and k not in frozen)}


def _label(data: Data, rows: Rows) -> str:
    return str(data) if isinstance(data, (str, Path)) else _in_memory(rows)


def _in_memory(rows: Rows) -> str:
    """What stands for rows that no file holds: other rows are another run."""
    return f"rows:{rows.fingerprint[:12]}"


def _recipe(fleet: str, name: str, method: str, data: str, held: str | None, settings: dict[str, Any]) -> TrainRecipe:
    """Sort plain settings into the recipe's sections. A name that a method and the loop share goes to the method."""
    options, loop = options_of(adapts[method]), {f.name for f in fields(LoopPart)}
    part, top = {f.name for f in fields(DataPart)}, {f.name for f in fields(TrainRecipe)}
    known = [*options, *sorted(loop | part | (top - {"fleet", "name", "data", "adapt", "train"}))]
    wrong = [f"{k} is no setting of {method!r}, the loop, the data or the recipe.{nearest(k, known)}"
             for k in settings if k not in known]  # fmt: skip
    if wrong:
        raise RecipeErrors(wrong, "train")

    def of(names: Iterable[str]) -> dict[str, Any]:
        return {k: v for k, v in settings.items() if k in set(names)}

    said = {
        "fleet": fleet,
        "name": name,
        "adapt": {"method": method, **of(options)},
        "train": of(loop - set(options)),
        "data": {"train": data, "held_out": held} | of(part - set(options)),
        **of(top - set(options) - loop - part),
    }
    return load(TrainRecipe, said, where="train")
