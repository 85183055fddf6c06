"""What stands between a checked config and the first step: sizes, the engine, and the machine's peak."""

import torch

from sparsetrain.config import RunConfig
from sparsetrain.data import Tokenizer
from sparsetrain.engines import Engine, TorchEngine
from sparsetrain.errors import ConfigError
from sparsetrain.models import padded_vocab
from sparsetrain.parallel import World
from sparsetrain.planning.hardware import measured_matmul_peak


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


def build_engine(config: RunConfig, world: World, tokenizer: Tokenizer) -> Engine:
    """The config's engine with a freshly initialised model, laid over the ranks."""
    rows = vocab_rows(config, tokenizer.vocab_size)
    return TorchEngine(config, world, vocab_size=rows, max_seq_len=max_seq_len(config))


def measure_peak(config: RunConfig, world: World) -> float:
    """Matmul peak of all ranks together in FLOP/s, each measuring at the same time as the others; collective."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    world.barrier()
    peak = torch.tensor(measured_matmul_peak(world.device, dtype), dtype=torch.float64, device=world.device)
    return float(world.sum_(peak))
