"""The recipes, as plain dataclasses: what a user may say of a run. Imports nothing heavy, so templates are quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from plures.core.recipe import opt

Scalar = bool | int | float | str


@dataclass
class DataPart:
    """Which rows to train on and to score on."""

    train: str = opt(
        help="rows: a .jsonl, .parquet or .txt file, a folder of them, a `datasets` id like org/name:split, or "
        "selection:<name> of the fleet"
    )
    held_out: str | None = opt(None, "rows to score on; none: a share of the training rows")
    held_out_share: float = opt(0.05, "share of the rows held out where no held_out is given", ge=0.0, lt=1.0)
    columns: dict[str, str] = opt(default_factory=dict, help="your names of the columns, e.g. {text: body}")
    limit: int | None = opt(None, "read at most this many rows", ge=1)
    max_tokens: int = opt(512, "tokens of one window; longer texts are cut into several, answers are truncated", ge=2)
    packing: bool = opt(True, "fill windows with several rows, closed by the end token; false pads each row")
    order: Literal["shuffled", "given"] = opt(
        "shuffled", "given: as the rows stand in the file, from easy to hard, or epoch by epoch as they were chosen"
    )
    weight: str = opt("auto", "column of weights that losses count by; auto: plures_weight where rows have it; none")


@dataclass
class LoopPart:
    """How to train."""

    steps: int | None = opt(None, "optimizer steps; none: as many as `epochs` needs", ge=1)
    epochs: float = opt(1.0, "passes over the data, where steps is none", gt=0.0)
    batch_rows: int = opt(8, "windows in one forward pass", ge=1)
    accumulate: int = opt(1, "forward passes in one step", ge=1)
    lr: float = opt(2e-3, "peak learning rate", gt=0.0)
    warmup_share: float = opt(0.05, "share of the steps that warm up", ge=0.0, le=1.0)
    decay: Literal["linear", "cosine", "constant"] = opt("linear", "fall of the learning rate after the warm-up")
    clip: float = opt(1.0, "largest norm of the gradient; 0 for no limit", ge=0.0)
    weight_decay: float = opt(0.0, "AdamW's decoupled decay", ge=0.0)
    beta1: float = opt(0.9, "AdamW's first decay rate", ge=0.0, lt=1.0)
    beta2: float = opt(0.999, "AdamW's second decay rate", ge=0.0, lt=1.0)
    base_dtype: Literal["float32", "bfloat16", "float16"] = opt(
        "float32", "dtype of the frozen base; the adapter is float32"
    )
    autocast: bool = opt(False, "run the forward pass in bfloat16 where that is safe")
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass to save memory")
    eval_every: int = opt(0, "score the held-out rows every so many steps; 0: at the end only", ge=0)
    save_every: int = opt(50, "write a checkpoint every so many steps; 0: at the end only", ge=0)
    patience: int = opt(0, "stop after so many evaluations without a better one and keep the best; 0: never", ge=0)
    threads: int = opt(0, "CPU threads; 0: as torch chooses", ge=0)
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")


@dataclass
class StartPart:
    """Start from a variant of the fleet instead of from the base."""

    variant: str = opt("", "a variant of the same method and options, e.g. shared@1; none: start as the base")
    take: list[str] = opt(default_factory=list, help="tensors to take over, by their names, e.g. [A, B]; none: all")
    freeze: list[str] = opt(default_factory=list, help="tensors that stay as they are there, e.g. [A, B]")


@dataclass
class ShardsPart:
    """Train several variants, `name-0`, `name-1` …, each on some shards of the rows, so that `plures forget` can."""

    count: int = opt(0, "shards, and variants; 0: one variant of all rows", ge=0)
    reach: int = opt(2, "shards that a variant learns from: its own and those after it; 1: its own alone", ge=1)
    key: str = opt("", "column whose equal values stand in one shard, e.g. customer; none: each row by its content")


@dataclass
class TasksPart:
    """Train several variants at once, `name-<task>` each, that share the method's pool (MHR, MoS, Fleet-MoS)."""

    key: str = opt("", "column that says whose row it is, e.g. customer; none: one variant of all rows")


