"""The gradients of the experts that a rank owns: sums while a backward pass adds to them, means when it is done.

Shapes: L layers, S experts owned by this rank over all layers.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sparsetrain.parallel.fssdp.rows import ExpertRows


class OwnedGradients:
    """`.grad` of the parameters of a store, layer by layer.

    An open layer's rows are sums over the ranks of this expert group, to which anything may be added. A closed layer's
    rows are means, as DDP leaves them: over all data-parallel ranks, or over this group while gradients are accumulated
    without synchronisation. The mean of equal numbers is the number, so what is averaged already may be averaged again.

    Args:
        experts: Whose.
    """

    def __init__(self, experts: ExpertRows) -> None:
        self._experts = experts
        self._open: set[tuple[str, int]] = set()
        """Stacks and layers."""
        self._closed: set[int] = set()
        """Layers that are done in the backward pass that is running."""
        self._works: list[dist.Work] = []

    @property
    def are_means(self) -> bool:
        """Whether nothing is open."""
        return not self._open

    @torch.no_grad()
    def open(self, layer: int) -> dict[str, Tensor]:
        """The gradients [S, ...] by stack, 0 where there were none, to add to the rows of a layer."""
        if layer in self._closed:  # it was called twice, and may be on its way between the groups
            self._wait()
            self._closed.remove(layer)
        grads = {}
        for name in self._experts.spec.shapes:
            stack = self._experts.stack(name)
            if stack.grad is None:
                stack.grad = torch.zeros_like(stack)
                self._open.update((name, each) for each in range(self._experts.num_layers))  # no matter which: all 0
            elif (name, layer) not in self._open:
                self._scale(stack.grad, layer, self._experts.groups.size)
                self._open.add((name, layer))
            grads[name] = stack.grad
        return grads

    @torch.no_grad()
    def close(self, layer: int, *, synchronise: bool) -> None:
        """Begin to make means of a layer's sums; collective over the ranks that own the same experts.

        Args:
            layer: Which; opened if it is not open.
            synchronise: Average over all expert groups, not over this one alone.
        """
        groups = self._experts.groups
        across = groups.replicate if synchronise else None
        for name, grad in self.open(layer).items():
            rows = self._scale(grad, layer, 1 / (groups.size if across is None else groups.world_size))
            if across is not None:
                self._works += [dist.all_reduce(each, group=across, async_op=True) for each in rows]
            self._open.remove((name, layer))
        self._closed.add(layer)

    @torch.no_grad()
    def finish(self, *, synchronise: bool) -> None:
        """Close what is not closed, wait for all means, and drop those of parameters that are not trained."""
        for layer in range(self._experts.num_layers):
            if layer not in self._closed:
                self.close(layer, synchronise=synchronise)
        self._wait()
        self._closed.clear()
        for stack in map(self._experts.stack, self._experts.spec.shapes):
            if not stack.requires_grad:
                stack.grad = None

    def _scale(self, grad: Tensor, layer: int, factor: float) -> list[Tensor]:
        """Multiply a layer's rows, and return them, those that follow one another together."""
        owned = [self._experts.row_of(layer, expert) for expert in self._experts.owned(layer)]
        rows = [grad[run] for run in _runs(sorted(row for row in owned if row is not None))]
        if rows and factor != 1:
            torch._foreach_mul_(rows, factor)
        return rows

    def _wait(self) -> None:
        while self._works:
            self._works.pop().wait()


def _runs(rows: Sequence[int]) -> list[slice]:
    """Ascending numbers as slices of consecutive ones."""
    starts = [row for at, row in enumerate(rows) if at == 0 or rows[at - 1] != row - 1]
    stops = [row + 1 for at, row in enumerate(rows) if at == len(rows) - 1 or rows[at + 1] != row + 1]
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
