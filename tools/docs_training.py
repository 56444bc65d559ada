"""What was measured of training, and of PEFT's tests: each result as a table, or in brief for the README."""

from __future__ import annotations

from typing import Any

from docs_parts import table


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
