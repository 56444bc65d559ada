"""What a comparison came to: means, spread, Pareto front and ranking, as JSON, CSV and one page readable offline."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from plures.core.events import finite
from plures.tensors import safe

Rows = Sequence[Mapping[str, Any]]


def borda(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean rank of each system over tasks (1 is best; less is better in `scores`), equals share their ranks.

    Ordering systems by the sum of their ranks is Borda's count, which "What are the Best Systems? New Perspectives on
    NLP Benchmarking" (arXiv:2202.03799) takes as the consensus of the tasks' rankings: unlike the mean it does not
    let a task with a wide scale decide.
    """
    tasks = {len(of) for of in scores.values()}
    assert len(tasks) == 1, "every system needs a score on every task"
    ranks: dict[str, list[float]] = {n: [] for n in scores}
    for at in range(tasks.pop()):
        column = {n: of[at] for n, of in scores.items()}
        for n, mine in column.items():
            below = sum(v < mine for v in column.values())
            equal = sum(v == mine for v in column.values())
            ranks[n].append(below + (equal + 1) / 2)
    return {n: mean(r) for n, r in ranks.items()}


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of which no other is at most as large and at most as bad, and better in one; by size."""

    def beaten(name: str) -> bool:
        x, y = points[name]
        return any(a <= x and b <= y and (a, b) != (x, y) for n, (a, b) in points.items() if n != name)

    return sorted((n for n in points if not beaten(n)), key=lambda n: points[n])


def summarise(rows: Rows, rates: Mapping[str, float]) -> dict[str, Any]:
    """By contender: trained numbers, mean and spread over seeds, by tenant, ranks, cost of a step; and the front."""
    names = list(dict.fromkeys(str(r["contender"]) for r in rows))
    tenants, seeds = sorted({r["tenant"] for r in rows}), sorted({r["seed"] for r in rows})
    bits = {(r["contender"], r["tenant"], r["seed"]): r["bits_per_byte"] for r in rows}
    ranks = borda({n: [bits[n, t, s] for t in tenants for s in seeds] for n in names})
    told: dict[str, Any] = {}
    for n in names:
        mine = [r for r in rows if r["contender"] == n]
        by_seed = [mean(bits[n, t, s] for t in tenants) for s in seeds]
        told[n] = {
            "method": mine[0]["method"], "peft": mine[0]["peft"], "options": mine[0]["options"], "lr": rates[n],
            "trained": mine[0]["trained"], "bits_per_byte": mean(by_seed),
            "sd_over_seeds": _spread(by_seed), "rank": ranks[n],
            "by_tenant": {t: mean(bits[n, t, s] for s in seeds) for t in tenants},
            "step_cpu_s": mean(r["step_cpu_s"] for r in mine), "more_mb": max(r["more_mb"] for r in mine),
        }  # fmt: skip
    front = pareto({n: (t["trained"], t["bits_per_byte"]) for n, t in told.items()})
    base = {t: next(r["zero"] for r in rows if r["tenant"] == t) for t in tenants}
    return {"tenants": tenants, "seeds": len(seeds), "base_bits_per_byte": base, "contenders": told, "front": front}


def ablations(told: Mapping[str, Any], rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """By contender, what each cut of it comes to: the mean difference in bits per byte to the whole, and its error.

    Differences are taken tenant by tenant and seed by seed, so that what these share falls out; `error` is the standard
    error of their mean. Above zero the part that was left out helps.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    bits = {(r["contender"], r["tenant"], r["seed"]): r["bits_per_byte"] for r in rows}
    for part in told["recipe"]["contenders"]:
        whole, name = part["ablates"], part["name"] or part["method"]
        if whole:
            pairs = [(n, t, s) for n, t, s in bits if n == name]
            worse = [bits[n, t, s] - bits[whole, t, s] for n, t, s in pairs]
            error = _spread(worse) / len(worse) ** 0.5
            found.setdefault(whole, []).append({"name": name, "worse": mean(worse), "error": error})
    return found


def _spread(values: Sequence[float]) -> float:
    """Their standard deviation; nan where a run diverged."""
    if not all(map(isfinite, values)):
        return float("nan")
    return stdev(values) if len(values) > 1 else 0.0


def write_report(out: Path, told: Mapping[str, Any], rows: Rows) -> None:
    """Write `summary.json`, `cells.csv` and `report.html` into `out`."""
    safe.write_bytes(out / "summary.json", (json.dumps(finite(told), indent=1, allow_nan=False) + "\n").encode())
    text = io.StringIO()
    fields = ("contender", "method", "peft", "tenant", "seed", "lr", "trained", "bits_per_byte", "zero", "step_cpu_s",
              "more_mb", "cpu_s", "version")  # fmt: skip
    writer = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    safe.write_bytes(out / "cells.csv", text.getvalue().encode())
    safe.write_bytes(out / "report.html", _page(told).encode())


