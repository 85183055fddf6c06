"""Finding one's way in the schema: which section lies at a path, and what an unknown key was meant to be."""

import difflib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, get_args

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from sparsetrain.config.base import Section, one_or_many
from sparsetrain.config.origin import KeyPath
from sparsetrain.config.run import RunConfig

_OTHER_NAMES = {
    "accumulation": "train.micro_batch_size",
    "batch_size": "train.batch_tokens, which is in tokens",
    "betas1": "optimizer.betas",
    "clip": "optimizer.grad_clip",
    "context_length": "data.seq_len",
    "d_ff": "model.ffn_dim",
    "d_model": "model.dim",
    "dataset": "data.source",
    "dtype": "train.precision",
    "epochs": "train.tokens, which is in tokens",
    "gpus": "cluster.gpus_per_worker",
    "gradient_clipping": "optimizer.grad_clip",
    "hidden_size": "model.dim",
    "intermediate_size": "model.ffn_dim",
    "learning_rate": "optimizer.lr",
    "max_grad_norm": "optimizer.grad_clip",
    "max_seq_len": "data.seq_len",
    "max_steps": "train.tokens, which is in tokens",
    "n_embd": "model.dim",
    "n_head": "model.num_heads",
    "n_layer": "model.num_layers",
    "nproc": "cluster.workers",
    "num_attention_heads": "model.num_heads",
    "num_hidden_layers": "model.num_layers",
    "num_steps": "train.tokens, which is in tokens",
    "num_workers": "cluster.workers",
    "output_dir": "output",
    "resume": "--resume, an option of the command line",
    "save_every": "checkpoint.every_steps",
    "sequence_length": "data.seq_len",
    "warmup_ratio": "optimizer.schedule.warmup",
    "warmup_steps": "optimizer.schedule.warmup, which is a fraction of the tokens",
    "world_size": "cluster.workers",
    "zero_stage": "parallel.shard",
}
"""What other trainers call a thing of ours."""


def section_at(path: KeyPath, raw: Any, top: type[Section] = RunConfig) -> type[Section] | None:
    """The class of the section at `path`, with the `kind`s that `raw` chooses; None where there is no one section."""
    node, choices = raw, [top]
    for element in path:
        if isinstance(element, int):
            node = node[element] if isinstance(node, list | tuple) and element < len(node) else None
            continue
        section = _choose(choices, node)
        if section is None or element not in section.model_fields:
            return None
        node = node.get(element) if isinstance(node, dict) else None
        choices = sections_in(section.model_fields[element].annotation)
    return _choose(choices, node)


def is_list(path: KeyPath, raw: Any) -> bool:
    """Whether the schema allows a list at `path`."""
    field = _field_at(path, raw)
    return field is not None and "tuple[" in str(field.annotation)


def is_one_or_many(path: KeyPath, raw: Any) -> bool:
    """Whether the schema allows at `path` a list as well as one item of it alone."""
    field = _field_at(path, raw)
    marks = field.metadata if field else []
    return any(isinstance(mark, BeforeValidator) and mark.func is one_or_many for mark in marks)


def _field_at(path: KeyPath, raw: Any) -> FieldInfo | None:
    parent = section_at(path[:-1], raw)
    return parent.model_fields.get(str(path[-1])) if parent else None


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a type speaks of, through unions, tuples and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def kinds_of(sections: list[type[Section]]) -> dict[str, type[Section]]:
    """The sections of a union, by their `kind`."""
    return {
        kind: section
        for section in sections
        if "kind" in section.model_fields
        for kind in get_args(section.model_fields["kind"].annotation)
    }


def suggest_key(path: KeyPath, raw: Any, top: type[Section] = RunConfig) -> str:
    """Say what the unknown key at `path` was probably meant to be."""
    section, key = section_at(path[:-1], raw, top), str(path[-1])
    if top is RunConfig and key in _OTHER_NAMES:
        return f"here it is called {_OTHER_NAMES[key]}"
    known = list(section.model_fields) if section else []
    near, elsewhere = nearest(key, known), _places().get(key, []) if top is RunConfig else []
    if near or elsewhere:
        return f"did you mean {' or '.join(filter(None, [near, *elsewhere[:2]]))}?"
    far = nearest(key, _places(), cutoff=0.8) if top is RunConfig else None
    if far:
        return f"did you mean {_places()[far][0]}?"
    return f"known keys are {', '.join(known)}"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `known` that is spelled most like `word`, if any is."""
    word = word.lower().replace("-", "_")
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


@cache
def _places() -> dict[str, list[str]]:
    """Where each key stands in the schema; keys that stand everywhere, such as `kind`, are left out."""
    places: dict[str, list[str]] = {}
    for dotted_key in _walk(RunConfig, ""):
        places.setdefault(dotted_key.rpartition(".")[2], []).append(dotted_key)
    return {key: found for key, found in places.items() if len(found) <= 3 and key not in ("kind", "name")}


def _walk(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if prefix.startswith("train.phases") and name in ("data", "optimizer", "sparsity"):
            continue  # a phase repeats what the run has
        yield prefix + name
        inside = prefix + name + ("." if "tuple[" not in str(field.annotation) else ".0.")
        seen = set()
        for child in sections_in(field.annotation):
            for key in _walk(child, inside):
                if key not in seen:
                    seen.add(key)
                    yield key


def _choose(choices: list[type[Section]], node: Any) -> type[Section] | None:
    if len(choices) == 1:
        return choices[0]
    kind = node.get("kind") if isinstance(node, dict) else node
    return kinds_of(choices).get(kind) if isinstance(kind, str) else None
