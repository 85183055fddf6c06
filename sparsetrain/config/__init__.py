"""What a run is: one typed, frozen schema, and the YAML loader that fills it."""

from sparsetrain.config.attention import Attention, BlockSparseAttention, DenseAttention
from sparsetrain.config.base import Section
from sparsetrain.config.checks import check_config, check_world
from sparsetrain.config.data import (
    BpeTokenizer,
    ByteTokenizer,
    DataConfig,
    HuggingFace,
    JsonLines,
    MegatronShards,
    PythonStdlib,
    Source,
    TextFiles,
    Tokenizer,
    TokenizerFile,
)
from sparsetrain.config.dump import dump_config
from sparsetrain.config.experts import FssdpConfig
from sparsetrain.config.load import load_config, locate
from sparsetrain.config.model import ModelConfig
from sparsetrain.config.moe import MoeConfig
from sparsetrain.config.problem import InvalidConfig, Problem
from sparsetrain.config.run import (
    BatchRamp,
    CheckpointConfig,
    ClusterConfig,
    LearningRateSchedule,
    OptimizerConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    TrainConfig,
)
from sparsetrain.config.sparsity import (
    BlockShape,
    Constant,
    Cubic,
    Distribution,
    ErdosRenyiKernel,
    Geometric,
    Global,
    Schedule,
    SparsityRule,
    Stepwise,
    Uniform,
)
from sparsetrain.config.units import format_count, parse_count

__all__ = [
    "Attention",
    "BatchRamp",
    "BlockShape",
    "BlockSparseAttention",
    "BpeTokenizer",
    "ByteTokenizer",
    "CheckpointConfig",
    "ClusterConfig",
    "Constant",
    "Cubic",
    "DataConfig",
    "DenseAttention",
    "Distribution",
    "ErdosRenyiKernel",
    "FssdpConfig",
    "Geometric",
    "Global",
    "HuggingFace",
    "InvalidConfig",
    "JsonLines",
    "LearningRateSchedule",
    "MegatronShards",
    "ModelConfig",
    "MoeConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PhaseConfig",
    "Problem",
    "PythonStdlib",
    "RunConfig",
    "Schedule",
    "Section",
    "Source",
    "SparsityRule",
    "Stepwise",
    "TextFiles",
    "Tokenizer",
    "TokenizerFile",
    "TrainConfig",
    "Uniform",
    "check_config",
    "check_world",
    "dump_config",
    "format_count",
    "load_config",
    "locate",
    "parse_count",
]
