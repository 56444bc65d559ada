"""docs/gallery.md and its pictures, from what benchmarks/merge_tenants.py measured.

The pictures are SVG as plain text, so that equal numbers give equal bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

Said = Mapping[str, Any]
KEPT, LINES = Path("docs/pictures/merge_kept.svg"), Path("docs/pictures/merge_lines.svg")
PAGE = Path("docs/gallery.md")
BLUE, GREY, FAINT, INK, SECOND = "#1f5fa8", "#8a8a8a", "#dddddd", "#222222", "#c2571a"
LOW, HIGH = -0.6, 1.05  # of the shares that the first picture shows; what is further out stands at its edge


def text(x: float, y: float, said: str, *, at: str = "start", size: int = 12, colour: str = INK) -> str:
    """A line of text; `at` is which of its ends stands at x: start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{at}" fill="{colour}">{escape(said)}</text>'


def line(a: tuple[float, float], b: tuple[float, float], colour: str, *, dashed: bool = False) -> str:
    """A straight line."""
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return (f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}" stroke="{colour}" '
            f'stroke-width="1.5"{dash}/>')  # fmt: skip


def dot(x: float, y: float, colour: str, *, full: bool = True, label: str = "") -> str:
    """A point; `label` is shown where a pointer rests on it."""
    inside = colour if full else "#ffffff"
    return (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{inside}" stroke="{colour}" stroke-width="1.5">'
            f"<title>{escape(label)}</title></circle>")  # fmt: skip


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A whole picture on white."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" role="img">', f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *parts, "</svg>",
    ]) + "\n"  # fmt: skip


def ranked(said: Said) -> list[str]:
    """The methods by what they keep, best first: the mean over numbers of tenants; those with all of them first."""
    names = dict.fromkeys(n for of in said["told"].values() for n in of if n != "exact sum")
    shares = {n: [of[n]["kept"] for of in said["told"].values() if n in of] for n in names}
    return sorted(names, key=lambda n: (-len(shares[n]), -mean(shares[n]), n))


def kept_picture(said: Said) -> str:
    """A panel for each number of tenants, a row for each method: the mean share kept, and the worst tenant's."""
    names, left, wide, row, top = ranked(said), 142, 250, 22, 62
    parts = [text(left, 20, "Share of the tenants' gains that is left in one merged model", size=15)]
    parts += [dot(left + 5, 36, BLUE), text(left + 14, 40, "mean of its tenants"),
              dot(left + 150, 36, SECOND, full=False), text(left + 159, 40, "the worst of them"),
              text(left + 290, 40, "0: the base; 1: each tenant's own variant; < further out", colour=GREY)]
    bottom = top + row * len(names)
    parts += [text(left - 20, top + row * i + 16, n, at="end") for i, n in enumerate(names)]
    for p, (m, of) in enumerate(said["told"].items()):
        x0 = left + p * (wide + 10)

        def at(share: float, x0: float = x0) -> float:
            return x0 + (min(max(share, LOW), HIGH) - LOW) / (HIGH - LOW) * (wide - 20)

        merges = of["mean"]["merges"]
        parts.append(text(x0, top - 4, f"{m} tenants ({merges} merges)", colour=GREY))
        for tick in (-0.5, 0, 0.5, 1):
            parts.append(line((at(tick), top), (at(tick), bottom), GREY if tick in (0, 1) else FAINT))
            parts.append(text(at(tick), bottom + 14, f"{tick:g}", at="middle", size=11, colour=GREY))
        for i, n in enumerate(names):
            if n not in of:
                continue
            y, kept, worst = top + row * i + 12, of[n]["kept"], of[n]["worst"]
            parts.append(line((at(worst), y), (at(kept), y), FAINT))
            parts.append(dot(at(worst), y, SECOND, full=False, label=f"{n}: worst {worst:.2f}"))
            parts.append(dot(at(kept), y, BLUE, label=f"{n}: mean {kept:.2f}"))
            parts += [text(at(v) - 7, y + 4, "<", at="end", colour=c) for v, c in ((worst, SECOND), (kept, BLUE))
                      if v < LOW][:1]  # fmt: skip
    return svg(left + 3 * (wide + 10), bottom + 24, "What merging keeps, by method", parts)


