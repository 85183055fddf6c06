"""Mixture-of-experts layers on one device, and the placement of their experts on devices.

Names are imported when they are first used, so that planning a placement does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsetrain.moe.experts import Experts, ExpertSpec
    from sparsetrain.moe.layer import MoELayer, auxiliary_loss, moe_layers
    from sparsetrain.moe.load import Load, LoadMeter
    from sparsetrain.moe.routers import Router, build_router
    from sparsetrain.moe.routing import Routing

__all__ = [
    "ExpertSpec",
    "Experts",
    "Load",
    "LoadMeter",
    "MoELayer",
    "Router",
    "Routing",
    "auxiliary_loss",
    "build_router",
    "moe_layers",
]

_FILES = {
    "experts": ("ExpertSpec", "Experts"),
    "layer": ("MoELayer", "auxiliary_loss", "moe_layers"),
    "load": ("Load", "LoadMeter"),
    "routers": ("Router", "build_router"),
    "routing": ("Routing",),
}
_HOME = {name: f"sparsetrain.moe.{file}" for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsetrain.moe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
