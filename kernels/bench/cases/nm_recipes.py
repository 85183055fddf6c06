"""What n:m recipes cost in quality: the same tokens of real text by each of them, at several patterns, and dense.

Whole runs by the training loop, on the source of Python's standard library; a sample of the table is a seed, which
decides the weights and the order of the text, alike for all runs of it. Held-out loss is that of the model as it is
exported: n:m. All matrices of attention and feed-forward layers are sparse. Runs are far shorter than the papers'.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bench.registry import Bench, Row, case
from sparsetrain.config import RunConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEQ_LEN, BATCH_TOKENS, STEPS = 128, 1024, 192
METHODS = ("ste", "sr_ste", "mdgf", "sdgf", "bdwp")
PATTERNS = ("2:4", "1:8", "1:16")


def _plots(rows: Sequence[Row]) -> "dict[str, Figure]":
    """Loss by pattern: for each method a line through the medians, and a mark for each seed."""
    from statistics import median

    from matplotlib.figure import Figure

    dense = rows[0].ours
    runs = {(row.details["method"], row.details["pattern"]): row.ours for row in rows[1:]}
    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    patterns = [str(pattern) for pattern in dict.fromkeys(pattern for _, pattern in runs)]
    axes.axhline(median(dense), color="#444444", linestyle="--", label="dense")
    for colour, method in enumerate(METHODS):
        places = [at + 0.1 * (colour - 2) for at in range(len(patterns))]
        losses = [runs[method, pattern] for pattern in patterns]
        axes.plot(places, [median(found) for found in losses], color=f"C{colour}", label=method)
        for place, found in zip(places, losses, strict=True):
            axes.scatter([place] * len(found), found, color=f"C{colour}", s=12)
    axes.set_xticks(range(len(patterns)), patterns)
    axes.set_ylabel("held-out bits per byte")
    axes.set_title(f"n:m recipes after {STEPS * BATCH_TOKENS:,} tokens, {len(dense)} seeds", loc="left", fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return {"nm_recipes": figure}


@case(
    "nm_recipes",
    "held-out loss of n:m recipes at equal tokens over dense: STE, SR-STE, MdGf, SdGf, BDWP",
    plots=_plots,
)
def nm_recipes(bench: Bench) -> Iterator[Row]:
    seeds, steps, patterns = (1, 16, PATTERNS[:2]) if bench.quick else (3, STEPS, PATTERNS)
    runs: dict[tuple[str, str], list[float]] = {("dense", "dense"): []}
    runs |= {(method, pattern): [] for pattern in patterns for method in METHODS}
    with TemporaryDirectory() as folder:
        for seed in range(seeds):
            for (method, pattern), losses in runs.items():
                name = f"{method}-{pattern.replace(':', '-')}"
                losses.append(_train(_config(Path(folder) / f"{name}-{seed}", method, pattern, seed, steps)))
    dense = runs.pop(("dense", "dense"))
    tokens = steps * BATCH_TOKENS
    yield Row(
        "dense",
        dense,
        unit="bits/byte",
        note=f"held out, after {tokens:,} tokens",
        details={"method": "dense", "pattern": "dense"},
    )
    for (method, pattern), losses in runs.items():
        excess = sorted(ours - base for ours, base in zip(losses, dense, strict=True))
        note = f"{excess[len(excess) // 2]:+.3f} bits/byte over dense"
        details = {"method": method, "pattern": pattern}
        yield Row(f"{method} {pattern}", losses, dense, "dense", unit="bits/byte", note=note, details=details)


def _train(config: RunConfig) -> float:
    from sparsetrain.training import train

    return float(train(config)["eval_bits_per_byte"])


def _config(output: Path, method: str, pattern: str, seed: int, steps: int) -> RunConfig:
    rule: dict[str, Any] = {"params": ["*.attention.*", "*.ffn.*"], "method": method, "pattern": pattern}
    return RunConfig.model_validate(
        {
            "name": output.name,
            "seed": seed,
            "model": {"dim": 128, "num_layers": 2, "num_heads": 4, "ffn_dim": 384},
            "data": {
                "source": {"kind": "python-stdlib", "part": "code"},
                "tokenizer": {"kind": "bpe", "vocab_size": 1024},
                "seq_len": SEQ_LEN,
                "holdout": 0.02,
            },
            "sparsity": [] if method == "dense" else [rule],
            "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "schedule": {"kind": "cosine", "warmup": 0.1}},
            "train": {
                "tokens": steps * BATCH_TOKENS,
                "batch_tokens": BATCH_TOKENS,
                "micro_batch_size": BATCH_TOKENS // SEQ_LEN,
                "eval_every_steps": steps,
                "eval_tokens": 256 * SEQ_LEN,
            },
            "checkpoint": {"every_steps": steps, "keep": 1},
            "output": str(output),
        }
    )
