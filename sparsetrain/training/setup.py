"""What stands between a checked config and the first step: sizes, the engine, and the machine's peak."""

import torch

from sparsetrain.checkpoint.agreement import on_every_rank
from sparsetrain.config import RunConfig
from sparsetrain.data import Tokenizer
from sparsetrain.engines import DeepSpeedEngine, Engine, TorchEngine, require_megatron
from sparsetrain.engines.megatron_support import keep_megatron_quiet
from sparsetrain.errors import ConfigError, PlacementError
from sparsetrain.models import padded_vocab
from sparsetrain.models.transformer import TransformerLayer
from sparsetrain.moe import Experts
from sparsetrain.moe.placement.memory import ExpertBytes, check_slots
from sparsetrain.parallel import World
from sparsetrain.planning.hardware import measured_matmul_peak
from sparsetrain.training.formatting import quantity
from sparsetrain.training.memory import free_memory_bytes
from sparsetrain.training.phase_plan import plan_phases


def vocab_rows(config: RunConfig, tokenizer_vocab_size: int) -> int:
    """Rows of the embedding: model.vocab_size, or the tokenizer's size rounded up.

    Raises:
        ConfigError: The tokenizer has more tokens than model.vocab_size.
    """
    rows = config.model.vocab_size
    if rows is None:
        return padded_vocab(tokenizer_vocab_size)
    if rows < tokenizer_vocab_size:
        raise ConfigError(
            f"model.vocab_size = {rows}: the tokenizer has {tokenizer_vocab_size} tokens; write at least that, or "
            "remove the key"
        )
    return rows


def max_seq_len(config: RunConfig) -> int:
    """Longest sample of any phase, in tokens."""
    return max(phase.data.seq_len for phase in config.phases)


def engine_of(config: RunConfig) -> type[TorchEngine]:
    """The class of the config's engine.

    Raises:
        ConfigError: It is Megatron, and that is not installed, or cannot run on the run's device.
    """
    if config.parallel.engine == "megatron":
        require_megatron(config)
        keep_megatron_quiet()
        from sparsetrain.engines.megatron_engine import MegatronEngine  # it imports Megatron, which may be missing

        return MegatronEngine
    return {"torch": TorchEngine, "deepspeed": DeepSpeedEngine}[config.parallel.engine]


def build_engine(config: RunConfig, world: World, tokenizer: Tokenizer) -> Engine:
    """The config's engine with a freshly initialised model, laid over the ranks."""
    rows = vocab_rows(config, tokenizer.vocab_size)
    total_steps = sum(plan.num_steps for plan in plan_phases(config))
    return engine_of(config)(config, world, vocab_size=rows, max_seq_len=max_seq_len(config), total_steps=total_steps)


def check_expert_memory(config: RunConfig, world: World) -> None:
    """Make sure that this rank's experts and their replicas fit into the memory that is free; collective.

    Raises:
        PlacementError: On some rank they do not; the message names parallel.fssdp.spare_slots and what would fit.
    """
    if config.parallel.experts == "fssdp":
        on_every_rank(lambda: require_memory_for_replicas(config, world.size, free_memory_bytes(world.device)))


def require_memory_for_replicas(config: RunConfig, world_size: int, free_bytes: int) -> None:
    """Refuse spare slots that do not fit beside the experts that a rank owns.

    Args:
        config: The run.
        world_size: Number of ranks.
        free_bytes: Memory of one rank.

    Raises:
        PlacementError: They do not fit.
    """
    model, parallel = config.model, config.parallel
    assert model.moe is not None
    with torch.device("meta"):
        layer = TransformerLayer(model, model.moe_layers[0]).moe
    assert layer is not None
    assert isinstance(layer.experts, Experts)
    spec = layer.experts.spec
    itemsize = 2 if config.train.precision == "bf16" else 4
    expert = ExpertBytes(spec.numel, replica_itemsize=itemsize, gradient_itemsize=itemsize)
    num_layers, group_size = len(model.moe_layers), parallel.ep or world_size
    owned = -(-num_layers * model.moe.num_experts // group_size)
    needed = owned * (expert.owned + expert.numel * expert.weight_itemsize)  # with a gradient of each weight
    fssdp = parallel.fssdp
    try:
        check_slots(
            fssdp.spare_slots, num_layers, expert,
            freed=fssdp.rematerialise, available_bytes=max(0, free_bytes - needed),
        )  # fmt: skip
    except PlacementError as error:
        raise PlacementError(
            f"parallel.fssdp.spare_slots = {fssdp.spare_slots}: {error}. (Of {quantity(free_bytes, 'B')}, a rank's own "
            f"{owned} experts take {quantity(needed, 'B')})"
        ) from None


def measure_peak(config: RunConfig, world: World) -> float:
    """Matmul peak of all ranks together in FLOP/s, each measuring at the same time as the others; collective."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    world.barrier()
    peak = torch.tensor(measured_matmul_peak(world.device, dtype), dtype=torch.float64, device=world.device)
    return float(world.sum_(peak))
