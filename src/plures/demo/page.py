"""The demo's page: one HTML file, readable offline, with the measured table and the loss curves."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Curves = dict[tuple[str, str], list[tuple[int, float]]]

COLOURS = {"lora-r1": "#8d99ae", "mos-e1": "#d1495b", "lora-r8": "#30638e"}

TEMPLATE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Plures: the demo</title>
<meta name="viewport" content="width=device-width">
<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}pre{background:#f6f6f6;padding:.8rem;white-space:pre-wrap}
svg{max-width:100%;height:auto}.best{font-weight:700}small{color:#666}
</style>
<h1>Out of one base, many</h1>
<p>{{ told.rows|length }} variants of one small base, each trained for {{ told.steps }} steps on one tenant's text
{%- if told.seeds > 1 %}, with {{ told.seeds }} seeds{% endif %}, scored on text that it did not read. Bits per byte of
held-out text; less is better. These are the numbers of this run, on this machine.</p>
<table><tr><th></th><th>base</th>{% for n in names %}<th>{{ n }}</th>{% endfor %}</tr>
<tr><td>trained numbers</td><td>0</td>{% for n in names %}<td>{{ "{:,}".format(told.summary.trained[n]) }}</td>{% endfor %}</tr>
{% for t in told.tenants %}<tr><td>{{ t }}</td><td>{{ "%.4f"|format(told.base_bits_per_byte[t]) }}</td>
{%- for n in names %}<td>{{ "%.4f"|format(cells[t][n]) }}</td>{% endfor %}</tr>
{% endfor %}<tr class="best"><td>mean</td><td>{{ "%.4f"|format(told.summary.mean_bits_per_byte.base) }}</td>
{%- for n in names %}<td>{{ "%.4f"|format(told.summary.mean_bits_per_byte[n]) }}</td>{% endfor %}</tr></table>
{% set equal = told.summary.mos_gain_at_equal_parameters %}{% set wide = told.summary.mos_behind_lora_of_8x %}
<p>MoS against LoRA at equal parameters: {{ "%.4f"|format(equal|abs) }} bits per byte {{ "better" if equal > 0 else "worse" }}
on the mean, better on {{ told.summary.mos_wins_at_equal_parameters }} pairs. Against LoRA with eight times the parameters:
{{ "%.4f"|format(wide|abs) }} {{ "worse" if wide > 0 else "better" }}. <small>The paper (arXiv:2410.00938) reports LoRA's quality at about
an eighth of the parameters on 3B to 13B models; that is its claim, not this page's.</small></p>
<h2>Training loss</h2>
{{ figure }}
<h2>Asked, all in one batch</h2>
{% for a in told.answers %}<p><b>{{ a.ref }}</b></p><pre>{{ a.prompt }}<b>{{ a.text }}</b></pre>{% endfor %}
<p><small>{{ told.seconds }} s in all; the fleet is {{ "{:,}".format(told.usage.bytes) }} bytes of tensors in {{ told.usage.n_blobs }} files
({{ "{:,}".format(told.usage.unshared_bytes) }} if nothing were shared), fsck {{ "clean" if not told.fsck else told.fsck }}. Share of held-out
lines that stood in the training text and were dropped:
{% for t, s in told.repeated_share.items() %}{{ t }} {{ "%.0f"|format(100 * s) }} %{{ ", " if not loop.last }}{% endfor %}.</small></p>
</html>
"""


def loss_figure(curves: Curves, tenants: list[str], smooth: int = 9) -> str:
    """One panel a tenant: training loss by step, a running mean of `smooth` steps, as inline SVG."""
    figure = Figure(figsize=(3.4 * len(tenants), 2.9), layout="constrained")
    FigureCanvasSVG(figure)
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
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def write_page(path: Path, told: dict[str, Any], curves: Curves) -> Path:
    """Write the page of a demo and return its path."""
    names = [n for n in COLOURS if n in told["summary"]["trained"]]
    cells = {
        t: {
            n: mean(r["bits_per_byte"] for r in told["rows"] if r["tenant"] == t and r["contender"] == n) for n in names
        }
        for t in told["tenants"]
    }
    environment = Environment(autoescape=True)
    html = environment.from_string(TEMPLATE).render(
        told=told, names=names, cells=cells, figure=Markup(loss_figure(curves, told["tenants"]))
    )
    path.write_text(html, encoding="utf-8")
    return path
