"""The experts of a layer on one device: feed-forward networks whose weights are stacked.

Shapes: T tokens, R rows, E experts, D model dim, F hidden dim, H = 2F for SwiGLU (gate rows, then up rows), F for GELU.
"""

from dataclasses import dataclass
from math import prod

import torch
from sparsetrain_kernels import moe_ffn
from torch import Tensor, nn

from sparsetrain.errors import MoeError
from sparsetrain.moe.feed_forward import Activation
from sparsetrain.moe.routing import Routing
from sparsetrain.sharding import MomentsOf, Stack, WeightShard


@dataclass(frozen=True)
class ExpertSpec:
    """The shape of one expert.

    swiglu: down(silu(gate x) · up x). gelu: down(gelu(up x)), in the tanh form.

    Raises:
        MoeError: A size is not positive, the activation is unknown, or swiglu is asked to have biases.
    """

    dim: int
    ffn_dim: int
    activation: Activation = "swiglu"
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "ffn_dim"):
            if getattr(self, name) < 1:
                raise MoeError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.activation not in ("swiglu", "gelu"):
            raise MoeError(f"activation = {self.activation}: expected swiglu or gelu")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of an expert's tensors, by the name of the stack it is a row of."""
        hidden = 2 * self.ffn_dim if self.activation == "swiglu" else self.ffn_dim
        shapes: dict[str, tuple[int, ...]] = {"w_in": (hidden, self.dim), "w_out": (self.dim, self.ffn_dim)}
        if self.bias:
            shapes |= {"b_in": (hidden,), "b_out": (self.dim,)}
        return shapes

    @property
    def numel(self) -> int:
        """Parameters of an expert."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def weights(self) -> dict[str, tuple[str, slice]]:
        """Where each of an expert's weights lies: by name, its stack and its range of the row's first dimension."""
        first, second, whole = slice(0, self.ffn_dim), slice(self.ffn_dim, 2 * self.ffn_dim), slice(None)
        inner = {"gate": first, "up": second} if self.activation == "swiglu" else {"up": whole}
        weights = {name: ("w_in", part) for name, part in inner.items()} | {"down": ("w_out", whole)}
        if self.bias:
            weights |= {f"{name}_bias": ("b_in", part) for name, part in inner.items()}
            weights["down_bias"] = ("b_out", whole)
        return weights

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of an expert's weights by name, in the order of `weights`."""
        shapes = {}
        for name, (stack, part) in self.weights.items():
            rows, *rest = self.shapes[stack]
            shapes[name] = (len(range(rows)[part]), *rest)
        return shapes


class Experts(nn.Module):
    """E feed-forward networks, applied to the rows that a routing gives them.

    Args:
        spec: The shape of one.
        num_experts: E.
    """

    w_in: nn.Parameter
    """[E, H, D]"""
    w_out: nn.Parameter
    """[E, D, F]"""
    b_in: nn.Parameter | None
    """[E, H]"""
    b_out: nn.Parameter | None
    """[E, D]"""

    def __init__(self, spec: ExpertSpec, num_experts: int) -> None:
        super().__init__()
        self.spec, self.num_experts = spec, num_experts
        for name in ("w_in", "w_out", "b_in", "b_out"):
            shape = spec.shapes.get(name)
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(num_experts, *shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill with what `nn.Linear` starts from: uniform in ±1/√(inputs)."""
        for stack, bias in ((self.w_in, self.b_in), (self.w_out, self.b_out)):
            bound = stack.shape[-1] ** -0.5
            for parameter in (stack, bias):
                if parameter is not None:
                    nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Sum over a token's rows of weight · expert(x): [T, D] in the dtype of the products."""
        y_TD: Tensor = moe_ffn(
            x_TD,
            routing.token_R,
            routing.weight_R,
            routing.counts_E,
            self.w_in,
            self.w_out,
            b_in=self.b_in,
            b_out=self.b_out,
            activation=self.spec.activation,
        )
        return y_TD

    def describe_weights(self, path: str) -> dict[str, tuple[int, ...]]:
        """Every expert's weights, `{path}.{expert}.{gate,up,down}`; see DescribesWeights."""
        return {
            f"{path}.{expert}.{name}": shape
            for expert in range(self.num_experts)
            for name, shape in self.spec.weight_shapes().items()
        }

    def shards_of_weights(self, path: str, moments: MomentsOf, replica_rank: int) -> list[WeightShard]:
        """What this rank holds of them, in the same order; see DescribesWeights."""
        stacks = {name: Stack.of(self.get_parameter(name), moments, replica_rank) for name in self.spec.shapes}
        by_name = [
            stacks[stack].shards_in_order([f"{path}.{expert}.{name}" for expert in range(self.num_experts)], part)
            for name, (stack, part) in self.spec.weights.items()
        ]
        return [shard for of_expert in zip(*by_name, strict=True) for shard in of_expert]

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"num_experts={self.num_experts}, {self.spec}"
