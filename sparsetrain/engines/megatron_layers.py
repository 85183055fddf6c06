"""What Megatron's transformer layers are made of here: our attention, feed-forward networks, experts and norms.

The matrices of attention and of feed-forward networks are cut over the tensor-parallel ranks as Megatron cuts them, but
each stays a weight of its own: q, k and v are not fused, nor are gate and up. So every parameter is a box of one weight
of the plain model, and masks, norms and checkpoints need not know about Megatron.

Shapes: T tokens (of this rank, where sequences are cut), B batch, M model dim, H query heads and K key/value heads of
this rank, D head dim, C context-parallel ranks. Megatron's activations have the tokens first: [T, B, M].
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from sparsetrain_kernels import BlockLayout, block_sparse_attention
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from sparsetrain.config.attention import BlockSparseAttention as BlockSparseConfig
from sparsetrain.config.model import ModelConfig
from sparsetrain.models.attention_layouts import shared_layouts
from sparsetrain.models.block_sparse_attention import document_borders
from sparsetrain.models.causal_attention import causal_attention
from sparsetrain.models.norms import LayerNorm, RMSNorm
from sparsetrain.models.rotary import rotate, rotation_table
from sparsetrain.models.sparse_linear import SparseLinear, only_elementwise_between
from sparsetrain.models.transformer import mixture_of
from sparsetrain.moe.feed_forward import FeedForward

_rotation = lru_cache(maxsize=8)(rotation_table)  # the same for all layers


class _RMSNorm(RMSNorm):
    """With the constructor that Megatron calls."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)


class _LayerNorm(LayerNorm):
    """With the constructor that Megatron calls."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)


def norm_class(model: ModelConfig) -> type[nn.Module]:
    """The norm of a model, as Megatron builds it."""
    return _RMSNorm if model.arch == "llama" else _LayerNorm


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that the matrices of a layer are cut over, and how activations come to them and back."""

    group: ProcessGroup
    cuts_sequence: bool
    """Between the matrices each rank has a part of the tokens (sequence parallelism), and not all of them."""

    @property
    def size(self) -> int:
        """How many ranks."""
        return self.group.size()

    def enter(self, x_TBM: Tensor) -> Tensor:
        """Activations for matrices that are cut by outputs; their gradients come back summed over the ranks."""
        come = (
            mappings.gather_from_sequence_parallel_region
            if self.cuts_sequence
            else mappings.copy_to_tensor_model_parallel_region
        )
        whole_TBM: Tensor = come(x_TBM, group=self.group)
        return whole_TBM

    def leave(self, y_TBM: Tensor) -> Tensor:
        """Sum over the ranks of what matrices that are cut by inputs make."""
        add = (
            mappings.reduce_scatter_to_sequence_parallel_region
            if self.cuts_sequence
            else mappings.reduce_from_tensor_model_parallel_region
        )
        sum_TBM: Tensor = add(y_TBM, group=self.group)
        return sum_TBM

    def part(self, size: int) -> int:
        """A rank's share of a dimension that is cut."""
        assert size % self.size == 0, (size, self.size)
        return size // self.size

    @classmethod
    def of(cls, groups: ProcessGroupCollection, config: TransformerConfig) -> "TensorParallel":
        """As Megatron was told."""
        return cls(groups.tp, config.sequence_parallel)


class RowParallelLinear(SparseLinear):
    """A linear layer that is cut by its inputs: results are summed over the ranks, and then the bias is added."""

    def __init__(self, ranks: TensorParallel, num_inputs: int, num_outputs: int, bias: bool) -> None:
        super().__init__(nn.Linear(ranks.part(num_inputs), num_outputs, bias))
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        y = self._ranks.leave(self.multiply(x, None))
        return y if self.bias is None else y + self.bias.to(y.dtype)


def column_parallel(ranks: TensorParallel, num_inputs: int, num_outputs: int, bias: bool) -> SparseLinear:
    """A linear layer that is cut by its outputs; its input has to `enter` first, once for all layers that share it."""
    return SparseLinear(nn.Linear(num_inputs, ranks.part(num_outputs), bias))


