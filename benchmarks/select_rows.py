"""Choosing rows beside the libraries that users would pick: ten cases, one thread, CPU seconds.

    OMP_NUM_THREADS=1 python benchmarks/select_rows.py --peers /tmp/peers/bin/python [--large]

Every case runs in a process of its own. Peers run in their own environment (see select_peer.py); one that is not there
is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import describe, write_result

HERE = Path(__file__).parent


def ours(case: str, n: int) -> dict[str, Any]:
    """One case in this process."""
    import numpy as np
    from select_workload import covered, peak_mb, rows

    from plures.choice import graph as graphs
    from plures.choice.pool import Budget, Pool
    from plures.select import selects
    from plures.tensors.rng import rng

    small = rows(5000, seed=1)  # compile first: peers' builds are compiled too
    tiny = Pool(5000, small, graph=graphs.build(small, rng(0)))
    for exact in (0, 1):
        selects.make("cover", exact=exact).choose(tiny, Budget(rows=20), rng(0))
    X, k = rows(n), max(1, n // 100)
    before = peak_mb(anew=True)
    began = time.process_time()
    if case.startswith("graph"):
        index, _ = graphs.nearest(X, 64, rng(0), probes=12)
        spent = time.process_time() - began
        some = np.random.default_rng(1).permutation(n)[:500]
        sims = X[some] @ X.T
        sims[np.arange(500), some] = -9
        want = np.argpartition(-sims, 64, axis=1)[:, :64]
        hits = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(want, index[some], strict=True)]
        return {"cpu_s": spent, "recall": sum(hits) / 64 / 500, "more_mb": peak_mb() - before}
    if case in OBJECTIVES:
        return objective(case, X, k)
    options: dict[str, int] = {"cover": {"swaps": 0}, "exact": {"exact": 3}}.get(case, {})
    default = min(256, max(64, 3_200_000 // n))  # of `plures select`
    neighbours = 64 if case in ("cover", "exact") else default
    graph = graphs.build(X, rng(0), k=neighbours, probes=8)
    built = time.process_time() - began
    found = selects.make("cover", **options).choose(Pool(n, X, graph=graph), Budget(rows=k), rng(0))
    spent = time.process_time() - began
    more = peak_mb() - before
    return {"cpu_s": spent, "graph_cpu_s": built, "more_mb": more, "covered": covered(X, found.rows),
            "distinct": len(set(found.rows.tolist())), "certificate": found.certificate}  # fmt: skip


OBJECTIVES = ("kcenter", "features", "cut", "vendi", "mig", "deita")
"""Cases that need no graph."""


def objective(case: str, X: Any, k: int) -> dict[str, Any]:
    """One objective that needs no graph."""
    import numpy as np
    from select_workload import peak_mb, tags

    from plures.choice import vendi
    from plures.choice.greedy import Limits, greedy
    from plures.choice.greedy import Objective as Terms
    from plures.choice.pool import Budget, Labels, Pool
    from plures.select import selects
    from plures.tensors.rng import rng

    def labels(number: int, each: int, ragged: bool) -> Labels:
        of, weight = tags(n, number, each, ragged=ragged)
        have = weight > 0
        start = np.concatenate([[0], np.cumsum(have.sum(1))]).astype(np.int64)
        return Labels(start, of[have].astype(np.int32), weight[have].astype(np.float32), tuple(map(str, range(number))))

    n = len(X)
    warm = Pool(200, X[:200], {"quality": np.ones(200)}, labels=Labels.of([{"a": 1.0}] * 200))
    for name in ("kcenter", "cut", "mig", "deita"):
        selects.make(name).choose(warm, Budget(rows=5), rng(0))
    X = np.abs(X) if case == "cut" else X
    score, bag, one = np.random.default_rng(3).random(n), labels(1000, 25, False), labels(4500, 8, True)
    limits = Limits(np.ones(n, np.int64), k, False, np.zeros(n, np.int32), np.array([k]), np.zeros(n, bool))
    before, began = peak_mb(anew=True), time.process_time()
    more: dict[str, Any] = {}
    if case == "vendi":
        more["value"] = vendi.scores(X)[1.0]
    elif case == "features":
        more["rows"] = greedy(Terms(n, labels=bag, concave=1.0, power=0.5), limits)[0].tolist()
    elif case == "mig":
        made = selects.make("mig", score="one").choose(Pool(n, scores={"one": np.ones(n)}, labels=one), Budget(rows=k),
                                                       rng(0))  # fmt: skip
        more["rows"] = made.rows.tolist()
    else:
        pool, k = Pool(n, X, {"quality": score}), n // 10 if case == "deita" else k
        options = {"deita": {"threshold": 0.9}, "cut": {"lam": 0.4}}.get(case, {})
        more["rows"] = selects.make(case, **options).choose(pool, Budget(rows=k), rng(0)).rows.tolist()
    spent = time.process_time() - began
    return {"cpu_s": spent, "more_mb": peak_mb() - before, **more}


def mig_value(rows: list[int], n: int) -> float:
    """MIG's own objective of these rows."""
    import numpy as np
    from select_workload import tags

    of, weight = tags(n, 4500, 8, ragged=True)
    filled = np.zeros(4500)
    np.add.at(filled, of[rows].ravel(), weight[rows].ravel())
    return float(((filled + 1e-6) ** 0.8 - 1e-6**0.8).sum())


