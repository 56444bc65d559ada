"""One case of one peer, in an environment of its own: prints CPU seconds, peak memory, and what it chose.

    /tmp/peers/bin/python benchmarks/select_peer.py apricot 20000

The environment: `pip install numpy scipy scikit-learn apricot-select==0.6.1 submodlib-py kmedoids faiss-cpu hnswlib
vendi-score pandas tqdm torch` and `pip install --no-deps skmatter` (kmedoids is under the GPL: a peer here, never a
dependency; the official codes of MIG and DEITA run from clones of their repositories).
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
from select_workload import covered, peak_mb, rows, tags


def apricot(X: Any, k: int) -> Any:
    from apricot import FacilityLocationSelection

    sims = np.maximum(X @ X.T, 0).astype(np.float64)
    return FacilityLocationSelection(k, metric="precomputed", optimizer="lazy").fit(sims).ranking


def submodlib(X: Any, k: int) -> Any:
    from submodlib import FacilityLocationFunction

    f = FacilityLocationFunction(n=len(X), mode="dense", data=X, metric="cosine")
    return [i for i, _ in f.maximize(budget=k, optimizer="LazyGreedy", show_progress=False)]


def fasterpam(X: Any, k: int) -> Any:
    import kmedoids

    return kmedoids.fasterpam(1 - X @ X.T, k, random_state=0, n_cpu=1).medoids.astype(int)


def hnswlib(X: Any, k: int) -> Any:
    import hnswlib as h

    index = h.Index("ip", X.shape[1])
    index.init_index(len(X), ef_construction=100, M=24)
    index.set_num_threads(1)
    index.add_items(X)
    index.set_ef(170)  # the least work for a recall of 0.93 of those tried: M 16 to 32, ef 80 to 320
    return index.knn_query(X, 65)[0]


def faiss(X: Any, k: int) -> Any:
    import faiss as f

    f.omp_set_num_threads(1)
    index = f.index_factory(X.shape[1], f"IVF{int(2 * len(X) ** 0.5)},Flat", f.METRIC_INNER_PRODUCT)
    index.train(X[:: max(1, len(X) // 50000)])
    index.add(X)
    index.nprobe = 32  # the least work for a recall of 0.93 of those tried: 316 to 1264 lists
    return index.search(X, 65)[1]


def skmatter(X: Any, k: int) -> Any:
    from skmatter.sample_selection import FPS

    first = int((X @ X.sum(0, dtype=np.float64)).argmax())
    return FPS(n_to_select=k, initialize=first).fit(X).selected_idx_


def features(X: Any, k: int) -> Any:
    from apricot import FeatureBasedSelection

    return FeatureBasedSelection(k, concave_func="sqrt", optimizer="lazy").fit(_bags(len(X))).ranking


def _bags(n: int) -> Any:
    from scipy.sparse import csr_matrix

    of, weight = tags(n, 1000, 25)
    return csr_matrix((weight.ravel(), of.ravel(), np.arange(n + 1) * 25), shape=(n, 1000))


def cut(X: Any, k: int) -> Any:
    from apricot import GraphCutSelection

    X = np.abs(X)  # apricot takes no negative cosines
    sims = (X @ X.T).astype(np.float64)
    return GraphCutSelection(k, metric="precomputed", alpha=1 / 0.4, optimizer="lazy").fit(sims).ranking


def vendi(X: Any, k: int) -> Any:
    from vendi_score.vendi import score_dual

    return score_dual(X, normalize=False)


def mig(X: Any, k: int) -> Any:
    """The official sampler (yichengchen24/MIG), from the folder in the third argument; its own vectors are stubbed."""
    import importlib.util
    import types

    import torch

    torch.set_num_threads(1)
    for name in ("data", "label"):
        held = types.ModuleType(f"mig.{name}")
        held.DataPoint, held.LabelGraph = int, object  # type: ignore[attr-defined]
        held.Dataset = list  # type: ignore[attr-defined]
        sys.modules[f"mig.{name}"] = held
    spec = importlib.util.spec_from_file_location("mig.sampler", f"{sys.argv[3]}/mig/sampler.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    of, weight = tags(len(X), 4500, 8, ragged=True)
    dense = torch.zeros(len(X), 4500)
    dense.scatter_(1, torch.from_numpy(of), torch.from_numpy(weight).float())

    class Graph:
        wam = torch.eye(4500)

        def vectorize(self, pool: Any, norm: bool) -> Any:
            return dense

        def __len__(self) -> int:
            return 4500

    return list(module.MIGSampler(Graph()).sample(list(range(len(X))), k))


def deita(X: Any, k: int) -> Any:
    """The official filter (hkust-nlp/deita), from the folder in the third argument."""
    import importlib.util

    import pandas as pd

    spec = importlib.util.spec_from_file_location("filter", f"{sys.argv[3]}/src/deita/selection/filter/base.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Filter(module.IterativeFilter):  # type: ignore[misc,name-defined]
        def _sort(self, df: Any) -> Any:
            return df.sort_values(by="final_score", ascending=False)

    df = pd.DataFrame({"embedding": list(X), "final_score": np.random.default_rng(3).random(len(X))})
    made = Filter(threshold=0.9, data_size=len(X) // 10, chunk_size=100000, device="cpu")
    return made.filter(df).index.to_numpy()


def main() -> None:
    name, n = sys.argv[1], int(sys.argv[2])
    X = rows(n)
    if len(X) > 5000:  # neither imports nor compiled loops are charged
        globals()[name](X[:5000] if name in ("hnswlib", "faiss") else X[:500], 5)
    before = peak_mb(anew=True)
    began = time.process_time()
    got = globals()[name](X, max(1, n // 100))
    spent = time.process_time() - began
    more = peak_mb() - before
    said: dict[str, Any] = {"name": name, "n": n, "cpu_s": spent, "more_mb": more}
    got = np.asarray(got)
    if got.ndim == 0:
        said["value"] = float(got)
    elif got.ndim == 1:
        said |= {"rows": got.tolist(), "covered": covered(X, got), "distinct": len(set(got.tolist()))}
    else:
        some = np.random.default_rng(1).permutation(n)[:500]
        sims = X[some] @ X.T
        sims[np.arange(500), some] = -9
        want = np.argpartition(-sims, 64, axis=1)[:, :64]
        hits = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(want, got[some], strict=True)]
        said["recall"] = sum(hits) / 64 / 500
    print(json.dumps(said))


if __name__ == "__main__":
    main()
