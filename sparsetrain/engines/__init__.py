"""What turns batches into weight updates: one small protocol, and the libraries behind it."""

from sparsetrain.engines.base import Engine
from sparsetrain.engines.deepspeed_config import require_deepspeed
from sparsetrain.engines.deepspeed_engine import DeepSpeedEngine
from sparsetrain.engines.megatron_support import require_megatron
from sparsetrain.engines.torch_engine import TorchEngine

__all__ = ["DeepSpeedEngine", "Engine", "TorchEngine", "require_deepspeed", "require_megatron"]
