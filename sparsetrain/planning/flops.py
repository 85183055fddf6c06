"""Exact parameter counts and training FLOPs by part, dense and sparse.

A FLOP here is a multiplication or an addition inside a matrix product; norms, softmax, activations and look-ups are not
counted (they add well under a percent, and no published figure counts them). The backward pass costs twice the forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from math import prod

from torch import nn

from sparsetrain.models import Transformer
from sparsetrain.moe import moe_layers
from sparsetrain.planning.attention_flops import keys_per_query
from sparsetrain.sharding import weight_shapes, whole_model

_BACKWARD_AND_FORWARD = 3


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a `Transformer` by part; a shared parameter is counted once."""

    embedding: int
    """Token embeddings and learned positions; a tied head is in here."""
    attention: int
    """Query, key, value and output projections, with their biases."""
    ffn: int
    """Dense feed-forward layers."""
    moe: int
    """Experts and shared experts."""
    router: int
    norms: int
    head: int
    idle: int
    """Of `moe`, what a token does not use: all experts but top_k in each layer."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(getattr(self, part.name) for part in fields(self) if part.name != "idle")

    @property
    def active(self) -> int:
        """Parameters that a token uses."""
        return self.total - self.idle


def parameter_counts(model: nn.Module) -> ParameterCount:
    """Count the parameters of a `Transformer`, wrapped or sharded or not; the meta device is enough.

    Raises:
        ValueError: The model has a parameter that belongs to no part.
    """
    counts = dict.fromkeys((part.name for part in fields(ParameterCount)), 0)
    model = whole_model(model)
    shares = _expert_shares(model)
    idle = Fraction(0)
    for name, shape in weight_shapes(model).items():
        counts[_part(name)] += prod(shape)
        idle += (1 - _share(name, shares)) * prod(shape)
    return ParameterCount(**counts | {"idle": int(idle)})


def _part(name: str) -> str:
    layers = name.removesuffix(".weight").removesuffix(".bias").split(".")
    for part, members in (
        ("router", {"router"}),
        ("moe", {"moe"}),
        ("embedding", {"embed", "positions"}),
        ("norms", {"norm", "attention_norm", "ffn_norm"}),
        ("attention", {"attention"}),
        ("ffn", {"ffn"}),
        ("head", {"head"}),
    ):
        if members.intersection(layers):
            return part
    raise ValueError(f"{name} is no parameter of a Transformer")


def _expert_shares(model: nn.Module) -> dict[str, Fraction]:
    """By the path of each layer's experts, the share of them that a token uses."""
    return {
        f"{path}.experts": Fraction(layer.router.top_k, layer.router.num_experts) for path, layer in moe_layers(model)
    }


def _share(name: str, shares: Mapping[str, Fraction]) -> Fraction:
    """The share of tokens that use a weight."""
    experts, is_expert, _ = name.partition(".experts.")
    return shares[f"{experts}.experts"] if is_expert else Fraction(1)


