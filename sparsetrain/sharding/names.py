"""The names of a model's parameters, without what wrappers put into them."""

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sparsetrain.errors import ShardingError

_COMPILED, _CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"


def canonical_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every submodule with its path in the bare model: as `named_modules`, but that DDP, torch.compile and checkpoint
    wrappers leave no trace. A wrapper and what it wraps have the same path.

    Yields:
        (path, module), a shared module at each of its places.
    """
    yield prefix, module
    for name, child in module.named_children():
        path = prefix if _wraps(module, name) else f"{prefix}.{name}" if prefix else name
        yield from canonical_modules(child, path)


def canonical_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its name in the bare model: as `named_parameters`, a shared one once.

    Raises:
        ShardingError: Two parameters have one name.
    """
    seen: set[int] = set()
    names: set[str] = set()
    for path, owner in canonical_modules(module):
        for leaf, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            name = f"{path}.{leaf}" if path else leaf
            if name in names:
                raise ShardingError(f"two parameters are called {name}; rename one, or do not wrap what is wrapped")
            seen.add(id(parameter))
            names.add(name)
            yield name, parameter


def _wraps(module: nn.Module, child: str) -> bool:
    """Whether a module is only a wrapper around this child; a user's own attribute may well be called `module`."""
    return child in (_COMPILED, _CHECKPOINTED) or (
        child == "module" and isinstance(module, DataParallel | DistributedDataParallel)
    )
