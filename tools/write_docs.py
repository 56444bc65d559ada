"""Write the generated pages of the documentation, or with `--check` say which are stale (exit 1).

They are docs/{methods/*,papers,cli,recipe-train,measured,gallery}.md, the gallery's pictures, and the tables of
README.md, made from the methods' cards and docstrings, the recipe's dataclasses, the verbs' help and the raw results in
benchmarks/results. A benchmark without a result says "not measured yet". Equal sources give equal pages.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # a test loads this file by its path

from docs_commands import cli_page, recipe_page, recipes_page
from docs_making import (
    merge_agree,
    merge_kill,
    merge_lowrank,
    merge_speed,
    pack_measure,
    select_flow,
    select_helps,
    select_many,
    select_rows,
)
from docs_methods import cards, method_page, methods_table, papers_page
from docs_methods import sections as sections  # for the tests
from docs_parts import MARK
from docs_serving import serve_capacity, serve_decode, serve_fair, serve_http, serve_vllm, store_bytes
from docs_training import bench, deeper_base, dpo_prefix, equal_budget, fleet_mos, peft_suite, train_step
from gallery import pages as drawn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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
    ("merge_agree", "Merging: the same numbers as mergekit", "benchmarks/merge_agree.py", merge_agree),
    ("merge_lowrank", "Sums and extraction of LoRAs", "benchmarks/merge_lowrank.py", merge_lowrank),
    ("merge_kill", "Merges that were killed", "benchmarks/merge_kill.py", merge_kill),
    ("pack_measure", "Packing fleets", "benchmarks/pack_measure.py", pack_measure),
    ("peft_suite", "PEFT's tests", "tools/peft_suite.py", peft_suite),
)


def machine(said: dict[str, Any]) -> str:
    """The machine of a result in one line."""
    m = said.get("machine", {})
    versions = {"python": m.get("python", "?")} | m.get("packages", {}) | said.get("versions", {})
    packages = ", ".join(f"{k} {v}" for k, v in versions.items() if k in ("python", "torch", "transformers", "peft"))
    return f"{m.get('processor', '?')}, {m.get('cores', '?')} cores, {packages}"


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
        Path("docs/recipes.md"): recipes_page(),
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
