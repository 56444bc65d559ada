"""The status page: variants, residency, throughput and queues, with nothing from elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from plures.engine.ask import Serving
from plures.flows.desk import Desk
from plures.store.access import Tenant

HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Plures</title><link rel="stylesheet" href="/status.css"></head>
<body><h1>Plures</h1>
<form id="ask" hidden><label>Key <input id="key" type="password" autocomplete="off"></label>
<button>Show</button></form>
<p id="note" role="status">…</p>
<main id="main" hidden>
<dl id="numbers"></dl>
<h2>Variants</h2><table><thead><tr><th>Model</th><th>Version</th><th>Method</th><th>Where</th><th>Running</th></tr></thead>
<tbody id="variants"></tbody></table>
<h2>Queues</h2><table><thead><tr><th>Tenant</th><th>Waiting</th></tr></thead><tbody id="queues"></tbody></table>
</main><script src="/status.js"></script></body></html>
"""

STYLE = """:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #8884; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .6rem; }
dt { opacity: .7; } dd { margin: 0; font-size: 1.4rem; }
"""

SCRIPT = """"use strict";
let key = "";
const by = (id) => document.getElementById(id);
const rows = (body, lines) => {
  body.replaceChildren(...lines.map((line) => {
    const tr = document.createElement("tr");
    for (const text of line) { const td = document.createElement("td"); td.textContent = text; tr.append(td); }
    return tr;
  }));
};
async function show() {
  const headers = key ? { authorization: "Bearer " + key } : {};
  let answer;
  try { answer = await fetch("/status.json", { headers }); } catch { by("note").textContent = "no answer"; return; }
  if (answer.status === 401) {
    by("ask").hidden = false; by("main").hidden = true;
    by("note").textContent = key ? "that key is not known" : "a key is needed";
    return;
  }
  const said = await answer.json();
  if (!answer.ok) { by("note").textContent = said.error ? said.error.message : "error"; return; }
  by("ask").hidden = true; by("main").hidden = false; by("note").textContent = said.alive ? "answering" : said.failure;
  by("numbers").replaceChildren(...said.numbers.flatMap(([name, value]) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd"), div = document.createElement("div");
    dt.textContent = name; dd.textContent = value; div.append(dt, dd); return [div];
  }));
  rows(by("variants"), said.variants);
  rows(by("queues"), said.queues);
}
by("ask").addEventListener("submit", (e) => {
  e.preventDefault(); key = by("key").value; by("key").value = ""; show();
});
show();
setInterval(() => { if (!document.hidden && !by("main").hidden) show(); }, 2000);
"""

_MOST = 500


def status(desk: Desk, serving: Serving, tenant: Tenant, everything: bool) -> dict[str, Any]:
    """What the page shows: all of it, or what one tenant may know."""
    state = serving.state()
    tiers = state.variants
    resident, pinned = set(tiers.resident), set(tiers.pinned)

    def where(identity: str) -> str:
        if not identity:
            return "base"
        if identity in tiers.failed:
            return f"unavailable: {tiers.failed[identity]}"
        return "pinned" if identity in pinned else "resident" if identity in resident else "store"

    shown = desk.visible(tenant)
    lines = [[m["id"], m["version"], m["method"] or "-", where(m["identity"]),
              str(state.running.get(m["identity"] or "base", 0))] for m in shown[:_MOST]]  # fmt: skip
    queues = sorted(state.queues.items(), key=lambda q: -q[1])
    if not everything:
        queues = [q for q in queues if q[0] == tenant.name]
    kv = 100 * state.kv_used / max(1, state.kv_blocks)
    hits, best = (f"{100 * share:.0f} %" for share in (tiers.hit_rate, tiers.best_hit_rate))
    numbers = [
        ["requests running", f"{state.rows} of {state.max_rows}"], ["tokens per second", f"{state.tokens_s:.0f}"],
        ["memory for tokens", f"{kv:.0f} %"],
    ]  # fmt: skip
    if everything:
        numbers += [
            ["requests waiting", str(state.waiting)], ["variants resident", str(len(resident))],
            ["resident when asked", hits], ["best possible", best], ["preempted", str(state.preempted)],
        ]  # fmt: skip
    return {"alive": state.alive, "failure": state.failure if everything else "not answering",
            "numbers": numbers, "variants": lines, "queues": [[t, str(n)] for t, n in queues[:_MOST]],
            "replicas": [asdict(one) for one in state.replicas or ()] if everything else []}  # fmt: skip
