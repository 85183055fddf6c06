"""What tests of sparse and sharded models need; shipped, so that users can test their own."""

from sparsetrain.testing.assertions import assert_close
from sparsetrain.testing.devices import requires_gpu
from sparsetrain.testing.distributed import run_distributed
from sparsetrain.testing.memory import MemoryMeter
from sparsetrain.testing.ports import free_ports

__all__ = ["MemoryMeter", "assert_close", "free_ports", "requires_gpu", "run_distributed"]