@dataclass
class TrainRecipe:
    """`plures train`: from rows to a published variant."""

    fleet: str = opt(help="the fleet's folder (made by `plures init`)")
    name: str = opt(help="name of the variant; a new version if it exists")
    data: DataPart = field(default_factory=DataPart)
    adapt: dict[str, Scalar] = opt(
        default_factory=lambda: {"method": "mos"}, help="the method and its options, e.g. {method: mos, r: 16, e: 2}"
    )
    loss: dict[str, Scalar] = opt(
        default_factory=lambda: {"method": "sft"}, help="the objective and its options, e.g. {method: dpo, beta: 0.1}"
    )
    targets: str | list[str] = opt(
        "all-linear", "sites: all-linear, names or endings of names, or a regular expression"
    )
    layers: list[int] = opt(default_factory=list, help="layer numbers to adapt; none: all")
    modules_to_save: list[str] = opt(default_factory=list, help="modules to train whole, e.g. [lm_head]")
    dropout: float = opt(0.0, "dropout on the adapter's input", ge=0.0, lt=1.0)
    start: StartPart = field(default_factory=StartPart)
    train: LoopPart = field(default_factory=LoopPart)
    shards: ShardsPart = field(default_factory=ShardsPart)
    tasks: TasksPart = field(default_factory=TasksPart)
    aliases: list[str] = opt(default_factory=list, help="aliases to point at the new version, e.g. [prod]")
    seed: int = opt(0, "seed of every random number of the run", ge=0)
    run: str | None = opt(None, "folder of the run; none: <fleet>/runs/<name>-<hash of the recipe>")
    tensorboard: bool = opt(False, "also write TensorBoard scalars into the run's folder")

    def method(self) -> tuple[str, dict[str, Any]]:
        """The method's name and its options."""
        rest = dict(self.adapt)
        return str(rest.pop("method", "mos")), rest

    def objective(self) -> tuple[str, dict[str, Any]]:
        """The loss's name and its options."""
        rest = dict(self.loss)
        return str(rest.pop("method", "sft")), rest


@dataclass
class TenantPart:
    """One tenant's rows."""

    name: str = opt(help="the tenant")
    train: str = opt(help="rows to train on")
    valid: str = opt(help="rows that choose the learning rate and are not reported")
    test: str = opt(help="rows that are scored and reported")


@dataclass
class ContenderPart:
    """One method at one size, or at several."""

    method: str = opt(help="a method of plures, or with peft: true the name of a PEFT config such as IA3 or VBLORA")
    options: dict[str, Scalar | list[str]] = opt(default_factory=dict, help="the method's options, e.g. {l: 4}")
    size: str = opt("", "the option that sets the size, e.g. r")
    sizes: list[float] = opt(default_factory=list, help="its values: each is a contender of its own")
    lr: float = opt(7e-3, "middle of the learning-rate search", gt=0.0)
    name: str = opt("", "what it is called; none: the method, with the size")
    ablates: str = opt("", "the contender of which this leaves a part out: they are compared in a table of their own")
    note: str = opt("", "what readers should know of it; stands on the page")
    peft: bool = opt(False, "PEFT's own method, trained in the same loop; it is not kept in the fleet")


@dataclass
class BenchRecipe:
    """`plures bench`: methods at several sizes on the same base and rows, with equal care for each."""

    base: str = opt(help="hub id or folder of the base")
    tenants: list[TenantPart] = opt(help="whose rows")
    contenders: list[ContenderPart] = opt(help="what is compared")
    search_tenant: str = opt("", "the tenant on which rates are searched, left out of the scores; none: the first")
    rates: int = opt(3, "learning rates tried at first, a factor of two apart", ge=1, le=9)
    most_rates: int = opt(5, "at most, where the best lies at an edge", ge=1, le=15)
    seeds: int = opt(3, "runs of every cell", ge=1)
    steps: int = opt(100, "optimizer steps of every run", ge=1)
    batch_rows: int = opt(4, "windows in one step", ge=1)
    max_tokens: int = opt(256, "tokens of one window", ge=2)
    targets: str | list[str] = opt("all-linear", "sites")
    autocast: bool = opt(False, "forward passes in bfloat16")
    workers: int = opt(0, "processes, each with one thread; 0: as many as cores, at most 4", ge=0)
    out: str = opt("bench", "folder of the results, and of a fleet with every reported variant")


