"""What a run would take, told from its YAML alone: the mesh, the model's size, bytes a rank holds, FLOPs."""

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from sparsetrain.config import RunConfig, check_world
from sparsetrain.engines.deepspeed_config import deepspeed_config
from sparsetrain.models import Transformer
from sparsetrain.planning.flops import ModelFlops, ParameterCount, parameter_counts
from sparsetrain.planning.rank_bytes import RankBytes, mesh_of, rank_bytes
from sparsetrain.sharding import weight_shapes
from sparsetrain.sparsity import describe_parameters, match_rules
from sparsetrain.training.attention_check import check_attention
from sparsetrain.training.checks import vocab_size_of
from sparsetrain.training.formatting import percent, quantity, scaled
from sparsetrain.training.phase_plan import plan_phases
from sparsetrain.training.setup import max_seq_len, vocab_rows


@dataclass(frozen=True)
class PhaseCost:
    """What a phase computes, once its rules are where they go."""

    name: str
    steps: int
    tokens: int
    density: float
    """Share of the weights in layers' matrices that are not zero at the phase's last sparsity."""
    dense_flops_per_token: float
    """Of forward and backward pass."""
    flops_per_token: float
    """The same, products with zeros not counted: what masked dense matmuls compute all the same."""


@dataclass(frozen=True)
class Plan:
    """What a run would take."""

    world_size: int
    mesh: dict[str, int]
    """Sizes by name."""
    parameters: ParameterCount
    bytes_a_rank: RankBytes
    phases: tuple[PhaseCost, ...]


def plan_run(config: RunConfig) -> Plan:
    """Lay a run over cluster.workers ranks without any of them: its model is built on the meta device.

    Neither the engine's library nor the text is needed, so this works on any machine.

    Raises:
        ConfigError: The run does not fit its ranks or its engine, or its rules not the model.
        DataError: The tokenizer's file is missing or damaged.
    """
    world_size = config.cluster.workers
    check_world(config, world_size)
    deepspeed_config(config)
    check_attention(config)
    with torch.device("meta"):
        model = Transformer(config.model, vocab_rows(config, vocab_size_of(config)), max_seq_len(config))
    return Plan(
        world_size=world_size,
        mesh=mesh_of(config.parallel, world_size),
        parameters=parameter_counts(model),
        bytes_a_rank=rank_bytes(config, world_size, weight_shapes(model)),
        phases=tuple(_phase_costs(config, model)),
    )


def _phase_costs(config: RunConfig, model: Transformer) -> list[PhaseCost]:
    parameters = describe_parameters(model)
    densities: dict[str, float] = {}
    costs = []
    for plan in plan_phases(config):
        if plan.phase.sparsity != "keep":
            key = f"train.phases.{plan.index - 1}.sparsity" if plan.index else "sparsity"
            owned = match_rules(plan.phase.sparsity, parameters, key=key)
            densities = {
                weight.name: 1 - rule.sparsity
                for rule, weights in zip(plan.phase.sparsity, owned, strict=True)
                for weight in weights
            }
        flops = ModelFlops.of(model, plan.seq_len)
        nonzero = sum(size * densities.get(name, 1.0) for name, size in flops.sizes.items())
        costs.append(
            PhaseCost(
                name=plan.phase.name,
                steps=plan.num_steps,
                tokens=plan.num_tokens,
                density=nonzero / flops.num_linear_parameters,
                dense_flops_per_token=flops.train_per_token(),
                flops_per_token=flops.train_per_token(densities),
            )
        )
    return costs


def print_plan(config: RunConfig, console: Console) -> None:
    """Print what a run would take; raises what `plan_run` does."""
    plan = plan_run(config)
    held = plan.bytes_a_rank
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if name != "expert")
    if "expert" in plan.mesh:
        mesh += f"; experts over {plan.mesh['expert']} ranks each"
    rows = (
        ("engine", config.parallel.engine),
        ("ranks", f"{plan.world_size}: {mesh}"),
        ("parameters", f"{scaled(plan.parameters.total)}, of which a token uses {scaled(plan.parameters.active)}"),
        (
            "bytes a rank",
            f"{quantity(held.total, 'B')}: weights {quantity(held.weights, 'B')}, gradients "
            f"{quantity(held.gradients, 'B')}, optimizer {quantity(held.optimizer, 'B')}; activations come on top",
        ),
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=12, no_wrap=True)
    table.add_column()
    for label, text in rows:
        table.add_row(f" {label}", text)
    console.print(table)
    console.print(_phase_table(plan))


def _phase_table(plan: Plan) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2))
    table.add_column(" phase")
    for name in ("steps", "tokens", "density", "FLOPs a token", "without zeros", "FLOPs in all"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in plan.phases:
        table.add_row(
            f" {phase.name}",
            str(phase.steps),
            scaled(phase.tokens),
            percent(phase.density),
            scaled(phase.dense_flops_per_token),
            scaled(phase.flops_per_token),
            f"{phase.dense_flops_per_token * phase.tokens:.2e}",
        )
    return table
