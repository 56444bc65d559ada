"""What a choice is like beside random rows: coverage, Vendi scores, balance, scores; as numbers and as one page."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from plures.choice import vendi
from plures.choice.grade import grade
from plures.choice.pool import Budget, Pool
from plures.select import selects
from plures.tensors.rng import rng

Array = np.ndarray[Any, Any]
_MEASURED = 2000  # rows of the pool that coverage is measured on
_DRAWN = 4000  # rows of the pool on the map
_LIKE = 0.95  # the cosine from which two chosen rows count as near-duplicates


def beside(pool: Pool, budget: Budget, seed: int, epochs: int) -> dict[str, Array]:
    """What every choice is held against: as many random rows, and all that rs2 sees in so many epochs.

    Both meet the budget, without its quotas.
    """
    plain = Budget(budget.rows, budget.tokens, exclude=budget.exclude)
    random = selects.make("random").choose(pool, plain, rng(seed, "select", "random")).rows
    rs2 = selects.make("rs2", epochs=epochs).choose(pool, plain, rng(seed, "select", "rs2"))
    return {"random": random, "rs2": np.unique(np.concatenate([rs2.rows, *rs2.later]))}


def measure(pool: Pool, rows: Array, seed: int) -> dict[str, Any]:
    """Rows, tokens, coverage, near-duplicates, Vendi scores of four orders, means of scores and balance of groups.

    `coverage` is the mean over 2000 rows of the pool of the largest cosine with a chosen one, `alike` the share of
    chosen rows with a cosine of 0.95 or more to an earlier one (among at most 2000), `target` the mean largest cosine
    of those with a row of the target, `balance` the entropy of a column's values over the largest there could be
    (GRADE, arXiv:2410.22592).
    """
    told: dict[str, Any] = {"rows": len(rows), "tokens": None if pool.cost is None else int(pool.cost[rows].sum()),
                            "coverage": None, "alike": None, "target": None, "vendi": {}}  # fmt: skip
    if pool.features is not None:
        r = rng(seed, "select", "coverage")
        some = np.asarray(pool.features[np.sort(r.permutation(pool.n)[:_MEASURED])], np.float32)
        best = np.full(len(some), -1, np.float32)
        for at in range(0, len(rows), 8192):
            block = np.asarray(pool.features[np.sort(rows[at : at + 8192])], np.float32)
            np.maximum(best, (some @ block.T).max(1), out=best)
        few = np.asarray(pool.features[np.sort(r.permutation(rows)[:_MEASURED])], np.float32)
        told["coverage"] = float(best.mean())
        if pool.target is not None:
            told["target"] = float((few @ np.asarray(pool.target, np.float32).T).max(1).mean())
        told["alike"] = float((np.tril(few @ few.T, -1).max(1) >= _LIKE).mean()) if len(few) > 1 else 0.0
        told["vendi"] = {str(q): v for q, v in vendi.scores(pool.features, np.sort(rows)).items()}
    told["scores"] = {name: float(np.nanmean(of[rows], dtype=np.float64)) if np.isfinite(of[rows]).any() else None
                      for name, of in pool.scores.items()}  # fmt: skip
    told["balance"] = {name: grade(of, rows) for name, of in pool.groups.items()}
    return told


def page(told: Mapping[str, Any], pool: Pool, chosen: Array, others: Mapping[str, Array],
         examples: Sequence[Mapping[str, Any]], seed: int) -> str:  # fmt: skip
    """The report as one HTML page that reads offline."""
    from jinja2 import Environment
    from markupsafe import Markup

    of = Environment(autoescape=True).from_string(_TEMPLATE)
    drawn = Markup(_map(pool, chosen, others["random"], seed)) if pool.features is not None else ""
    shown = [{k: _short(v) for k, v in row.items()} for row in examples]
    return of.render(told=told, map=drawn, examples=shown, orders=list(told["measured"]["chosen"]["vendi"]))


def _short(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > 12:
        return f"{len(value)} numbers"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 400 else text[:400] + " …"


def _map(pool: Pool, chosen: Array, random: Array, seed: int) -> str:
    """The pool and the choice on the two directions in which the pool is widest, and the same for random rows."""
    from matplotlib.figure import Figure

    assert pool.features is not None
    r = rng(seed, "select", "map")
    some = np.sort(r.permutation(pool.n)[:_DRAWN])
    x = np.asarray(pool.features[some], np.float64)
    mean = x.mean(0)
    _, _, axes = np.linalg.svd(x[: _MEASURED] - mean, full_matrices=False)
    axes = np.vstack([axes[:2], np.zeros((max(0, 2 - len(axes)), x.shape[1]))])

    def on(rows: Array) -> Array:
        picked = np.sort(r.permutation(rows)[:_DRAWN])
        return (np.asarray(pool.features[picked], np.float64) - mean) @ axes.T  # type: ignore[index]

    whole = (x - mean) @ axes.T
    figure = Figure(figsize=(9.6, 4.4))
    for ax, rows, name in zip(figure.subplots(1, 2, sharex=True, sharey=True), (chosen, random), ("chosen", "random"),
                              strict=True):  # fmt: skip
        ax.scatter(*whole.T, s=2, c="#c3c8cf", linewidths=0, rasterized=True)
        ax.scatter(*on(rows).T, s=6, c="#c2410c" if name == "chosen" else "#1d4ed8", linewidths=0, rasterized=True)
        ax.set_title(f"{name} ({len(rows):,})", fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.tight_layout()
    out = io.StringIO()
    figure.savefig(out, format="svg", dpi=110, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg"):]


_TEMPLATE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Selection {{ told.out }}</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1a1f26}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
svg{max-width:100%;height:auto}details{margin:.4rem 0}pre{white-space:pre-wrap;background:#f5f6f8;padding:.5rem}
small{color:#555}</style></head><body>
<h1>{{ '{:,}'.format(told.result.rows) }} of {{ '{:,}'.format(told.result.of) }} rows by {{ told.method }}</h1>
<p>{% if told.result.certificate %}At least {{ '%.1f'|format(100 * told.result.certificate) }} % of the best value that
any choice of as many rows could have (value {{ '%.4g'|format(told.result.value) }}, bound
{{ '%.4g'|format(told.result.bound) }}).{% else %}There is no bound on what the best choice could be.{% endif %}
Options: <code>{{ told.options|tojson }}</code>. Rows are in <code>{{ told.out }}</code>.</p>
{% if map %}<h2>Map</h2><p><small>Grey: the pool (a sample), on the two directions in which it is widest.</small></p>
{{ map }}{% endif %}
<h2>Beside random rows</h2>
{% macro row(what, key, form, of='') %}<tr><td>{{ what }}</td>{% for m in told.measured.values() %}
{% set v = m[of][key] if of else m[key] %}<td>{{ form.format(v) if v is not none else '-' }}</td>{% endfor %}</tr>
{% endmacro %}
<table><tr><th></th>{% for name in told.measured %}<th>{{ name }}</th>{% endfor %}</tr>
{{ row('rows', 'rows', '{:,}') }}{{ row('tokens', 'tokens', '{:,}') }}
{{ row('coverage: mean largest cosine of a row of the pool with a chosen one', 'coverage', '{:.4f}') }}
{{ row('share of chosen rows that are near-duplicates of another', 'alike', '{:.4f}') }}
{% if told.measured.chosen.target is not none %}
{{ row('mean largest cosine of a chosen row with one of the target', 'target', '{:.4f}') }}{% endif %}
{% for q in orders %}{{ row('Vendi score, q = ' ~ q, q, '{:.2f}', 'vendi') }}{% endfor %}
{% for s in told.measured.chosen.scores %}{{ row('mean of ' ~ s, s, '{:.4f}', 'scores') }}{% endfor %}
{% for g in told.measured.chosen.balance %}
{{ row('balance of ' ~ g ~ ' (1: all values alike)', g, '{:.3f}', 'balance') }}{% endfor %}</table>
<p><small>rs2 draws anew in each of {{ told.recipe.epochs }} epochs and shows training all that stands in its column;
the others show the same rows again.</small></p>
{% for g, counts in told.result.groups.items() %}<h2>{{ g }}</h2>
<table><tr><th></th><th>pool</th><th>chosen</th></tr>
{% for name, c in counts.items() %}{% if loop.index <= 40 %}<tr><td>{{ name }}</td>
<td>{{ '{:,}'.format(told.pool_groups[g][name]) }}</td><td>{{ '{:,}'.format(c) }}</td></tr>
{% endif %}{% endfor %}</table>
{% if counts|length > 40 %}<p><small>and {{ counts|length - 40 }} more</small></p>{% endif %}{% endfor %}
<h2>Files</h2><table><tr><th></th><th>chosen</th></tr>{% for f, c in told.of_files.items() %}
<tr><td>{{ f }}</td><td>{{ '{:,}'.format(c) }}</td></tr>{% endfor %}</table>
<h2>Examples</h2>{% for row in examples %}<details{% if loop.index <= 3 %} open{% endif %}>
<summary>row {{ loop.index }} of the choice</summary>
{% for k, v in row.items() %}<div><b>{{ k }}</b><pre>{{ v }}</pre></div>{% endfor %}</details>{% endfor %}
<h2>What it took</h2><table>{% for k, s in told.result.seconds.items() %}<tr><td>{{ k }}</td>
<td>{{ '%.2f'|format(s) }} s</td></tr>{% endfor %}<tr><td>peak memory</td>
<td>{{ '{:,.0f}'.format(told.result.peak_mb) }} MB</td></tr></table>
</body></html>
"""