@dataclass
class SelectRecipe:
    """`plures select`: from candidate rows to the rows to train on."""

    pool: str | list[str] = opt(
        help=".parquet, .jsonl or .arrow files of candidates, folders of them, or `datasets` ids like org/name:split"
    )
    budget: str | int = opt("10%", "rows (500), a share (5%), tokens (2M-tokens), or auto: what the method finds")
    select: dict[str, Scalar] = opt(
        default_factory=lambda: {"method": "cover"}, help="the method and its options, e.g. {method: ccs, score: aum}"
    )
    out: str = opt("selected.parquet", "where the chosen rows go, .parquet or .jsonl, best first")
    fleet: str = opt("", "a fleet that keeps the choice under `name`, in place of `out`")
    name: str = opt("", "its name there: train on it with data.train=selection:<name>")
    features: str = opt("", "column of vectors, or a folder of plures embed; none: the texts' n-grams are hashed")
    text: str = opt("text", "column of texts, where there are no vectors")
    labels: str = opt("", "column of lists of tags, or of weights by tag")
    label_vectors: str = opt(
        "", "rows label, vector: alike labels share (mig); or a folder of plures embed: names are embedded as its rows"
    )
    label_threshold: float = opt(0.9, "the cosine from which on two labels are alike", gt=0.0, le=1.0)
    tokens: str = opt("", "column of token counts, which a budget in tokens needs")
    id: str = opt("", "column that names rows; two rows of one name are an error")
    target: str = opt("", "rows of the target, for methods that need them, with the same columns")
    triplets: str = opt("", "rows anchor, near, far: ids of which somebody said that the first two are more alike")
    judge: str = opt("", "module:function that scores rows given as dictionaries, for methods that ask for scores")
    cells: dict[str, Scalar] = opt(
        default_factory=dict, help="clusters as the group column `cells`, e.g. {method: kmeans, k: 100}"
    )
    at_least: list[str] = opt(default_factory=list, help="quotas like lang=de:5% or source=book:200")
    at_most: list[str] = opt(default_factory=list, help="quotas like source=web:40%")
    shares: str = opt("", "a file of plures weigh: of every source exactly its share of the rows")
    exclude: str = opt("", "rows that are not to be chosen: a file whose column `id` names them")
    include: str = opt("", "rows that are chosen first: a file whose column `id` names them")
    apart: float | None = opt(None, "no two chosen rows have a cosine of this or more", gt=0.0, le=1.0)
    neighbours: int = opt(0, "neighbours of a row in the graph; 0: 3,200,000 over the rows, 64 to 256", ge=0, le=1024)
    probes: int = opt(0, "lists that a row's neighbours are looked for in; 0: 8, of more than 300,000 rows 5", ge=0)
    update: str = opt("", "an earlier choice: its rows stay while they are nearly the best; `id` says which they are")
    report: str = opt("", "a page that shows the choice beside random rows; none: no page")
    epochs: int = opt(3, "epochs that training will have: rs2 in the report draws anew in each", ge=1)
    memory_gb: float = opt(8.0, "a pool that takes more is chosen from cell by cell, where a graph is needed", gt=0)
    cell_rows: int = opt(0, "rows of a cell; 0: the whole pool in memory while it fits, else 200,000", ge=0)
    parts: Literal["similar", "random"] = opt("similar", "what a cell holds; random: GreeDi")
    on: Literal["here", "ray"] = opt("here", "where cells are worked on")
    work: str = opt("", "folder of graphs, cells and large features; none: .plures beside the pool")
    threads: int = opt(1, "threads of the graph's search; the answer does not depend on it", ge=1)
    seed: int = opt(0, "seed of every random number", ge=0)

    def method(self) -> tuple[str, dict[str, Any]]:
        """The method's name and its options; `dynamic` where an earlier choice is updated."""
        rest = dict(self.select)
        name = str(rest.pop("method", "cover"))
        return ("dynamic", {}) if self.update and self.select == {"method": "cover"} else (name, rest)


@dataclass
class EmbedRecipe:
    """`plures embed`: vectors of a pool's rows, in a folder that `plures select features=` reads."""

    pool: str | list[str] = opt(help=".parquet or .jsonl files of rows, or folders of them")
    out: str = opt("", "folder of the vectors; none: the pool's name and .emb")
    text: str = opt("text", "column of texts; with turns, of lists of messages")
    model: str = opt("", "a sentence-transformers model, hub id or folder; none: the texts' n-grams are hashed")
    width: int = opt(256, "numbers of a hashed vector, or of a conversation's", ge=8, le=65536)
    kind: Literal["f16", "int8"] = opt("f16", "how they are kept; int8 takes half the room")
    turns: bool = opt(False, "one vector for a conversation's turns (MUVERA), in place of its text as one")
    batch: int = opt(64, "texts in one pass of the model", ge=1)
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")