def _page(told: Mapping[str, Any]) -> str:
    from jinja2 import Environment
    from markupsafe import Markup

    page = Environment(autoescape=True).from_string(_TEMPLATE)
    order = sorted(told["contenders"], key=lambda n: told["contenders"][n]["bits_per_byte"])
    base = mean(told["base_bits_per_byte"].values())
    return page.render(told=told, order=order, figure=Markup(figure(told)), base=base)


def figure(told: Mapping[str, Any]) -> str:
    """Bits per byte of test rows against trained numbers, the spread over seeds and the Pareto front, as inline SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8.5, 5), layout="constrained")
    FigureCanvasSVG(drawn)
    axes = drawn.add_subplot()
    methods: dict[str, list[str]] = {}
    cuts = {cut["name"] for of in told.get("ablations", {}).values() for cut in of}
    for n, one in told["contenders"].items():
        if n not in cuts:
            methods.setdefault(("peft " if one["peft"] else "") + one["method"], []).append(n)
    for at, (method, names) in enumerate(methods.items()):
        ones = sorted((told["contenders"][n] for n in names), key=lambda one: one["trained"])
        axes.errorbar(
            [one["trained"] for one in ones], [one["bits_per_byte"] for one in ones],
            yerr=[one["sd_over_seeds"] for one in ones], label=method, marker="os^vD<>P*X"[at % 10], capsize=2,
            linewidth=1, markersize=5,
        )  # fmt: skip
    front = [told["contenders"][n] for n in told["front"]]
    axes.step([f["trained"] for f in front], [f["bits_per_byte"] for f in front], where="post", color="#999",
              linestyle=":", label="Pareto front")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("trained numbers")
    axes.set_ylabel("bits per byte on test rows")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, ncols=2)
    text = io.StringIO()
    drawn.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


_TEMPLATE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Plures: bench</title>
<meta name="viewport" content="width=device-width">
<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}.front{font-weight:700}small{color:#666}
</style>
<h1>Methods at equal care</h1>
<p>{{ order|length }} contenders on {{ told.tenants|length }} tenants with {{ told.seeds }} seeds,
{{ told.recipe.steps }} steps each. Learning rates were searched alike for all on the validation rows of
{{ told.search_tenant }}, which is not scored. Bits per byte of test rows; less is better. The base has
{{ "%.4f"|format(base) }}. In bold: the Pareto front, of which none is smaller and better.</p>
{{ figure }}
<table><tr><th>contender</th><th>trained</th><th>bits/byte</th><th>sd over seeds</th><th>mean rank</th><th>rate</th>
{%- for t in told.tenants %}<th>{{ t }}</th>{% endfor %}<th>CPU s a step</th><th>MB in training</th></tr>
{% for n in order %}{% set c = told.contenders[n] %}<tr{% if n in told.front %} class="front"{% endif %}>
<td>{{ n }}{{ " (PEFT)" if c.peft }}</td><td>{{ "{:,}".format(c.trained) }}</td>
<td>{{ "%.4f"|format(c.bits_per_byte) }}</td>
<td>{{ "%.4f"|format(c.sd_over_seeds) }}</td><td>{{ "%.2f"|format(c.rank) }}</td><td>{{ "%.1e"|format(c.lr) }}</td>
{%- for t in told.tenants %}<td>{{ "%.4f"|format(c.by_tenant[t]) }}</td>{% endfor %}
<td>{{ "%.3f"|format(c.step_cpu_s) }}</td><td>{{ "%.0f"|format(c.more_mb) }}</td></tr>
{% endfor %}</table>
{% for whole, cuts in told.ablations.items() %}
<h2>What the parts of {{ whole }} are worth</h2>
<table><tr><th>without</th><th>bits/byte more than {{ whole }}</th><th>standard error</th></tr>
{% for cut in cuts %}<tr><td>{{ cut.name }}</td><td>{{ "%+.4f"|format(cut.worse) }}</td>
<td>{{ "%.4f"|format(cut.error) }}</td></tr>
{% endfor %}</table>
{% endfor %}
{% if told.notes %}<h2>Notes</h2><dl>
{% for name, note in told.notes.items() %}<dt>{{ name }}</dt><dd>{{ note }}</dd>
{% endfor %}</dl>{% endif %}
<p><small>Mean rank: Borda's count over tenants and seeds (arXiv:2202.03799), beside the mean, which one tenant with a
wide scale can decide. Raw numbers: <a href="cells.csv">cells.csv</a>,
<a href="summary.json">summary.json</a>.</small></p>
</html>
"""