class DenseCore(nn.Module):
    """Causal softmax attention.

    Args:
        model: Shape of the network.
        first_head: The first of the model's query heads that this rank computes.
    """

    def __init__(self, model: ModelConfig, first_head: int) -> None:
        super().__init__()

    def forward(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        """Attend over whole sequences: [B, T, H, D]."""
        return causal_attention(q_BTHD, k_BTKD, v_BTKD, document_ids_BT)


class BlockSparseCore(nn.Module):
    """Attention under the part of a block layout that is about this rank's heads; arguments as for `DenseCore`."""

    def __init__(self, model: ModelConfig, first_head: int) -> None:
        super().__init__()
        assert isinstance(model.attention, BlockSparseConfig)
        self._first_head = first_head
        self._layouts = shared_layouts(model.attention, model.num_heads)
        self._sliced: dict[tuple[int, torch.device], BlockLayout] = {}  # by blocks of queries and where it lies

    def forward(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        """Attend over whole sequences: [B, T, H, D]."""
        num_tokens, num_heads = q_BTHD.shape[1:3]
        layout = self._layouts.at(num_tokens, q_BTHD.device)  # of all heads
        place = layout.num_query_blocks, q_BTHD.device
        if place not in self._sliced:
            self._sliced[place] = layout.slice_heads(self._first_head, self._first_head + num_heads)
        borders = None if document_ids_BT is None else document_borders(document_ids_BT)
        return block_sparse_attention(q_BTHD, k_BTKD, v_BTKD, self._sliced[place], causal=True, cu_seqlens=borders)


@dataclass
class AttentionSubmodules:
    """What `ParallelAttention` is made of."""

    core_attention: type[DenseCore] | type[BlockSparseCore]


class ParallelAttention(nn.Module):
    """Self-attention of which each rank computes some heads.

    Context-parallel ranks have a stretch of the tokens each. They exchange it for all tokens of fewer heads, attend,
    and exchange back (DeepSpeed-Ulysses, arXiv 2309.14509): so any core attention works as on one rank.

    Args:
        config: Megatron's.
        layer_number: Of this layer; counts from 1.
        submodules: The core attention.
        model: Shape of the network.
        pg_collection: Megatron's process groups.
        cp_comm_type: Not looked at: Megatron passes it on to Transformer Engine's attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        submodules: AttentionSubmodules,
        model: ModelConfig,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__()
        self._model = model
        self._ranks = ranks = TensorParallel.of(pg_collection, config)
        self._context = pg_collection.cp
        bias, kv_dim = model.arch == "gpt2", model.kv_heads * model.head_dim
        self.q = column_parallel(ranks, model.dim, model.dim, bias)
        self.k = column_parallel(ranks, model.dim, kv_dim, bias)
        self.v = column_parallel(ranks, model.dim, kv_dim, bias)
        self.o = RowParallelLinear(ranks, model.dim, model.dim, bias)
        num_heads = model.num_heads // (ranks.size * self._context.size())
        place = ranks.group.rank() * self._context.size() + self._context.rank()
        self.core_attention = submodules.core_attention(model, place * num_heads)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **_: Any) -> tuple[Tensor, None]:
        """Mix information over tokens.

        Args:
            hidden_states: Normalised activations [T, B, M].
            attention_mask: The ids of the documents that tokens belong to, of whole sequences, int64 [B, T·C]; None for
                plain causal attention. (Megatron hands it through to here without looking at it.)

        Returns:
            [T, B, M], and no bias that is left to be added.
        """
        x_TBM = self._ranks.enter(hidden_states)
        q, k, v = (project(x_TBM).unflatten(-1, (-1, self._model.head_dim)) for project in (self.q, self.k, self.v))
        q_BTHD, k_BTKD, v_BTKD = (self._to_whole_sequences(x).transpose(0, 1) for x in (q, k, v))
        if self._model.arch == "llama":
            table = _rotation(q_BTHD.shape[1], self._model.head_dim, self._model.rope_theta, q_BTHD.device)
            q_BTHD, k_BTKD = rotate(q_BTHD, table), rotate(k_BTKD, table)
        y_BTHD = self.core_attention(q_BTHD, k_BTKD, v_BTKD, attention_mask)
        return self.o(self._to_all_heads(y_BTHD.transpose(0, 1)).flatten(-2)), None

    def _to_whole_sequences(self, x_TBHD: Tensor) -> Tensor:
        """[T, B, H, D] to [T·C, B, H/C, D]."""
        if self._context.size() == 1:
            return x_TBHD
        by_rank = x_TBHD.view(*x_TBHD.shape[:2], self._context.size(), -1, x_TBHD.shape[-1]).movedim(2, 0)
        return _exchange(by_rank, self._context).flatten(0, 1)

    def _to_all_heads(self, y_TBHD: Tensor) -> Tensor:
        """[T·C, B, H/C, D] to [T, B, H, D]."""
        if self._context.size() == 1:
            return y_TBHD
        by_rank = y_TBHD.reshape(self._context.size(), -1, *y_TBHD.shape[1:])
        return _exchange(by_rank, self._context).movedim(0, 2).flatten(2, 3)


def _exchange(parts: Tensor, group: ProcessGroup) -> Tensor:
    """Send part i of the first dimension to rank i, and get a part from each."""
    exchanged: Tensor = mappings.all_to_all(group, parts.contiguous())
    return exchanged


class ParallelFeedForward(FeedForward):
    """`FeedForward` whose hidden dimension is cut over ranks."""

    def __init__(self, model: ModelConfig, ranks: TensorParallel) -> None:
        is_llama, bias = model.arch == "llama", model.arch == "gpt2"
        nn.Module.__init__(self)  # not its own, which makes whole matrices
        self._ranks = ranks
        self.gate = column_parallel(ranks, model.dim, model.hidden_dim, bias) if is_llama else None
        self.up = column_parallel(ranks, model.dim, model.hidden_dim, bias)
        self.down = RowParallelLinear(ranks, model.hidden_dim, model.dim, bias)
        only_elementwise_between([self.up] if self.gate is None else [self.gate, self.up], self.down)

    def forward(self, x: Tensor) -> Tensor:
        """Map [T, B, M] to [T, B, M]."""
        return super().forward(self._ranks.enter(x))


class Mixture(nn.Module):
    """A MoELayer between Megatron's activations.

    Where sequences are cut over tensor-parallel ranks, each brings its own tokens, as data-parallel ranks do.

    Args:
        model: Shape of the network.
        index: Which of the model's MoE layers this is, from 0.
    """

    def __init__(self, model: ModelConfig, index: int) -> None:
        super().__init__()
        self.moe = mixture_of(model, index)

    def forward(self, x_TBM: Tensor) -> Tensor:
        """Map [T, B, M] to [T, B, M]."""
        y_BTM: Tensor = self.moe(x_TBM.transpose(0, 1))
        return y_BTM.transpose(0, 1)


class Block(TransformerLayer):  # type: ignore[misc]  # of a library without types
    """Megatron's transformer layer with our feed-forward part.

    Args:
        config: Megatron's.
        submodules: Attention and norms.
        model: Shape of the network.
        recompute: Keep the input of the layer only, and compute it again in the backward pass.
        rest: What else Megatron passes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        model: ModelConfig,
        recompute: bool,
        **rest: Any,
    ) -> None:
        super().__init__(config, submodules, **rest)
        self._recompute = recompute
        index = self.layer_number - 1
        if index in model.moe_layers:
            self.mlp: nn.Module = Mixture(model, model.moe_layers.index(index))
        else:
            self.mlp = ParallelFeedForward(model, TensorParallel.of(self.pg_collection, config))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """Map [T, B, M] to [T, B, M], and Megatron's `context`, which is for encoders."""
        if self._recompute and torch.is_grad_enabled():
            y_TBM = checkpoint(
                self._compute, hidden_states, attention_mask, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y_TBM = self._compute(hidden_states, attention_mask)
        return y_TBM, None

    def _compute(self, x_TBM: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        y_TBM, _ = self.self_attention(self.input_layernorm(x_TBM), document_ids_BT)
        x_TBM = x_TBM + y_TBM
        mixed_TBM: Tensor = x_TBM + self.mlp(self.pre_mlp_layernorm(x_TBM))
        return mixed_TBM


def layer_spec(model: ModelConfig, index: int, *, recompute: bool) -> ModuleSpec:
    """How Megatron builds the index-th layer of a model, from 0."""
    core = BlockSparseCore if index in model.sparse_attention_layers else DenseCore
    attention = ModuleSpec(
        ParallelAttention, params={"model": model}, submodules=AttentionSubmodules(core_attention=core)
    )
    parts = TransformerLayerSubmodules(
        input_layernorm=norm_class(model), self_attention=attention, pre_mlp_layernorm=norm_class(model)
    )
    return ModuleSpec(Block, params={"model": model, "recompute": recompute}, submodules=parts)
