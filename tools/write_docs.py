"""Write the generated pages of the documentation, or with `--check` say which are stale (exit 1).

    python tools/write_docs.py            docs/{methods/*,papers,cli,recipe-train,measured}.md and README's tables
    python tools/write_docs.py --check

Pages come from the methods' cards and docstrings, the recipe's dataclasses, the verbs' help and the raw results in
benchmarks/results. A benchmark without a result says "not measured yet". Equal sources give equal pages.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = "<!-- Written by tools/write_docs.py; change the source, then run `make docs`. -->\n\n"
SECTIONS = ("Options", "Shapes", "Raises", "Paper", "Departs from the paper")
WIDTH = 100


# ---------------------------------------------------------------- methods


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


def one_line(text: str) -> str:
    """`text` on one line."""
    return " ".join(text.split())


def paper_link(paper: str) -> str:
    """A link to an arXiv paper or a DOI; others as they are."""
    kind, _, number = paper.partition(":")
    where = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(kind)
    return f"[{paper}]({where}{number})" if where else paper


def yaml_word(value: Any) -> str:
    """A scalar as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def recipe_line(name: str, options: dict[str, tuple[str, Any, str]]) -> str:
    """The recipe's line that chooses the method, every option at its default."""
    return f"adapt: {{{', '.join([f'method: {name}', *(f'{k}: {yaml_word(v[1])}' for k, v in options.items())])}}}"


def method_page(kind: str, card: Any) -> str:
    """docs/methods/<name>.md."""
    from plures.core.folder import options_of
    from plures.flows.capabilities import folders

    cls = folders()[kind][card.name]
    options, doc = options_of(cls), sections(cls.__doc__ or "")
    lines = [
        f"# {card.name}", "", MARK.strip(), "", f"{card.summary}", "",
        "| | |", "|---|---|", f"| capability | `{kind}` |", f"| status | {card.status} |",
        f"| paper | {card.title}, {paper_link(card.paper)} |", f"| when | {card.when} |",
        f"| source | [`{card.module.replace('.', '/')}.py`](../../src/{card.module.replace('.', '/')}.py) |", "",
        "## The idea", "", "```text", doc[""], "```", "", "## Options", "",
    ]  # fmt: skip
    if options:
        lines += ["| option | type | default | what it does |", "|---|---|---|---|"]
        lines += [f"| `{k}` | {cell(t)} | `{yaml_word(d)}` | {cell(h)} |" for k, (t, d, h) in options.items()]
    else:
        lines += ["None."]
    lines += ["", "In a recipe, every default written out:", "", "```yaml", recipe_line(card.name, options), "```", ""]
    for name in SECTIONS[1:]:
        if name in doc:
            lines += [f"**{name}.** {one_line(doc[name])}", ""]
    return "\n".join(lines).rstrip() + "\n"


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|")


def papers_page() -> str:
    """docs/papers.md: paper, method, the recipe's line."""
    from plures.core.folder import options_of
    from plures.flows.capabilities import folders

    lines = ["# From the paper to the recipe", "", MARK.strip(), "",
             "Each paper that a method here implements, and the line of a recipe that asks for it.", "",
             "| paper | title | method | recipe |", "|---|---|---|---|"]  # fmt: skip
    for kind, c in sorted(cards(), key=lambda pair: (pair[1].paper == "none", pair[1].paper)):
        line = recipe_line(c.name, options_of(folders()[kind][c.name]))
        lines.append(f"| {paper_link(c.paper)} | {cell(c.title)} | [{c.name}](methods/{c.name}.md) | `{line}` |")
    lines += ["", "Where a method departs from its paper is said on its page. The recipes of the MoS paper's ablation "
              "are in [mos.md](mos.md#the-papers-ablation-as-recipes)."]  # fmt: skip
    return "\n".join(lines) + "\n"