def run(command: list[str]) -> dict[str, Any]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:] or done.returncode}
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="", help="the python of an environment with the peers")
    parser.add_argument("--large", action="store_true", help="a million rows too: minutes, 4 GB")
    parser.add_argument("--mig", default="", help="a clone of yichengchen24/MIG")
    parser.add_argument("--deita", default="", help="a clone of hkust-nlp/deita")
    parser.add_argument("--only", default="", help="cases, with commas between; nothing is written")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(ours(asked.case[0], int(asked.case[1]))))
        return
    cases = [("cover", 20000), ("swaps", 20000), ("exact", 20000), ("graph", 100000)]
    cases += [("swaps", 100000)]
    cases += [("cover", 1000000)] if asked.large else []
    sizes = {"kcenter": 50000, "features": 50000, "cut": 5000, "vendi": 50000, "mig": 20000, "deita": 20000}
    cases += list(sizes.items())
    peers = [("apricot", 20000, ""), ("submodlib", 20000, ""), ("fasterpam", 20000, ""), ("hnswlib", 100000, ""),
             ("faiss", 100000, "")]  # fmt: skip
    theirs = {"kcenter": "skmatter"}
    clones = {"mig": asked.mig, "deita": asked.deita}
    peers += [(theirs.get(c, c), n, clones.get(c, "")) for c, n in sizes.items() if c not in clones or clones[c]]
    told: dict[str, Any] = {"machine": describe(), "k": "1 %", "d": 384, "ours": {}, "peers": {}, "alike": {}}
    chosen: dict[str, list[int]] = {}
    for case, n in cases:
        if asked.only and case not in asked.only.split(","):
            continue
        said = run([sys.executable, __file__, "--case", case, str(n)])
        chosen[case] = said.pop("rows", [])
        told["ours"][f"{case} {n}"] = said
        print(case, n, said, flush=True)
    for name, n, clone in peers if asked.peers else []:
        case = "kcenter" if name == "skmatter" else name
        if asked.only and case not in asked.only.split(","):
            continue
        said = run([asked.peers, str(HERE / "select_peer.py"), name, str(n), *([clone] if clone else [])])
        rows = said.pop("rows", [])
        told["peers"][f"{name} {n}"] = said
        print(name, n, said, flush=True)
        if case in sizes and rows:
            told["alike"][case] = len(set(rows) & set(chosen[case])) / len(rows)
            if case == "mig":
                told["alike"]["mig objective, ours over theirs"] = mig_value(chosen[case], n) / mig_value(rows, n)
            print("alike", told["alike"])
    if asked.only:
        return
    write_result("select_rows", told)


if __name__ == "__main__":
    main()
