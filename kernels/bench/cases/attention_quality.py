"""What sparse attention costs in quality and gains in time: the same tokens of real text through three attentions.

Whole runs by the training loop, of samples of 2048 tokens of the source of Python's standard library; a sample of the
table is a seed, which decides the weights and the order of the text, alike for all three. Sparse layers are the last
three of four. Time is the processor's, of all threads: in its minutes a run seldom has a machine to itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import TYPE_CHECKING, Any

from bench.registry import Bench, Row, case
from sparsetrain.config import RunConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEQ_LEN, BATCH_TOKENS, STEPS = 2048, 4096, 32
_NEAR = {"kind": "local", "width": 2}
_ATTENTIONS: dict[str, list[dict[str, Any]] | None] = {
    "dense": None,
    "S2": [{"kind": "union", "of": [_NEAR, {"kind": "strided", "stride": 8}]}],
    "local + sink": [{"kind": "union", "of": [_NEAR, {"kind": "sink", "width": 1}]}],
}
_COLOURS = {"dense": "#444444", "S2": "#1F77B4", "local + sink": "#D95F02"}


@dataclass(frozen=True)
class _Outcome:
    bits_per_byte: float
    """Of held-out text, after the last step."""
    cpu_s: float
    """Processor time of all steps."""


def _plots(rows: Sequence[Row]) -> dict[str, "Figure"]:
    """Held-out loss over time, a mark for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for losses, seconds in zip(rows[::2], rows[1::2], strict=True):
        name = losses.name.partition(",")[0]
        axes.scatter(seconds.ours, losses.ours, color=_COLOURS[name], label=name)
    axes.scatter(rows[1].peer, rows[0].peer, color=_COLOURS["dense"], label="dense")
    axes.set_xlim(left=0)
    axes.set_xlabel(f"CPU seconds of training, {STEPS * BATCH_TOKENS:,} tokens")
    axes.set_ylabel("held-out bits per byte")
    axes.set_title(f"Attention over {SEQ_LEN} tokens, {len(rows[0].ours)} seeds", loc="left", fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return {"seconds": figure}


@case(
    "attention_quality",
    "held-out loss and CPU seconds at equal tokens: S2 and local + sink over dense, 2048 tokens",
    plots=_plots,
)
def attention_quality(bench: Bench) -> Iterator[Row]:
    seeds, steps = (1, 2) if bench.quick else (3, STEPS)
    outcomes: dict[str, list[_Outcome]] = {name: [] for name in _ATTENTIONS}
    with TemporaryDirectory() as folder:
        for seed in range(seeds):
            for name, found in outcomes.items():  # one seed's runs one after the other: whatever slows the machine
                found.append(_train(_config(Path(folder) / f"{name}-{seed}", name, seed, steps)))
    dense = outcomes.pop("dense")
    for name, found in outcomes.items():
        flops = _share_of_flops(_config(Path(), name, 0, steps))
        note = f"{flops:.0%} of the FLOPs of the dense model, {_share_of_keys(name):.0%} of the keys in sparse layers"
        losses, of_dense = [run.bits_per_byte for run in found], [run.bits_per_byte for run in dense]
        yield Row(f"{name}, held out", losses, of_dense, "dense", unit="bits/byte", note=note)
        yield Row(f"{name}, CPU seconds", [run.cpu_s for run in found], [run.cpu_s for run in dense], "dense")


def _train(config: RunConfig) -> _Outcome:
    from sparsetrain.training import train
    from sparsetrain.training.events import EvalDone, Event, StepDone

    marks: dict[type[Event], list[float]] = {EvalDone: [], StepDone: []}

    def mark(event: Event) -> None:
        if type(event) in marks:
            marks[type(event)].append(process_time())

    summary = train(config, reporter=mark)
    return _Outcome(summary["eval_bits_per_byte"], marks[StepDone][-1] - marks[EvalDone][0])  # none in between


def _config(output: Path, name: str, seed: int, steps: int) -> RunConfig:
    heads = _ATTENTIONS[name]
    attention = "dense" if heads is None else {"kind": "block_sparse", "heads": heads, "layers": [1, 2, 3]}
    return RunConfig.model_validate(
        {
            "name": name.replace(" + ", "-"),
            "seed": seed,
            "model": {"dim": 128, "num_layers": 4, "num_heads": 8, "ffn_dim": 384, "attention": attention},
            "data": {
                "source": {"kind": "python-stdlib", "part": "code"},
                "tokenizer": {"kind": "bpe", "vocab_size": 2048},
                "seq_len": SEQ_LEN,
                "holdout": 0.02,
            },
            "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "schedule": {"kind": "cosine", "warmup": 0.1}},
            "train": {
                "tokens": steps * BATCH_TOKENS,
                "batch_tokens": BATCH_TOKENS,
                "micro_batch_size": 2,
                "precision": "bf16",
                "eval_every_steps": steps,
                "eval_tokens": 8 * SEQ_LEN,
            },
            "output": str(output),
        }
    )


def _share_of_flops(config: RunConfig) -> float:
    import torch

    from sparsetrain.models import Transformer
    from sparsetrain.planning.flops import ModelFlops

    with torch.device("meta"):
        flops = ModelFlops.of(Transformer(config.model, 2048, SEQ_LEN), SEQ_LEN)
    return flops.train_per_token() / (flops.train_per_token() + flops.attention_saved_per_token)


def _share_of_keys(name: str) -> float:
    from sparsetrain.planning.attention_flops import keys_per_query

    return keys_per_query(_config(Path(), name, 0, STEPS).model, SEQ_LEN)[-1] / ((SEQ_LEN + 1) / 2)
