"""Fully sharded sparse data parallelism: experts and their optimizer state sharded whole, replicas made anew each step.

`ExpertGroups` are the ranks, an `ExpertStore` is where a rank's experts live and how they travel (arXiv 2502.02581).
"""

from sparsetrain.parallel.fssdp.groups import ExpertGroups
from sparsetrain.parallel.fssdp.replicas import LocalExperts, Replicas
from sparsetrain.parallel.fssdp.store import ExpertStore, Traffic, store_parameters

__all__ = ["ExpertGroups", "ExpertStore", "LocalExperts", "Replicas", "Traffic", "store_parameters"]
