"""Runs by n:m recipes: a resumed one is bitwise the whole one, and what is evaluated is what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sparsetrain_kernels.nm_linear import NMPattern, magnitude_mask

from sparsetrain.config import RunConfig, load_config
from sparsetrain.training import TrainedRun, evaluate_run, train
from sparsetrain.training.events import CheckpointSaved, Event

STEPS = 6


def config(tmp_path: Path, name: str, rule: dict[str, Any]) -> RunConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the weight {n} of {n * 7 % 13} is seen.\n\n" for n in range(900)))
    path = tmp_path / f"{name}.yaml"
    run = {
        "name": name,
        "model": {"dim": 32, "num_layers": 1, "num_heads": 2},
        "data": {"source": {"kind": "text", "paths": [str(text)], "separator": "\n\n"}, "seq_len": 32, "holdout": 0.1},
        "sparsity": [{"params": ["*.ffn.*", "*.attention.*"], **rule}],
        "train": {
            "tokens": STEPS * 256,
            "batch_tokens": 256,
            "micro_batch_size": 4,
            "precision": "bf16",
            "eval_every_steps": 3,
            "eval_tokens": 512,
        },
        "checkpoint": {"every_steps": 3, "keep": 5},
        "output": str(tmp_path / name),
    }
    path.write_text(yaml.safe_dump(run))
    return load_config(path)


class Stop(Exception):
    pass


def stop_in_the_middle(event: Event) -> None:
    if isinstance(event, CheckpointSaved) and event.step == 3:
        raise Stop


@pytest.mark.parametrize(
    "rule",
    [
        {"method": "sr_ste", "pattern": "1:8", "mask_decay": 0.1, "refresh_every_steps": 2},
        {"method": "mdgf", "pattern": "1:8"},
    ],
    ids=lambda rule: rule["method"],
)
def test_a_run_resumed_inside_a_phase_ends_bitwise_equal_and_evaluates_what_it_saw(
    tmp_path: Path, rule: dict[str, Any]
) -> None:
    whole = config(tmp_path, "whole", rule)
    train(whole)
    stopped = config(tmp_path, "stopped", rule)
    with pytest.raises(Stop):
        train(stopped, reporter=stop_in_the_middle)
    evals = (Path(stopped.output) / "evals.jsonl").read_text().splitlines()
    seen_in_training = json.loads(evals[-1])["loss"]
    (inside,) = evaluate_run(Path(stopped.output)).values()

    train(stopped, on_existing="resume")

    assert inside.loss == pytest.approx(seen_in_training, rel=5e-3)  # bf16 there, fp32 here
    one, other = (TrainedRun.load(Path(run.output)).model for run in (whole, stopped))
    for (name, weight), again in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, again), name
        if ".ffn." in name or ".attention." in name:
            m = int(str(rule["pattern"])[2:])
            n = int(str(rule["pattern"])[0])
            assert int(weight.view(-1, m).count_nonzero(1).max()) <= n


def test_a_recipe_begins_with_masks_of_the_weights_that_it_starts_from(tmp_path: Path) -> None:
    start = config(tmp_path, "recipe", {"method": "ste", "pattern": "1:4"})
    dense = RunConfig.model_validate(start.model_dump() | {"sparsity": [], "output": str(tmp_path / "dense")})
    train(dense)
    changes = {"train": start.train.model_dump() | {"init_from": dense.output}, "optimizer": {"lr": 1e-12}}
    recipe = RunConfig.model_validate(start.model_dump() | changes)

    train(recipe)

    begun, seen = (TrainedRun.load(Path(run.output)).model for run in (dense, recipe))
    for (name, weight), found in zip(begun.named_parameters(), seen.parameters(), strict=True):
        if ".ffn." in name or ".attention." in name:
            weight = torch.where(magnitude_mask(weight, NMPattern(1, 4)), weight, 0)
        torch.testing.assert_close(found, weight, msg=name)
