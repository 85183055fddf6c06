"""Small complete runs for tests: a config on text of our own, and what a finished run folder says."""

import json
from pathlib import Path
from typing import Any

from sparsetrain.config import RunConfig

WORDS = "the of and to in is you that it he was for on are as with his they at be this have from".split()  # noqa: SIM905


def write_corpus(folder: Path) -> Path:
    """Some twenty documents of predictable text."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(24):
        words = [WORDS[(number * 7 + place * place + place // 3) % len(WORDS)] for place in range(160)]
        (folder / f"{number:02}.txt").write_text(" ".join(words))
    return folder


def tiny_config(folder: Path, **changes: Any) -> RunConfig:
    """A run of 12 steps in two phases, sparse then dense, on `folder`/corpus; `changes` are merged by dotted key."""
    source = {"kind": "text", "paths": [str(folder / "corpus" / "*.txt")]}
    config: dict[str, Any] = {
        "name": "tiny",
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24},
        "sparsity": [
            {
                "params": ["*.attention.*", "*.ffn.*"],
                "method": "prune",
                "distribution": "global",
                "sparsity": 0.75,
                "schedule": {"kind": "geometric", "every_steps": 2},
            }
        ],
        "data": {"source": source, "seq_len": 32, "holdout": 0.1, "cache": str(folder / "cache")},
        "optimizer": {"lr": 1e-2, "schedule": {"warmup": 0.1}},
        "train": {
            "tokens": 8 * 256,
            "batch_tokens": 256,
            "micro_batch_size": 1,
            "eval_every_steps": 4,
            "eval_tokens": 512,
            "sample_tokens": 8,  # each takes a forward pass, on several ranks longer than a step
            "phases": [{"name": "finetune", "tokens": 4 * 256, "sparsity": []}],
        },
        "checkpoint": {"every_steps": 5},
        "output": str(folder / "run"),
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = config
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return RunConfig.model_validate(config)


def rows_of(output: str | Path) -> list[dict[str, Any]]:
    """The rows of a run folder's metrics.jsonl."""
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def losses_of(output: str | Path) -> list[float]:
    """The loss of every step."""
    return [row["loss"] for row in rows_of(output)]
