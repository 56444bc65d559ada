"""The demo's page: one HTML file, readable offline: the measured tables and pictures, each with the command behind it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from plures.demo.pool import KINDS
from plures.demo.runs import verdict

Curves = dict[tuple[str, str], list[tuple[int, float]]]

COLOURS = {"lora-r1": "#8d99ae", "mos-e1": "#d1495b", "lora-r8": "#30638e"}
GREYS = ("#30638e", "#d1495b", "#8d99ae", "#edae49", "#66a182")

TEMPLATE = """{% macro made(step) %}<details><summary>the command{{ "s" if told.commands[step]|length > 1 }}
{%- if step in told.took %}, {{ told.took[step] }} s{% endif %}</summary><pre>{{ told.commands[step]|join("\n") }}</pre></details>
{% endmacro %}<!doctype html><html lang="en"><meta charset="utf-8"><title>Plures: the demo</title>
<meta name="viewport" content="width=device-width">
<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}pre{background:#f6f6f6;padding:.8rem;white-space:pre-wrap;overflow-wrap:anywhere}
svg{max-width:100%;height:auto}.best{font-weight:700}small,summary{color:#666}details pre{font-size:.8rem}
</style>
<h1>Out of one base, many</h1>
<p>{{ told.usage.n_versions }} variants of one small base, chosen for, trained, merged, packed and served on this machine in
{{ told.seconds }} s. Bits per byte are of held-out text; less is better. All numbers are this run's. Under each table stands
what made it: commands that may be given again, in the folder where the demo was started.</p>
<h2>Choosing rows</h2>
<p>A pool of {{ "{:,}"|form(pool_rows) }} rows: prose of Python's help, near-copies of it, noise, and other text for a half. A
tenth of it by likeness to {{ target_rows }} rows of the target (<code>tsds</code>), and at random
(<a href="choice.html">the page of the choice</a>):</p>
<table><tr><th></th>{% for k in kinds %}<th>{{ k }}</th>{% endfor %}</tr>
{% for name, of in told.kinds.items() %}<tr><td>{{ name }}</td>{% for k in kinds %}<td>{{ of[k] }}</td>{% endfor %}</tr>
{% endfor %}</table>
{{ made("select") }}
<h2>Training</h2>
<p>Three methods, {{ told.steps }} steps each on one tenant's text{% if told.seeds > 1 %}, {{ told.seeds }} seeds{% endif %}:</p>
<table><tr><th></th><th>base</th>{% for n in names %}<th>{{ n }}</th>{% endfor %}</tr>
<tr><td>trained numbers</td><td>0</td>{% for n in names %}<td>{{ "{:,}"|form(told.summary.trained[n]) }}</td>{% endfor %}</tr>
{% for t in told.tenants %}<tr><td>{{ t }}</td><td>{{ "%.4f"|format(told.base_bits_per_byte[t]) }}</td>
{%- for n in names %}<td>{{ "%.4f"|format(cells[t][n]) }}</td>{% endfor %}</tr>
{% endfor %}<tr class="best"><td>mean</td><td>{{ "%.4f"|format(told.summary.mean_bits_per_byte.base) }}</td>
{%- for n in names %}<td>{{ "%.4f"|format(told.summary.mean_bits_per_byte[n]) }}</td>{% endfor %}</tr></table>
<p>{{ verdict }} <small>The paper (arXiv:2410.00938) reports LoRA's quality at about
an eighth of the parameters on 3B to 13B models; that is its claim, not this page's.</small></p>
{{ loss }}
<p>Trained on a tenth of the spoilt pool, and scored on the same held-out text:</p>
<table><tr><th></th><th>bits per byte</th></tr><tr><td>base</td><td>{{ "%.4f"|format(told.tenth_base) }}</td></tr>
{% for row in told.tenth %}<tr><td>{{ row.ref }}, on {{ row.rows }} rows</td><td>{{ "%.4f"|format(row.bits_per_byte) }}</td></tr>
{% endfor %}</table>
{{ made("train") }}
<h2>Merging</h2>
<p>Half of {{ told.merged.of[0] }} and half of {{ told.merged.of[1] }}, summed exactly, at rank {{ told.merged.rank }}:</p>
<table><tr><th></th>{% for t in told.merged.bits_per_byte %}<th>{{ t }}</th>{% endfor %}</tr>
{% for ref in merged_refs %}<tr><td>{{ ref }}</td>{% for of in told.merged.bits_per_byte.values() %}<td>{{ "%.4f"|format(of[ref]) }}</td>
{%- endfor %}</tr>{% endfor %}</table>
{{ made("merge") }}
<h2>Packing</h2>
<p>The {{ told.packed.lines|length }} latest versions share {{ "{:,}"|form(told.packed.shared_bytes) }} bytes and take these beside
them; what all share pays off with hundreds of variants, not with a dozen.</p>
{{ packed }}
<table><tr><th></th><th>base</th><th>before</th><th>packed</th><th>of the gain is left</th></tr>
{% for ref, b in told.packed.bits_per_byte.items() %}<tr><td>{{ ref }}</td><td>{{ "%.4f"|format(b.base) }}</td>
<td>{{ "%.4f"|format(b.before) }}</td><td>{{ "%.4f"|format(b.after) }}</td>
<td>{{ "%.1f"|format(100 * (b.base - b.after) / (b.base - b.before)) }} %</td></tr>{% endfor %}</table>
{{ made("pack") }}
<h2>Served</h2>
<p>All from one process. {{ told.served.answers|length }} variants asked at the same time by {{ told.served.client }}:
{{ told.served.tokens }} tokens in {{ told.served.steps }} steps of the engine, so they stood in one batch.</p>
{% for a in told.served.answers %}<p><b>{{ a.by }}</b></p><pre>{{ a.prompt }}<b>{{ a.text }}</b></pre>{% endfor %}
<p>A second version is released, and rolled back. The name asked is the same each time:</p>
<table><tr><th></th><th>answered by</th><th>begins</th></tr>
{% for t in told.served.turns %}<tr><td>{{ t.when }}</td><td>{{ t.by }}</td><td>{{ t.text[:40] }}</td></tr>{% endfor %}</table>
{{ made("serve") }}
<h2>The fleet</h2>
<p>{{ "{:,}"|form(told.usage.bytes) }} bytes of tensors in {{ told.usage.n_blobs }} files
({{ "{:,}"|form(told.usage.unshared_bytes) }} if nothing were shared), fsck {{ "clean" if not told.fsck else told.fsck }}. One
variant is exported as plain LoRA. Share of held-out lines that stood in the training text and were dropped:
{% for t, s in told.repeated_share.items() %}{{ t }} {{ "%.0f"|format(100 * s) }} %{{ ", " if not loop.last }}{% endfor %}.</p>
{{ made("init") }}{{ made("export") }}
</html>
"""


def _svg(figure: Figure) -> Markup:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def loss_figure(curves: Curves, tenants: Sequence[str], smooth: int = 9) -> Markup:
    """One panel a tenant: training loss by step, a running mean of `smooth` steps, as inline SVG."""
    figure = _figure(3.4 * len(tenants), 2.9)
    for i, tenant in enumerate(tenants):
        axes = figure.add_subplot(1, len(tenants), i + 1)
        for name, colour in COLOURS.items():
            points = curves.get((tenant, name), [])
            steps = [s for s, _ in points]
            means = [mean(v for _, v in points[max(0, k - smooth + 1) : k + 1]) for k in range(len(points))]
            axes.plot(steps, means, label=name, color=colour, linewidth=1.4)
        axes.set_title(tenant, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if i == 0:
            axes.set_ylabel("nats per token", fontsize=8)
            axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def packed_figure(packed: Mapping[str, Any]) -> Markup:
    """Bytes of a variant, on average: as it was trained, packed, and by the plain ways beside it, as inline SVG."""
    lines, n = packed["lines"], max(1, len(packed["lines"]))
    bars = {"as trained": sum(x["was_bytes"] for x in lines) / n, "packed": sum(x["n_bytes"] for x in lines) / n}
    bars |= {c["name"]: c["n_bytes"] for c in packed["compared"]}
    figure = _figure(6.4, 0.42 * len(bars) + 0.7)
    axes = figure.add_subplot()
    drawn = axes.barh(list(bars), list(bars.values()), color=[GREYS[i % len(GREYS)] for i in range(len(bars))])
    axes.bar_label(drawn, [f" {value:,.0f}" for value in bars.values()], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("bytes of a variant of its own, on average", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def write_page(path: Path, told: Mapping[str, Any], curves: Curves) -> Path:
    """Write the page of a demo and return its path."""
    names = [n for n in COLOURS if n in told["summary"]["trained"]]
    cells = {
        t: {
            n: mean(r["bits_per_byte"] for r in told["rows"] if r["tenant"] == t and r["contender"] == n) for n in names
        }
        for t in told["tenants"]
    }
    environment = Environment(autoescape=True)
    environment.filters["form"] = str.format
    html = environment.from_string(TEMPLATE).render(
        told=told, verdict=verdict(told["summary"]), names=names, cells=cells, kinds=KINDS, pool_rows=sum(told["kinds"]["pool"].values()),
        target_rows=told["target_rows"], merged_refs=list(next(iter(told["merged"]["bits_per_byte"].values()))),
        loss=loss_figure(curves, told["tenants"]), packed=packed_figure(told["packed"]),
    )  # fmt: skip
    path.write_text(html, encoding="utf-8")
    return path
