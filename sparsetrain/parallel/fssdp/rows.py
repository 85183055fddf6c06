"""The experts that a rank owns, as rows of stacked parameters, and how they are described weight by weight.

Shapes: L layers, E experts of a layer, S experts owned by this rank over all layers.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsetrain.errors import PlacementError, ShardingError
from sparsetrain.moe import Experts, ExpertSpec
from sparsetrain.moe.placement.topology import IntArray
from sparsetrain.parallel.fssdp.groups import ExpertGroups
from sparsetrain.sharding import MomentsOf, Stack, WeightShard


class ExpertRows(nn.Module):
    """One parameter for each of an expert's tensors ("w_in", ...), a row for each expert of any layer owned here.

    They are left uninitialised: `adopt`, `reset_parameters`, or write to the weights' shards.

    Args:
        spec: The shape of an expert.
        layer_paths: Where each layer's experts are in the model, for example "layers.0.moe.experts": L names.
        num_experts: E.
        owners_LE: int64 [L, E], the rank in its group that owns each expert.
        groups: The ranks.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        PlacementError: Fewer experts than ranks, or owners that do not fit.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        layer_paths: Sequence[str],
        num_experts: int,
        owners_LE: IntArray,
        groups: ExpertGroups,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.layer_paths, self.num_experts, self.groups = spec, tuple(layer_paths), num_experts, groups
        self.check_owners(owners_LE)
        self.owners_LE = owners_LE.copy()
        """Who owns which expert now."""
        owned = [(int(layer), int(expert)) for layer, expert in np.argwhere(owners_LE == groups.rank)]
        self._row = {place: row for row, place in enumerate(owned)}
        for name, shape in spec.shapes.items():
            rows = torch.empty(len(owned), *shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(rows))

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layer_paths)

    @property
    def num_owned(self) -> int:
        """S."""
        return len(self._row)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of this rank's parameters: S · spec.numel · itemsize."""
        return self.num_owned * self.expert_bytes(self.stack("w_in").dtype)

    def expert_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one expert, also when it travels: spec.numel · itemsize."""
        return self.spec.numel * dtype.itemsize

    def owned(self, layer: int) -> list[int]:
        """The experts of a layer that this rank owns, ascending."""
        owned: list[int] = np.flatnonzero(self.owners_LE[layer] == self.groups.rank).tolist()
        return owned

    def row_of(self, layer: int, expert: int) -> int | None:
        """The expert's row in each stack; None where another rank owns it."""
        return self._row.get((layer, expert))

    def stack(self, name: str) -> nn.Parameter:
        """The parameter [S, ...] of one of an expert's tensors; materialising the module replaces it."""
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter

    @property
    def trained_stack(self) -> nn.Parameter:
        """The first parameter that is not frozen; the first of all where every one is."""
        stacks = [self.stack(name) for name in self.spec.shapes]
        return next((stack for stack in stacks if stack.requires_grad), stacks[0])

    def check_owners(self, owners_LE: IntArray) -> None:
        """Raise PlacementError unless these are owners of all experts among the ranks of a group."""
        num_ranks = self.groups.size
        require_an_expert_each(self.num_experts, num_ranks)
        if owners_LE.shape != (self.num_layers, self.num_experts):
            expected = (self.num_layers, self.num_experts)
            raise PlacementError(f"owners of shape {owners_LE.shape}: expected {expected}, [L, E]")
        if not 0 <= owners_LE.min() <= owners_LE.max() < num_ranks:
            raise PlacementError(f"an owner is none of the ranks 0 to {num_ranks - 1} of the expert group")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill with what `Experts` starts from; collective over the ranks that own the same experts."""
        for name in self.spec.shapes:
            bound = (self.spec.dim if name.endswith("_in") else self.spec.ffn_dim) ** -0.5
            nn.init.uniform_(self.stack(name), -bound, bound)
            self._replicate(self.stack(name))

    @torch.no_grad()
    def adopt(self, layer: int, experts: Experts) -> None:
        """Take a layer's weights from the whole, of which the first rank's copy counts; collective over all ranks.

        Args:
            layer: Which.
            experts: All experts of the layer. Parameters on the meta device are passed over.
        """
        owned = self.owned(layer)
        rows = [self._row[layer, expert] for expert in owned]
        for name in self.spec.shapes:
            whole = experts.get_parameter(name).detach()
            if whole.is_meta:
                continue
            stack = self.stack(name)
            whole = whole.to(stack.device, stack.dtype)
            dist.broadcast(whole, group=self.groups.parameters, group_src=0)
            self._replicate(whole)
            stack[rows] = whole[owned]

    def _replicate(self, tensor: Tensor) -> None:
        if self.groups.replicate is not None:
            dist.broadcast(tensor, group=self.groups.replicate, group_src=0)

    def describe_weights(self, path: str) -> dict[str, tuple[int, ...]]:
        """Nothing: layers describe their experts themselves, through the two methods below."""
        return {}

    def shards_of_weights(self, path: str, moments: MomentsOf, replica_rank: int) -> list[WeightShard]:
        """Nothing, see `describe_weights`."""
        return []

    def describe_layer(self, path: str) -> dict[str, tuple[int, ...]]:
        """Whole shapes of a layer's weights, `{path}.{expert}.{gate,up,down}`, as `Experts` describes them."""
        shapes = self.spec.weight_shapes()
        return {f"{path}.{expert}.{name}": shapes[name] for expert in range(self.num_experts) for name in shapes}

    def shards_of_layer(
        self, layer: int, path: str, moments: MomentsOf, experts: Sequence[int] | None = None
    ) -> list[WeightShard]:
        """What this rank holds of them, in the same order: an expert is whole on its owner and empty elsewhere.

        A shard's accessors raise ShardingError once its expert has moved to or from this rank.

        Args:
            layer: Which.
            path: Where it is.
            moments: Where the optimizer's state is.
            experts: Which of them; default all.
        """
        shards = []
        for expert in range(self.num_experts) if experts is None else experts:
            row = self.row_of(layer, expert)
            stacks = {name: self._stack_of(name, layer, expert, moments) for name in self.spec.shapes}
            for weight, (name, part) in self.spec.weights.items():
                shards += stacks[name].shards([f"{path}.{expert}.{weight}"], [row], part)
        return shards

    def _stack_of(self, name: str, layer: int, expert: int, moments: MomentsOf) -> Stack:
        """A stack as the shards of one expert see it, as long as the expert does not move."""
        row = self.row_of(layer, expert)

        def stack() -> nn.Parameter:
            if self.row_of(layer, expert) != row:
                raise ShardingError(
                    f"expert {expert} of {self.layer_paths[layer]} has changed owners since its shards were taken: "
                    "take them again after each move (`on_move` tells)"
                )
            return self.stack(name)

        return Stack(
            row_shape=self.spec.shapes[name],
            group=self.groups.parameters if self.groups.size > 1 else None,
            replica_rank=self.groups.replica_rank,
            weight=lambda: stack().detach(),
            grad=lambda: stack().grad,
            moments=lambda: moments(stack()),
        )

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"layers={self.num_layers}, num_experts={self.num_experts}, owned={self.num_owned}, {self.spec}"


def require_an_expert_each(num_experts: int, num_ranks: int) -> None:
    """Raise PlacementError if an expert group has more ranks than a layer has experts."""
    if num_experts < num_ranks:
        raise PlacementError(
            f"{num_experts} experts cannot be spread over an expert group of {num_ranks} ranks: make groups of "
            f"{num_experts} ranks at most"
        )
