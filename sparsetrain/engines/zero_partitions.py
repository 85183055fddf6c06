"""What DeepSpeed's ZeRO keeps on this rank, as flat parameters of an ordinary optimizer and as shards of weights.

ZeRO-1 and -2 lay the parameters of an optimizer group end to end and cut the whole evenly over ranks; ZeRO-3 cuts each
parameter by itself, and lays the pieces that a rank got end to end. Either way a rank has a few flat float32
tensors. They are what is optimised, masked and saved here; what the model multiplies with is gathered from them.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sparsetrain.sharding import FlatPartition, MomentsOf, WeightShard, weight_shards

Shapes = dict[str, tuple[int, ...]]
"""The weights in a parameter, by name and in the order of memory: one, but in stacks of experts."""


def weights_in_parameters(module: nn.Module) -> dict[int, Shapes]:
    """Which weights lie in each parameter of a module that is whole on this rank, by the parameter's id."""
    places: dict[int, list[tuple[int, WeightShard]]] = {}
    for shard in weight_shards(module):
        weight = shard.local_weight()
        places.setdefault(weight.untyped_storage().data_ptr(), []).append((int(weight.storage_offset()), shard))
    found: dict[int, Shapes] = {}
    for parameter in module.parameters():
        inside = sorted(places.get(parameter.untyped_storage().data_ptr(), []), key=lambda place: place[0])
        shapes = {shard.name: shard.global_shape for _, shard in inside}
        if sum(map(prod, shapes.values())) == parameter.numel():
            found[id(parameter)] = shapes
    return found


class ZeroPartitions:
    """The flat tensors of a ZeRO optimizer of stage 1, 2 or 3.

    Args:
        zero: DeepSpeed's; its own step is never taken.
        stage: Which of its classes that is.
        weights: From `weights_in_parameters`, of the module before it was partitioned.
        group: The ranks that share the weights.
    """

    def __init__(self, zero: Any, stage: int, weights: Mapping[int, Shapes], group: ProcessGroup) -> None:
        self._zero = zero
        self._stage = stage
        self._weights = weights
        self._group = group
        self._flat: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        )
        # There only if weights are optimised in the host's memory: ZeRO writes the last micro-batch's sum into them.
        self._host_grads = [flat.grad for flat in self._flat if flat.grad is not None]

    def of_group(self, index: int) -> list[Tensor]:
        """The flat parameters that hold this rank's part of a parameter group of the optimizer that ZeRO was given."""
        if self._stage < 3:
            return [self._flat[index]]
        return [flat for at, flat in enumerate(self._flat) if self._zero.sub_group_to_group_id[at] == index]

    def shards(self, moments: MomentsOf) -> dict[str, WeightShard]:
        """Every weight that ZeRO has cut, by name; `moments` tells the optimizer's state of a flat parameter."""
        partitions = self._pieces(moments) if self._stage == 3 else self._groups(moments)
        return {shard.name: shard for partition in partitions for shard in partition.shards()}

    def _groups(self, moments: MomentsOf) -> Iterator[FlatPartition]:
        for flat, parameters in zip(self._flat, self._zero.round_robin_bit16_groups, strict=True):
            whole = slice(0, flat.numel())
            yield self._partition(flat, whole, parameters, moments, self._zero.nccl_start_alignment_factor)

    def _pieces(self, moments: MomentsOf) -> Iterator[FlatPartition]:
        for flat, parameters in zip(self._flat, self._zero.fp16_groups, strict=True):
            start = 0
            for parameter in parameters:
                stop = start + parameter.partition_numel()
                yield self._partition(flat, slice(start, stop), [parameter], moments, 1)
                start = stop

    def _partition(
        self, flat: Tensor, part: slice, parameters: Sequence[Tensor], moments: MomentsOf, align: int
    ) -> FlatPartition:
        shapes: Shapes = {}
        for parameter in parameters:
            shapes |= self._weights[id(parameter)]
        return FlatPartition(
            shapes=shapes,
            group=self._group,
            weight=lambda: flat.detach()[part],
            grad=lambda: None if flat.grad is None else flat.grad[part],
            moments=lambda: {key: value[part] for key, value in moments(flat).items()},
            align=align,
        )

    @torch.no_grad()
    def expect_gradients(self) -> None:
        """Make room for the gradients of a step, where ZeRO wants room."""
        for flat, grad in zip(self._flat, self._host_grads, strict=bool(self._host_grads)):
            flat.grad = grad.zero_()

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the averaged gradients of a backward pass from ZeRO's lists into `.grad` of the flat parameters."""
        if self._host_grads:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # they are on their way to the host
            self._finish_step()
            return
        for index, flat in enumerate(self._flat):
            parts = self._zero.averaged_gradients[index]
            whole = getattr(parts, "flat_partition", None)  # ZeRO-2 has them flat already
            flat.grad = torch.cat([part.reshape(-1) for part in parts]) if whole is None else whole
            self._zero.averaged_gradients[index] = None
        self._finish_step()

    def _finish_step(self) -> None:
        self._zero.zero_grad()
        self._zero.micro_step_id = 0 if self._stage == 3 else -1  # as after a step of its own

    @torch.no_grad()
    def gather(self) -> None:
        """Have the model multiply with what the flat parameters hold now; collective."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for index in range(len(self._flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        kept = self._zero.persistent_parameters  # small ones, which stay gathered from step to step
        if kept:
            kept[0].all_gather(kept)


def moments_reader(optimizer: torch.optim.Optimizer) -> MomentsOf:
    """The optimizer's state tensors of a flat parameter."""
    return partial(_moments, optimizer)


def _moments(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    state = optimizer.state.get(flat, {})
    return {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape}
