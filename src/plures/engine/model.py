"""Load a base and find its sites. Weights are safetensors only, from a local folder or a hub id."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as quiet

from plures.core.errors import BadInput, Unreachable, WrongUse, disk, nearest
from plures.engine.ask import Prompt
from plures.engine.prompts import prompt_ids
from plures.tensors.safe import header, refuse_pickle
from plures.tensors.site import Site, natural
from plures.tensors.variant import BaseRef
from plures.tensors.weights import INDEX, files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLES, _SAMPLE_BYTES = 16, 1024


@dataclass
class Base:
    """A loaded base: the model, its tokenizer, and what identifies it."""

    model: Any  # a transformers PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ref: BaseRef
    folder: Path


def locate(name: str, revision: str = "") -> Path:
    """The local folder of a base: `name` itself, or a snapshot of the hub id `name`.

    Raises: BadInput for a folder without config.json; Unreachable where the hub does not answer.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"{name!r} is no model folder: it has no config.json")
        return path
    strange = f"base {name!r} is neither a folder here nor a hub id like 'org/model'"
    if path.is_absolute():
        raise BadInput(f"{strange}. Where a fleet's base was moved: plures init FLEET --base ITS-NEW-FOLDER")
    if name.startswith((".", "~")) or name.count("/") > 1 or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name):
        raise BadInput(strange)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except HFValidationError as error:
        raise BadInput(strange) from error
    except RepositoryNotFoundError as error:
        raise BadInput(f"base {name!r} is neither a folder here nor a model on the hub (or it is private)") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise Unreachable(
            f"cannot fetch base {name!r}: the hub is unreachable and no copy is cached; "
            "give a local folder, or try again online"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a base, as `tensors.weights.files` finds them.

    Raises: BadInput where there are none, one is missing or in another folder, or the weights are pickles.
    """
    if not (folder / INDEX).is_file() and not any(folder.glob("*.safetensors")):
        for pickle in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*")):
            refuse_pickle(pickle)
        raise BadInput(f"base {str(folder)!r} has no weights: no .safetensors file in it")
    return files(folder)


def fingerprint(folder: Path) -> str:
    """SHA-256 over every weight's name, dtype, shape and 16 evenly spaced kilobytes of its bytes, in hex.

    Independent of how tensors are spread over files. Sampling keeps it quick on large bases (a 7B has ~300 tensors:
    about 5 MB are read) and still tells two trained models apart, because training moves every tensor; it is no
    proof against a forger, for which compare files.
    """
    rows = []
    for path in weight_files(folder):
        found = header(path)
        with disk(path, "read"), path.open("rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            for name in (n for n in found if n != "__metadata__"):
                begin, end = found[name]["data_offsets"]
                digest = hashlib.sha256()
                for i in range(_SAMPLES):
                    f.seek(start + begin + max(0, end - begin - _SAMPLE_BYTES) * i // max(1, _SAMPLES - 1))
                    digest.update(f.read(min(_SAMPLE_BYTES, end - begin)))
                rows.append(f"{name}|{found[name]['dtype']}|{found[name]['shape']}|{digest.hexdigest()}")
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def reference(name: str, revision: str = "") -> BaseRef:
    """What identifies the base at `name`, weights' fingerprint included."""
    folder = locate(name, revision)
    local = Path(name).expanduser().is_dir()
    return BaseRef(str(folder.resolve()) if local else name, revision, fingerprint(folder))


def load_tokenizer(ref: BaseRef, *, check: bool = True) -> Base:
    """A base without its model: what prompts are encoded with.

    Raises: BadInput where the weights are not those of `ref.hash`, or the folder is damaged.
    """
    folder = locate(ref.name, ref.revision)
    weight_files(folder)
    if check and ref.hash and fingerprint(folder) != ref.hash:
        raise BadInput(f"base {ref.name!r} is not the one this fleet was made for: its weights have changed. "
                       "Point the fleet at the original, or begin a new fleet.")  # fmt: skip
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadInput(f"base {ref.name!r} cannot be loaded: {_first_sentence(error)}") from error
    return Base(None, tokenizer, ref, folder)


def load_base(ref: BaseRef, *, dtype: str = "float32", device: str = "cpu", check: bool = True) -> Base:
    """Load a causal language model and its tokenizer.

    Raises: BadInput where the weights are not those of `ref.hash`, the folder is damaged, or is no causal LM.
    """
    if dtype not in DTYPES:
        raise WrongUse(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    base = load_tokenizer(ref, check=check)
    quiet.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            base.folder, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadInput(f"base {ref.name!r} cannot be loaded: {_first_sentence(error)}") from error
    lacking = sorted(report["missing_keys"])
    if lacking:  # transformers would make them up at random
        raise BadInput(f"base {ref.name!r} lacks the weight {lacking[0]!r} ({len(lacking)} in all): its files are of "
                       "another model than its config.json")  # fmt: skip
    return Base(model.to(device).eval(), base.tokenizer, ref, base.folder)


def empty_base(ref: BaseRef) -> Any:
    """The base's architecture on the meta device: shapes without weights, for plans."""
    try:
        config = AutoConfig.from_pretrained(locate(ref.name, ref.revision), trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"base {ref.name!r} cannot be read: {_first_sentence(error)}") from error


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:240] or type(error).__name__


def linear_names(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Every linear map of `model` but its output head, as `{name: (out, into)}`."""
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    out = {}
    for name, module in model.named_modules():
        if module is head or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        rows, columns = module.weight.shape
        out[name] = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    return out


def find_sites(model: nn.Module, targets: str | Sequence[str] = "all-linear", layers: Sequence[int] = ()) -> list[Site]:
    """The sites that `targets` names, in the order of their layers.

    `targets` is "all-linear" (every linear map but the output head), a list of names or endings of names
    (`["q_proj", "v_proj"]`), or a regular expression for whole names. `layers` keeps only these layer numbers.

    Raises: WrongUse for a target or layer that matches nothing; every listed target must match.
    """
    found = linear_names(model)
    if targets == "all-linear":
        names = list(found)
    elif isinstance(targets, str):
        try:
            names = [n for n in found if re.fullmatch(targets, n)]
        except re.error as error:
            raise WrongUse(f"targets {targets!r} is neither 'all-linear' nor a regular expression: {error}") from error
        if not names:
            raise WrongUse(f"targets {targets!r} matches no site; this base has {_endings(found)}")
    else:
        names = []
        for target in targets:
            hits = [n for n in found if n == target or n.endswith("." + target)]
            if not hits:
                near = nearest(target, {n.rpartition(".")[2] for n in found})
                raise WrongUse(f"target {target!r} matches no site.{near} This base has {_endings(found)}")
            names += [n for n in hits if n not in names]
    if layers:
        numbers = {n: [int(p) for p in n.split(".") if p.isdigit()][:1] for n in names}
        have = sorted({i for v in numbers.values() for i in v})
        for layer in layers:
            if layer not in have:
                raise WrongUse(f"layers: {layer} is not a layer of this base, which has {have[0] if have else '?'} to "
                               f"{have[-1] if have else '?'}")  # fmt: skip
        names = [n for n in names if numbers[n] and numbers[n][0] in layers]
    return [Site(n, *found[n]) for n in sorted(names, key=natural)]


def _endings(found: Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(sorted({n.rpartition(".")[2] for n in found}))


def encode_prompt(base: Base, prompt: Prompt) -> list[int]:
    """Token ids of a text, or of messages through the tokenizer's chat template.

    Raises: WrongUse for messages to a base without a template, or that the template refuses.
    """
    return prompt_ids(prompt, base.tokenizer, base.ref.name)


def ends_of(base: Base) -> frozenset[int]:
    """Token ids that end an answer: those of the model's generation settings, else the tokenizer's."""
    ends = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
    ends = ends if ends is not None else getattr(base.tokenizer, "eos_token_id", None)
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