def lines_of(said: Said) -> dict[tuple[str, str], list[list[tuple[float, float]]]]:
    """Of each pair, for each seed, the shares of both gains along the line between the variants, on validation text."""
    out: dict[tuple[str, str], list[list[tuple[float, float]]]] = {}
    for r in said["rows"]:
        if r["method"] == "soups":
            a, b = r["tenants"]
            ends = said["ends"][str(r["seed"])]
            base, own = ends["base"]["valid"], ends["own"]["valid"]
            share = [{t: (base[t] - bits[t]) / (base[t] - own[t]) for t in (a, b)} for bits in r["by_tenant"].values()]
            out.setdefault((a, b), []).append([(s[a], s[b]) for s in share])
    return out


def lines_picture(said: Said) -> str:
    """A panel for each pair: how much of both gains the weighted means of two variants keep."""
    found, left, side, top = lines_of(said), 60, 240, 62
    low, high = LOW, 1.35
    parts = [text(left, 20, "Weighted means of two variants: from all of the one to all of the other", size=15),
             text(left, 40, "share of each gain that is kept, on validation text; a line a seed, cut off far below 0; "
                  "dashed: as much as the variant's weight", colour=GREY)]  # fmt: skip
    for p, ((a, b), of) in enumerate(found.items()):
        x0 = left + p * (side + 50)

        def at(x: float, y: float, x0: float = x0) -> tuple[float, float]:
            return x0 + (x - low) / (high - low) * side, top + side - (y - low) / (high - low) * side

        for v in (0.0, 0.5, 1.0):
            parts += [line(at(v, low), at(v, high), FAINT), line(at(low, v), at(high, v), FAINT)]
            parts.append(text(at(v, low)[0], top + side + 14, f"{v:g}", at="middle", size=11, colour=GREY))
            parts.append(text(x0 - 6, at(low, v)[1] + 4, f"{v:g}", at="end", size=11, colour=GREY))
        parts += [line(at(1, 0), at(0, 1), GREY, dashed=True), text(x0 + side, top + side + 30, f"{a} kept", at="end"),
                  text(x0, top - 6, f"{b} kept")]  # fmt: skip
        panel = f'<rect x="{x0:.1f}" y="{top:.1f}" width="{side}" height="{side}"/>'
        parts += [f'<clipPath id="panel{p}">{panel}</clipPath>',
                  f'<g clip-path="url(#panel{p})">']  # fmt: skip
        for s, some in enumerate(of):
            colour = (BLUE, SECOND)[s % 2]
            parts += [line(at(*u), at(*v), colour) for u, v in pairwise(some)]
            parts += [dot(*at(*v), colour, label=f"{a} {v[0]:.2f}, {b} {v[1]:.2f}") for v in some]
        parts.append("</g>")
    return svg(left + len(found) * (side + 50) - 30, top + side + 42, "Between two variants", parts)


def table(said: Said) -> str:
    """Every method's mean and worst shares by number of tenants, and in how many merges it was ahead of the mean."""
    told, names = said["told"], [*ranked(said), "exact sum"]
    head = ["method", *(f"{m} tenants, {what}" for m in told for what in ("mean", "worst", "ahead"))]
    out = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    for n in names:
        cells = [n]
        for of in told.values():
            r = of.get(n)
            lead = "" if n == "mean" or not r else f"{r['wins']} of {r['merges']}"
            cells += [f"{r['kept']:.2f}", f"{r['worst']:.2f}", lead] if r else ["", "", ""]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def by_tenant(said: Said) -> str:
    """What the base and the own variants score, as means over seeds, and what the mean and the best keep of most."""
    last = list(said["told"])[-1]
    of = said["told"][last]
    best = max((n for n in of if n not in ("mean", "exact sum")), key=lambda n: float(of[n]["kept"]))
    rows = []
    for t in said["tenants"]:
        base, own = (mean(e[k]["test"][t] for e in said["ends"].values()) for k in ("base", "own"))
        rows.append(f"| {t} | {base:.3f} | {own:.3f} | {of['mean']['by_tenant'][t]:.2f} | "
                    f"{of[best]['by_tenant'][t]:.2f} |")  # fmt: skip
    head = f"| tenant | base, bits/byte | own variant | kept of {last} by `mean` | by `{best}` |"
    return "\n".join([head, "| --- | ---: | ---: | ---: | ---: |", *rows])


