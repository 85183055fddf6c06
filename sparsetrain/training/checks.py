"""Everything about a run that can be found wrong before a worker starts."""

from dataclasses import dataclass, replace

import torch

from sparsetrain.config import BpeTokenizer, ByteTokenizer, RunConfig, TokenizerFile, check_world
from sparsetrain.data import Dataset, Progress
from sparsetrain.data.tokenizer import read_tokenizer_file
from sparsetrain.engines import require_deepspeed, require_megatron
from sparsetrain.models import Transformer
from sparsetrain.planning.tensor_parallel import part_shape
from sparsetrain.sparsity import describe_parameters, match_rules
from sparsetrain.sparsity.matching import Parameter
from sparsetrain.training.attention_check import check_attention
from sparsetrain.training.datasets import prepare_datasets
from sparsetrain.training.setup import max_seq_len, vocab_rows


@dataclass(frozen=True)
class Preflight:
    """What was learned on the way."""

    datasets: list[Dataset]
    """By phase."""
    num_parameters: int


def preflight(config: RunConfig, *, world_size: int | None = None, on_progress: Progress | None = None) -> Preflight:
    """Check a run against its model and its data, and build the token shards.

    The model is built on the meta device, where it takes no memory; the data are looked at last, because that may take
    a while.

    Args:
        config: The run.
        world_size: Number of ranks; default: every one that cluster.min_workers and cluster.workers allow.
        on_progress: Called while token shards are built.

    Raises:
        ConfigError: The batch or mesh does not fit the ranks, the engine's library is missing or contradicted, a rule
            matches no weight, a block does not divide one, a query sees no key.
        DataError: A corpus or tokenizer is missing, damaged or does not match.
    """
    for size in [world_size] if world_size else reversed(config.cluster.world_sizes):
        check_world(config, size)
    require_deepspeed(config)
    require_megatron(config)
    check_attention(config)
    with torch.device("meta"):
        model = Transformer(config.model, vocab_rows(config, vocab_size_of(config)), max_seq_len(config))
    parameters = describe_parameters(model)
    for index, phase in enumerate(config.phases):
        if phase.sparsity != "keep":
            key = f"train.phases.{index - 1}.sparsity" if index else "sparsity"
            match_rules(phase.sparsity, parameters, key=key)
            match_rules(phase.sparsity, _on_a_rank(parameters, config), key=key)
    datasets = prepare_datasets(config, on_progress=on_progress)
    vocab_rows(config, datasets[0].tokenizer.vocab_size)
    return Preflight(datasets, sum(parameter.numel for parameter in parameters))


def _on_a_rank(parameters: list[Parameter], config: RunConfig) -> list[Parameter]:
    """With the shapes of what tensor-parallel ranks have of them, which patterns must divide, too."""
    return [
        replace(parameter, shape=part_shape(parameter.name, parameter.shape, config.parallel.tp))
        for parameter in parameters
    ]


def vocab_size_of(config: RunConfig) -> int:
    """The tokenizer's size, as far as it is known before any text is read.

    Raises:
        DataError: The tokenizer's file is missing or damaged.
    """
    match config.data.tokenizer:
        case ByteTokenizer():
            return 257
        case BpeTokenizer(vocab_size=size):
            return size
        case TokenizerFile(path=path, end_of_document=end):
            return read_tokenizer_file(path, end).vocab_size