def methods_table() -> str:
    """README's table of capabilities and methods."""
    lines = ["| capability | method | status | paper | what it does |", "|---|---|---|---|---|"]
    for kind, c in cards():
        link = f"[{c.name}](docs/methods/{c.name}.md)"
        lines.append(f"| `{kind}` | {link} | {c.status} | {paper_link(c.paper)} | {cell(c.summary)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- command line and recipe


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
    lines = ["# The command line", "", MARK.strip(), "",
             "The help of every verb, as `plures VERB --help` prints it. What a command ends with is in "
             "[exit-codes.md](exit-codes.md), which variables it reads in [environment.md](environment.md).", "",
             " · ".join(f"[{name}](#plures-{name})" for name, _ in helps)]  # fmt: skip
    for name, text in helps:
        lines += ["", f"## plures {name}", "", "```text", "\n".join(line.rstrip() for line in text.splitlines()), "```"]
    return "\n".join(lines) + "\n"


def recipe_page() -> str:
    """docs/recipe-train.md: the template with every key."""
    from plures.core.recipe import template
    from plures.flows.recipes import TrainRecipe

    return (
        f"# The recipe of `plures train`\n\n{MARK}What `plures recipe train` prints: every key with its meaning, type, "
        "limits and default. A key that is left out keeps its default; an unknown key is an error. How the keys work "
        f"together is in [train.md](train.md).\n\n```yaml\n{template(TrainRecipe)}```\n"
    )


# ---------------------------------------------------------------- measured


def result(name: str) -> dict[str, Any] | None:
    """A raw result, or None where it was not measured yet."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found


def machine(said: dict[str, Any]) -> str:
    """The machine of a result in one line."""
    m, versions = said.get("machine", {}), said.get("machine", {}).get("packages") or said.get("versions", {})
    packages = ", ".join(f"{k} {v}" for k, v in versions.items() if k in ("torch", "transformers", "peft"))
    python = m.get("python") or said.get("versions", {}).get("python", "?")
    return f"{m.get('processor', '?')}, {m.get('cores', '?')} cores, Python {python}, {packages}"


def train_step(said: dict[str, Any], brief: bool) -> list[str]:
    """Cost of a step against PEFT's LoRA of the same rank."""
    out = [f"One step of {said['rows']} x {said['tokens']} tokens on one CPU thread, every linear map adapted at rank "
           f"{said['rank']} (plures-mos-p1: 12); the ratio is the median over interleaved steps, the memory a fresh process's "
           "peak.", "",
           "| base | method | trained | CPU s, median | ratio to PEFT's LoRA | peak MB |",
           "|---|---|---:|---:|---:|---:|"]  # fmt: skip
    for shape, rows in said["shapes"].items():
        for name, r in rows.items():
            took = f"{r['median_cpu_s']:.3f} | {r['median_of_ratios']:.3f} | {r['peak_mb']:.0f}"
            out.append(f"| {shape} | {name} | {r['trained']:,} | {took} |")
    return out


def equal_budget(said: dict[str, Any], brief: bool) -> list[str]:
    """Quality against trained numbers; in brief without the ablation."""
    base = said["base_bits_per_byte"].values()
    out = [f"Held-out bits per byte of the demo's base, less is better: mean over {len(said['tenants'])} tenants and "
           f"{said['seeds']} seeds, {said['steps']} steps, one search of the learning rate for each contender; without an "
           f"adapter {sum(base) / len(base):.4f}. Gain and wins are over the LoRA with as many trained numbers, in pairs of "
           "tenant and seed.", "",
           "| contender | trained | bits/byte | sd over seeds | gain | wins |", "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for name, r in said["contenders"].items():
        if brief and not name.startswith(("lora", "mos-e", "full")):
            continue
        gain = r.get("gain_over_lora_at_equal_parameters")
        against = f"{'' if gain is None else f'{gain:+.4f}'} | {r.get('wins_over_lora_at_equal_parameters') or ''}"
        out.append(f"| {name} | {r['trained']:,} | {r['bits_per_byte']:.4f} | {r['sd_over_seeds']:.4f} | {against} |")
    return out


def peft_suite(said: dict[str, Any], brief: bool) -> list[str]:
    """PEFT's own tests over our plug-in."""
    known = {m: sum(bool(f.get("expected")) for f in said["failures"] if f["method"] == m) for m in said["counts"]}
    out = ["PEFT's own tests, run over each method as PEFT type PLURES (other names: PEFT's own, as a control). A known "
           "failure has its reason in tools/peft_suite.py.", "",
           "| method | passed | failed | of these known | skipped |", "|---|---:|---:|---:|---:|"]  # fmt: skip
    for name, files in said["counts"].items():
        n = {k: sum(f.get(k, 0) for f in files.values()) for k in ("passed", "failed", "skipped")}
        out.append(f"| {name} | {n['passed']} | {n['failed']} | {known[name]} | {n['skipped']} |")
    return out


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a result, by its dotted path, the machine left out."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        path = f"{at}.{key}".removeprefix(".")
        if isinstance(inner, dict | list):
            yield from leaves(inner, path) if key != "machine" else ()
        elif isinstance(inner, int | float) and not isinstance(inner, bool):
            yield path, inner


def store_bytes(said: dict[str, Any], brief: bool) -> list[str]:
    """Bytes of a fleet on disk."""
    rows = [f"| {k} | {v:,} |" if isinstance(v, int) else f"| {k} | {v:.4g} |" for k, v in leaves(said)]
    return ["| measured | value |", "|---|---:|", *(rows[:10] if brief else rows)]


BENCHMARKS = (
    ("equal_budget", "Quality at equal trained numbers", "benchmarks/equal_budget.py", equal_budget),
    ("train_step", "Cost of a training step", "benchmarks/train_step.py", train_step),
    ("store_bytes", "Bytes of a fleet on disk", "benchmarks/store_bytes.py", store_bytes),
    ("peft_suite", "PEFT's tests", "tools/peft_suite.py", peft_suite),
)


def measured(brief: bool) -> str:
    """A table for each result that is there; in brief for the README."""
    out: list[str] = []
    for name, title, script, render in BENCHMARKS:
        said = result(name)
        out += [f"**{title}** (`{script}`)", ""]
        if said is None:
            out += ["not measured yet", ""]
            continue
        out += [
            *render(said, brief),
            "",
            *([] if brief else [f"{machine(said)}. Raw: `benchmarks/results/{name}.json`.", ""]),
        ]
    return "\n".join(out).rstrip()


def measured_page() -> str:
    """docs/measured.md: every result in full."""
    return (
        f"# What was measured\n\n{MARK}Every number is from the raw result beside it, on the machine it names. Run them "
        f"again with `make bench` and `python tools/peft_suite.py`.\n\n{measured(brief=False)}\n"
    )


# ---------------------------------------------------------------- pages


def between(text: str, name: str, body: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    assert text.count(begin) == 1 and text.count(end) == 1, f"README.md needs {begin} and {end} once each"
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """Every generated page by its path from the root."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = between(between(readme, "methods", methods_table()), "measured", measured(brief=True))
    out = {Path("docs/methods") / f"{c.name}.md": method_page(kind, c) for kind, c in cards()}
    return out | {
        Path("docs/papers.md"): papers_page(),
        Path("docs/cli.md"): cli_page(),
        Path("docs/recipe-train.md"): recipe_page(),
        Path("docs/measured.md"): measured_page(),
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