@dataclass
class NearRecipe:
    """`plures near`: the rows of a pool that are nearest to a query, by the vectors of plures embed."""

    pool: str | list[str] = opt(help=".parquet or .jsonl files of rows, or folders of them")
    query: str = opt("", "a text; it is embedded as the rows were")
    like: str = opt("", "rows to ask with in place of a query, with the column that was embedded")
    features: str = opt("", "the folder of plures embed; none: the pool's name and .emb")
    k: int = opt(5, "rows for each query", ge=1)
    among: str = opt("", "only rows of this choice, which plures select wrote from the pool")
    exact: bool = opt(False, "compare with every row, without an index; so too below 1,000,000 rows, and with among")
    M: int = opt(16, "links of a row in the index, which is kept for each M and ef_construction", ge=2, le=1024)
    ef_construction: int = opt(128, "rows looked at for the links of a new one", ge=1)
    ef: int = opt(256, "rows looked at for a query, at least k; more finds more of the nearest", ge=1)
    device: str = opt("auto", "where a model embeds the query: auto, cpu, cuda, cuda:1, mps")


@dataclass
class WeighRecipe:
    """`plures weigh`: weights for the sources of training rows, which `plures select shares=` reads."""

    fleet: str = opt(help="the fleet whose base is trained; nothing is published in it")
    rows: str = opt(help="rows to train on: a .jsonl, .parquet or .txt file, a folder of them, or a `datasets` id")
    key: str = opt(help="their column that names each row's source")
    held_out: str = opt(help="rows whose loss the weights are to lower: what the variant is meant for")
    out: str = opt("weights.json", "where the weights go, with every step's losses")
    columns: dict[str, str] = opt(default_factory=dict, help="your names of the columns, e.g. {text: body}")
    adapt: dict[str, Scalar] = opt(
        default_factory=lambda: {"method": "mos"}, help="the method of both models and its options; {method: full}"
    )
    targets: str | list[str] = opt("all-linear", "sites, as in training")
    steps: int = opt(200, "steps of both models and of the weights", ge=1)
    batch_rows: int = opt(4, "windows of every source in one step, and held-out ones", ge=1)
    max_tokens: int = opt(512, "tokens of one window", ge=2)
    packing: bool = opt(True, "fill windows with several rows of a source; false pads each row")
    lr: float = opt(5e-4, "peak learning rate of both models; well below that of training, or noise decides", gt=0.0)
    lr_weights: float = opt(
        3e-2, "peak learning rate of the weights' logarithms, which move by about half of this in a step", gt=0.0
    )
    alpha: float = opt(10.0, "penalty on not having learned what the weights say", gt=0.0)
    base_dtype: Literal["float32", "bfloat16", "float16"] = opt("float32", "dtype of the frozen base")
    autocast: bool = opt(False, "forward passes in bfloat16 where that is safe")
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass to save memory")
    save_every: int = opt(50, "keep what a resume needs every so many steps; 0: never", ge=0)
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    seed: int = opt(0, "seed of every random number", ge=0)

    def method(self) -> tuple[str, dict[str, Any]]:
        """The method's name and its options."""
        rest = dict(self.adapt)
        return str(rest.pop("method", "mos")), rest


@dataclass
class RateRecipe:
    """`plures rate`: numbers about every row, by the base or by variants, as columns for `plures select`."""

    fleet: str = opt(help="the fleet's folder, whose base and variants are asked")
    rows: str | list[str] = opt(
        help="rows: .jsonl, .parquet or .txt files, folders of them, a `datasets` id, or selection:<name> of the fleet"
    )
    variants: list[str] = opt(
        default_factory=list, help="who is asked: names or name@version, base for the base; none: the base alone"
    )
    want: list[Literal["loss", "tokens", "disagreement", "gradients"]] = opt(
        default_factory=lambda: ["loss"], help="the columns, e.g. [loss, tokens]; disagreement is between two variants"
    )
    out: str = opt("rated.parquet", "where all rows go with their new columns, .parquet or .jsonl")
    columns: dict[str, str] = opt(default_factory=dict, help="your names of the columns, e.g. {text: body}")
    max_tokens: int = opt(512, "tokens of one window; longer texts are cut into several, answers are truncated", ge=2)
    batch_rows: int = opt(8, "windows in one forward pass", ge=1)
    width: int = opt(1024, "numbers of a projected gradient", ge=8, le=65536)
    beta: float = opt(0.1, "the dpo loss's beta, for pairs", gt=0.0)
    base_dtype: Literal["float32", "bfloat16", "float16"] = opt("float32", "dtype of the base")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    seed: int = opt(0, "seed of every random number; gradients are compared only where it is the same", ge=0)