def verdict(told: Mapping[str, Said]) -> str:
    """Which methods are ahead of the plain mean, by number of tenants, and by how much."""
    out = []
    for m, of in told.items():
        others = sorted((n for n in of if n not in ("mean", "exact sum")), key=lambda n: -of[n]["kept"])
        ahead = [f"`{n}` {round(of[n]['ahead'], 2) + 0.0:+.2f}" for n in others if of[n]["wins"] == of[n]["merges"]]
        behind = [f"`{n}` {round(of[n]['ahead'], 2) + 0.0:+.2f}" for n in others if of[n]["losses"] == of[n]["merges"]]
        mixed = [f"`{n}` {round(of[n]['ahead'], 2) + 0.0:+.2f}" for n in others
                 if of[n]["merges"] > max(of[n]["wins"], of[n]["losses"])]
        said = [f"ahead of the mean in every merge: {', '.join(ahead) or 'none'}",
                f"behind it in every merge: {', '.join(behind) or 'none'}"]  # fmt: skip
        said += [f"now ahead, now behind, or equal: {', '.join(mixed)}"] if mixed else []
        out.append(f"- {m} tenants, `mean` {of['mean']['kept']:.2f}: {'; '.join(said)}.")
    return "\n".join(out)


def cosines(rows: Sequence[Said]) -> tuple[float, float]:
    """The least and the largest mean cosine of the variants' differences, over merges."""
    found = [r["cosine"] for r in rows if r["method"] == "sum"]
    return min(found), max(found)


def page(said: Said, mark: str, machine: str) -> str:
    """docs/gallery.md."""
    low, high = cosines(said["rows"])
    apart = said["exact_sum_apart"]
    return f"""# Merging tenants, in pictures

{mark}`benchmarks/merge_tenants.py` trains a LoRA of rank 8 on the demo's base, {said["steps"]} steps, for each of
six tenants ({", ".join(said["tenants"])}), and merges two, four and all six of them by each method.
Seeds of all that is trained and drawn: {said["seeds"]}.

The figure is the share of a tenant's gain that is left in the merged model: (base - merged) / (base - own variant), in
bits per byte on test text; 1 is the tenant's own variant, 0 the base, and below 0 the merge is worse than the base.
Methods with options got four tries (`soups` five), chosen by what they keep on validation text; `mean`, `sum` and
`model_stock` have nothing to choose. `soups` is the best weighted mean of two.

![Share of the tenants' gains that each method keeps](pictures/merge_kept.svg)

{verdict(said["told"])}

A number behind a method is the difference of the shares to the plain mean's, over merges. Few merges, one small base
and short trainings: differences of a few hundredths say little.

{table(said)}

"Ahead" says in how many merges a method kept more than the plain mean, by over 0.001. `exact sum` is that of
`plures merge a=1 b=1`, by the variants' factors; it is at most {apart:.1e} bits per byte from `sum`, which adds up
whole weights. The mean cosine of the variants' differences to the base is {low:.3f} to {high:.3f} over the merges; at 0
they stand at right angles.

{by_tenant(said)}

![Two gains along the line between two variants](pictures/merge_lines.svg)

Each point is a weighted mean of two variants, a quarter of the way from the last. On the dashed line each gain is kept
by as much as its variant's weight; points above it keep more.

{machine}. Raw: `benchmarks/results/merge_tenants.json`.
"""


def pages(said: Said | None, mark: str, machine: str) -> dict[Path, str]:
    """The page and its pictures by their paths from the root; a page that says so where nothing was measured."""
    if said is None:
        return {PAGE: f"# Merging tenants, in pictures\n\n{mark}Not measured yet: run `benchmarks/merge_tenants.py`.\n"}
    return {PAGE: page(said, mark, machine), KEPT: kept_picture(said), LINES: lines_picture(said)}
