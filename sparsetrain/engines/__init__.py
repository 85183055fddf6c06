"""What turns batches into weight updates: one small protocol, and the libraries behind it."""

from sparsetrain.engines.base import Engine
from sparsetrain.engines.torch_engine import TorchEngine

__all__ = ["Engine", "TorchEngine"]