@dataclass(frozen=True)
class ModelFlops:
    """What one token costs at a given sample length, by part; forward, in FLOPs a token.

    Of E experts a token pays top_k. Where routers do not fix the number, or capacity does not suffice for it, the load
    of a step tells what was paid: see `with_experts_per_token`.
    """

    linear: Mapping[str, float]
    """Each weight matrix inside the layers, by name, dense: 2 · its size · the share of tokens that use it."""
    sizes: Mapping[str, int]
    """Weights in each of them."""
    attention: float
    """Scores and weighted values of all layers, over the keys that their layouts let a query see."""
    dense_attention: float
    """The same where every query sees every earlier key: (T + 1)/2 on average."""
    head: float
    """The output head, dense."""
    head_name: str
    """Parameter that the head multiplies with; the embedding where they are tied."""
    experts_per_token: int = 0
    """top_k, summed over all MoE layers."""

    @classmethod
    def of(cls, model: nn.Module, seq_len: int) -> "ModelFlops":
        """Count a `Transformer`, wrapped or sharded or not, at samples of `seq_len` tokens.

        Raises:
            ValueError: The model holds no `Transformer`.
        """
        model = whole_model(model)
        config = next((module.config for module in model.modules() if isinstance(module, Transformer)), None)
        if config is None:
            raise ValueError(f"{type(model).__name__} holds no Transformer")
        shapes = weight_shapes(model)
        head_name = "embed.weight" if config.ties_embeddings else "head.weight"
        shares = _expert_shares(model)
        sizes = {
            name: prod(shape)
            for name, shape in shapes.items()
            if len(shape) == 2 and _part(name) in ("attention", "ffn", "moe", "router")
        }
        return cls(
            linear={name: 2.0 * size * float(_share(name, shares)) for name, size in sizes.items()},
            sizes=sizes,
            attention=2 * 2.0 * config.dim * sum(keys_per_query(config, seq_len)),
            dense_attention=2 * config.num_layers * 2.0 * config.dim * (seq_len + 1) / 2,
            head=2.0 * prod(shapes[head_name]),
            head_name=head_name,
            experts_per_token=sum(layer.router.top_k for _, layer in moe_layers(model)),
        )

    def with_experts_per_token(self, mean: float) -> "ModelFlops":
        """The same for tokens that used so many experts in the mean, summed over all MoE layers."""
        if mean == self.experts_per_token:
            return self
        factor = mean / self.experts_per_token
        linear = {name: flops * factor if ".experts." in name else flops for name, flops in self.linear.items()}
        return replace(self, linear=linear)

    @property
    def num_linear_parameters(self) -> int:
        """Weights inside the layers' matrices: what N_avg averages."""
        return sum(self.sizes.values())

    def forward_per_token(self, densities: Mapping[str, float] | None = None) -> float:
        """FLOPs of the forward pass, zeros not counted.

        Args:
            densities: Share of non-zeros by parameter name; a name that is missing is dense.
        """
        densities = densities or {}
        return self.layers_forward_per_token(densities) + self.head * densities.get(self.head_name, 1.0)

    def layers_forward_per_token(self, densities: Mapping[str, float] | None = None) -> float:
        """FLOPs of the forward pass without the head: what activation checkpointing computes a second time."""
        densities = densities or {}
        return self.attention + sum(flops * densities.get(name, 1.0) for name, flops in self.linear.items())

    @property
    def attention_saved_per_token(self) -> float:
        """FLOPs of forward and backward pass that dense attention would take on top."""
        return _BACKWARD_AND_FORWARD * (self.dense_attention - self.attention)

    def train_per_token(
        self,
        densities: Mapping[str, float] | None = None,
        *,
        weight_gradient_densities: Mapping[str, float] | None = None,
    ) -> float:
        """FLOPs of forward and backward pass, zeros not counted.

        Args:
            densities: Share of non-zeros by parameter name, which the forward pass and the gradient of the input
                multiply with; a name that is missing is dense.
            weight_gradient_densities: Share of each weight's gradient that is computed; default: `densities`. n:m
                recipes let the gradient of what they do not see flow.
        """
        backward = densities if weight_gradient_densities is None else weight_gradient_densities
        return 2 * self.forward_per_token(densities) + self.forward_per_token(backward)


def spdf_flops(
    *,
    num_layers: int,
    dim: int,
    ffn_dim: int,
    num_heads: int,
    vocab_size: int,
    seq_len: int,
    tokens: float,
    sparsity: float = 0.0,
) -> float:
    """Training FLOPs as the SPDF paper counts them (arXiv 2303.10464), for comparison with its tables.

    It ignores causality, counts the softmax (3 FLOPs a score) and applies `sparsity` to all matrices of the layers.
    """
    matrices = 8 * seq_len * dim**2 + 4 * seq_len * dim * ffn_dim
    scores = 4 * seq_len**2 * dim + 3 * num_heads * seq_len**2
    forward = num_layers * (matrices * (1 - sparsity) + scores) + 2 * seq_len * dim * vocab_size
    return _BACKWARD_AND_FORWARD * tokens / seq_len * forward
