"""Pre-train sparse and mixture-of-experts language models from one YAML file, on a laptop or a GPU cluster.

    import sparsetrain as st

    config = st.load_config("configs/demo.yaml", ["train.tokens=2M"])
    summary = st.train(config)                               # in this process: one rank, or a rank of torchrun
    job = st.submit("configs/demo.yaml", address="auto")     # as a job on a Ray cluster
    sparsifier = st.Sparsifier([st.SparsityRule(...)])       # for any nn.Module and any torch optimizer
    sparsifier.attach(model, optimizer)
    moe = st.MoELayer(dim=512, ffn_dim=2048, num_experts=64, top_k=2)   # a plain nn.Module

Names are imported when they are first used, so that reading a config does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsetrain.cluster import run_on_ray, submit
    from sparsetrain.config import ModelConfig, RunConfig, SparsityRule, dump_config, load_config
    from sparsetrain.data import Dataset, prepare
    from sparsetrain.errors import ConfigError, SparsetrainError
    from sparsetrain.models import Transformer
    from sparsetrain.moe import MoELayer, auxiliary_loss
    from sparsetrain.parallel import MoEController, parallelize
    from sparsetrain.sharding import FlatPartition, WeightShard, clip_grads_, global_grad_norm, weight_shards
    from sparsetrain.sparsity import Sparsifier
    from sparsetrain.training import evaluate_run, generate_text, train

__all__ = [
    "ConfigError",
    "Dataset",
    "FlatPartition",
    "MoEController",
    "MoELayer",
    "ModelConfig",
    "RunConfig",
    "SparsetrainError",
    "Sparsifier",
    "SparsityRule",
    "Transformer",
    "WeightShard",
    "auxiliary_loss",
    "clip_grads_",
    "dump_config",
    "evaluate_run",
    "generate_text",
    "global_grad_norm",
    "load_config",
    "parallelize",
    "prepare",
    "run_on_ray",
    "submit",
    "train",
    "weight_shards",
]

_ROOMS = {
    "cluster": ("run_on_ray", "submit"),
    "config": ("ModelConfig", "RunConfig", "SparsityRule", "dump_config", "load_config"),
    "data": ("Dataset", "prepare"),
    "errors": ("ConfigError", "SparsetrainError"),
    "models": ("Transformer",),
    "moe": ("MoELayer", "auxiliary_loss"),
    "parallel": ("MoEController", "parallelize"),
    "sharding": ("FlatPartition", "WeightShard", "clip_grads_", "global_grad_norm", "weight_shards"),
    "sparsity": ("Sparsifier",),
    "training": ("evaluate_run", "generate_text", "train"),
}
_HOME = {name: f"sparsetrain.{room}" for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sparsetrain")
    if name not in _HOME:
        raise AttributeError(f"module 'sparsetrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # from now on Python finds it without asking
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