@dataclass
class EvolveRecipe:
    """`plures evolve`: search among mixtures of a fleet's variants, several tasks in turn."""

    fleet: str = opt(help="the fleet's folder")
    name: str = opt(help="what the best all-round is called; the best at a task is <name>-<task>")
    variants: list[str] = opt(help="variants that are mixed, two or more, e.g. [support, legal@3]")
    tasks: list[str] = opt(
        default_factory=list, help="files of rows, one for each task, which is called as its file; two or more"
    )
    check: list[str] = opt(
        default_factory=list, help="files of rows for the comparison in the end, one for each task; none: a share"
    )
    check_share: float = opt(0.5, "share of a task's rows that is kept for the comparison", gt=0.0, lt=1.0)
    columns: dict[str, str] = opt(default_factory=dict, help="your names of the columns, e.g. {text: body}")
    generations: int = opt(200, "children that are made and scored", ge=0)
    bins: int = opt(15, "bins of a task's scores, by which elites differ", ge=1)
    spread: float = opt(0.01, "standard deviation of the two parents' weights, which are 1 on average", ge=0.0)
    rate: float = opt(0.1, "most that a singular value grows by in a mutation, as a share of it", ge=0.0)
    mutate: Literal["expert", "own"] = opt(
        "expert", "along whose singular directions: those of the variant that is best at the task, or the child's own"
    )
    rank: int = opt(0, "rank of every mixture; 0: exact, the sum of the variants' ranks", ge=0)
    max_tokens: int = opt(512, "tokens of one window", ge=2)
    batch_rows: int = opt(8, "windows in one forward pass", ge=1)
    base_dtype: Literal["float32", "bfloat16", "float16"] = opt("float32", "dtype of the base")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    save_every: int = opt(10, "keep what a resume needs every so many generations; 0: at the end only", ge=0)
    run: str = opt("", "folder of the search; none: <fleet>/runs/evolve-<name>-<hash of what decides it>")
    seed: int = opt(0, "seed of every random number", ge=0)


@dataclass
class PackRecipe:
    """`plures pack`: a fleet's variants in fewer bytes, in a fleet of their own."""

    fleet: str = opt(help="the fleet whose variants are packed; it is only read")
    out: str = opt("", "the fleet that they go to, made where it is not there; none: beside it, .packed.fleet")
    variants: list[str] = opt(
        default_factory=list, help="which, e.g. [support, legal@3]; none: the latest of all, and those with aliases"
    )
    pack: dict[str, Scalar] = opt(
        default_factory=lambda: {"method": "klt"}, help="the packer and its options, e.g. {method: klt, error: 0.05}"
    )
    held_out: str = opt("", "rows to score on, with {name} for the variant's name; none: no scores")
    recovery: float = opt(
        0.985, "share of a variant's gain on held-out rows that must be left; no finer than that", ge=0.0, le=1.0
    )
    metric: str = opt(
        "", "rows that say which errors matter, by the base's inputs and gradients; {name} for the variant's name"
    )
    metric_tokens: int = opt(65_536, "tokens of these rows that are read", ge=1)
    refit: bool = opt(False, "fit to all variants anew, where packed ones are there already")
    compare: bool = opt(False, "also say what int8, int4 and SVD would take")

    def method(self) -> tuple[str, dict[str, Any]]:
        """The packer's name and its options."""
        rest = dict(self.pack)
        return str(rest.pop("method", "klt")), rest


RECIPES: dict[str, type] = {
    "train": TrainRecipe, "bench": BenchRecipe, "select": SelectRecipe, "embed": EmbedRecipe, "near": NearRecipe,
    "weigh": WeighRecipe, "rate": RateRecipe, "evolve": EvolveRecipe,
    "pack": PackRecipe,
}  # fmt: skip
"""By verb, for `plures recipe <verb>`."""
