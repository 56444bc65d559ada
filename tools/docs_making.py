"""What was measured of choosing, merging and packing: each result as a table, or in brief for the README."""

from __future__ import annotations

from typing import Any

from docs_parts import table

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
        "two cores, mergekit 0.1.5 computing in float32 with one (more made it slower); of both the median of three. "
        "`cp` of one model takes "
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


def merge_agree(said: dict[str, Any], brief: bool) -> str:
    """Every method beside mergekit on random models: what differs by more than rounding; in brief nothing."""
    if brief:
        return ""
    spreads, recipes = list(said["cases"]), list(next(iter(said["cases"].values())))
    by = {r: [said["cases"][s].get(r, {}) for s in spreads] for r in recipes}
    both = {r: of for r, of in by.items() if all("relative" in one for one in of)}
    apart = {r: of for r, of in both.items() if max(one["relative"] for one in of) > 1e-6}
    refused = [(r, *(next((str(one[who]) for one in of if who in one), "runs") for who in ("plures", "mergekit")))
               for r, of in by.items() if r not in both]  # fmt: skip
    head = "recipe | " + " | ".join(f"{s} ({said['spread'][s]:g}):" for s in spreads)
    rows = [(r, *(f"{one['relative']:.0e}" for one in of)) for r, of in apart.items()]
    return (f"{len(recipes)} recipes on random models whose differences from the base have the deviation in brackets; "
            f"the base's numbers have 0.02. {len(both) - len(apart)} recipes agree with mergekit {said['mergekit']} to "
            f"within 1e-6 of each tensor's largest number. These do not, for reasons that their methods' pages give:"
            f"\n\n{table(head, rows)}\n\nThese are refused by one of the two:\n\n"
            f"{table('recipe | Plures | mergekit', refused)}")  # fmt: skip


def packed_row(r: dict[str, Any], more: str) -> tuple[str, ...]:
    """A packer on a fleet, as a row."""
    options = ", ".join(f"{k} {v}" for k, v in r["options"].items())
    name = (f"{r['packer']} ({options})" if options else r["packer"]) + (" in the metric" if r["metric"] else "")
    return (f"{name}{more}", f"{r['bits']:.2f}",
            f"{r['fp16_bytes'] / r['bytes_at_64']:.2f}", f"{r['fp16_bytes'] / r['bytes_at_10000']:.2f}",
            f"{r['error_mean']:.3f}", f"{100 * r['recovery_mean']:.2f} %", f"{100 * r['recovery_min']:.2f} %",
            f"{r['encode_per_cpu_s']:.0f}", f"{r['decode_per_cpu_s']:.0f}")  # fmt: skip


def guarded_row(r: dict[str, Any], what: str, int4_bytes: float) -> tuple[str, ...]:
    """A fleet whose variants are each as coarse as scores allow, as a row."""
    other = f"{100 * r['other_mean']:.2f} % ({100 * r['other_min']:.2f} %)" if "other_mean" in r else ""
    return (f"{what}{', in the metric' if r['metric'] else ''}", f"{100 * r['least']:.1f} %",
            f"{int4_bytes / r['bytes_at_10000']:.2f}", f"{100 * r['recovery_mean']:.2f} %",
            f"{100 * r['recovery_min']:.2f} %", other, f"{r['looks']:.1f}", f"{r['below']}")  # fmt: skip


def int4_of(fleet: dict[str, Any]) -> dict[str, Any]:
    """int4 of the factors as given, which loses less than int4 of the one form."""
    return next(r for r in fleet["all"] if r["packer"] == "rtn" and r["options"] == {"bits": 4, "form": "given"})


def pack_measure(said: dict[str, Any], brief: bool) -> str:
    """Packing two trained fleets; in brief one sentence on the second, whose variants each began elsewhere."""
    if brief:
        (r,) = (g for g in said["fleets"]["1"]["guarded"] if g["metric"] and g["least"] == 0.99)
        int4 = int4_of(said["fleets"]["1"])
        return (f"64 trained LoRAs of rank 8, each begun elsewhere and held to 99 % of its gain: "
                f"{100 * r['recovery_mean']:.2f} % is left on average, in "
                f"{int4['bytes_at_10000'] / r['bytes_at_10000']:.2f} times fewer bytes than "
                f"int4 over 10,000 variants (int4: {100 * int4['recovery_mean']:.2f} %, "
                f"{100 * int4['recovery_min']:.1f} % at least).")  # fmt: skip
    out = []
    for number, fleet in said["fleets"].items():
        int4 = int4_of(fleet)
        rows = [packed_row(r, more) for kind, more in (("all", ""), ("unseen", ", unseen")) for r in fleet[kind]]
        head = ("packer | bits a number: | times below fp16 at 64: | at 10,000: | error: | gain left: | at least: | "
                "coded a CPU second: | decoded:")  # fmt: skip
        kinds = (("guarded", "all"), ("guarded_unseen", "unseen"), ("guarded_by_half", "by one half of the text"))
        held = [guarded_row(r, what, int4["bytes_at_10000"]) for kind, what in kinds for r in fleet[kind]]
        held_head = ("variants | asked for: | times fewer bytes than int4: | gain left: | at least: | "
                     "on the other half: | looks: | not reached:")  # fmt: skip
        plain, noise = fleet["random"]
        begun = "begun at one A" if number == "0" else "each begun at its own A"
        out.append(
            f"Fleet {number}: 64 LoRAs of rank 8 at 24 sites of the demo's base, {begun}; they gain "
            f"{fleet['gain_nats_mean']:.3f} nats a token on held-out text on average, {fleet['gain_nats_min']:.3f} at "
            f"least. The metric is measured on rows that no score reads.\n\n{table(head, rows)}\n\n"
            f"Each variant as coarsely as leaves what is asked for of its gain (`--held-out`), at an error of "
            f"{fleet['guarded'][0]['error']} at most, amortised over 10,000 variants:\n\n{table(held_head, held)}\n\n"
            f"Factors of noise at int4's error ({plain['error_mean']:.3f}): klt takes "
            f"{noise['bits'] / plain['bits']:.2f} of int4's bits."
        )
    return "\n\n".join(out)
