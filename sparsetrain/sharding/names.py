"""The names of a model's parameters, without what wrappers put into them."""

from collections.abc import Callable, Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sparsetrain.errors import ShardingError
from sparsetrain.sharding.self_described import DescribesWeights

_COMPILED, _CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"


def canonical_modules(
    module: nn.Module, prefix: str = "", inside: Callable[[nn.Module], bool] = lambda module: True
) -> Iterator[tuple[str, nn.Module]]:
    """Every submodule with its path in the bare model: as `named_modules`, but that DDP, torch.compile and checkpoint
    wrappers leave no trace. A wrapper and what it wraps have the same path.

    Args:
        module: The root.
        prefix: Its own path.
        inside: Whether to go on with a module's children.

    Yields:
        (path, module), a shared module at each of its places.
    """
    yield prefix, module
    if not inside(module):
        return
    for name, child in module.named_children():
        path = prefix if _wraps(module, name) else f"{prefix}.{name}" if prefix else name
        yield from canonical_modules(child, path, inside)


def weight_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """Every submodule that holds weights, once: those that describe their weights themselves, and what is not in them.

    Yields:
        (path, module, its own parameters by canonical name); a shared parameter is with the first module that has it.
        No parameters are given for modules that are DescribesWeights.

    Raises:
        ShardingError: Two parameters have one name.
    """
    seen: set[int] = set()
    names: set[str] = set()
    for path, owner in canonical_modules(module, inside=_is_transparent):
        if isinstance(owner, DescribesWeights):
            if id(owner) not in seen:
                seen.add(id(owner))
                yield path, owner, {}
            continue
        own: dict[str, nn.Parameter] = {}
        for leaf, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            name = f"{path}.{leaf}" if path else leaf
            if name in names:
                raise ShardingError(f"two parameters are called {name}; rename one, or do not wrap what is wrapped")
            seen.add(id(parameter))
            names.add(name)
            own[name] = parameter
        if own:
            yield path, owner, own


def _is_transparent(module: nn.Module) -> bool:
    return not isinstance(module, DescribesWeights)


def _wraps(module: nn.Module, child: str) -> bool:
    """Whether a module is only a wrapper around this child; a user's own attribute may well be called `module`."""
    return child in (_COMPILED, _CHECKPOINTED) or (
        child == "module" and isinstance(module, DataParallel | DistributedDataParallel)
    )
