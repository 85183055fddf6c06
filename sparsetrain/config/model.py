"""`model`: the shape of the network."""

from typing import Literal, Self

from pydantic import Field, model_validator

from sparsetrain.config.attention import Attention, BlockSparseAttention, DenseAttention
from sparsetrain.config.base import Int, KeyConflict, Real, Section
from sparsetrain.config.moe import MoeConfig
from sparsetrain.config.units import Count, divisors_near


class ModelConfig(Section):
    """A decoder-only transformer; the sizes that are left out follow from the architecture."""

    arch: Literal["llama", "gpt2"] = "llama"
    """llama: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases. gpt2: LayerNorm, learned positions, GELU,
    biases, tied head."""
    dim: Count = Field(gt=0)
    """Width of the residual stream."""
    num_layers: Int = Field(gt=0)
    """Transformer blocks."""
    num_heads: Int = Field(gt=0)
    """Attention heads; they share `dim` evenly."""
    num_kv_heads: Int | None = Field(default=None, gt=0)
    """Key/value heads (grouped-query attention); default num_heads."""
    ffn_dim: Count | None = Field(default=None, gt=0)
    """Width inside the feed-forward layer; default 4·dim (gpt2), or 8/3·dim rounded up to a multiple of 64 (llama)."""
    vocab_size: Count | None = Field(default=None, gt=0)
    """Rows of the embedding; default the tokenizer's, rounded up to a multiple of 64."""
    attention: Attention = DenseAttention()
    """dense, or {kind: block_sparse, ...}: the keys that a query sees."""
    moe: MoeConfig | None = None
    """Mixture-of-experts layers; null: every feed-forward layer is dense."""
    tie_embeddings: bool | None = None
    """Share the embedding with the output head; default true for gpt2, false for llama."""
    norm_eps: Real = Field(default=1e-5, gt=0)
    rope_theta: Real = Field(default=10_000.0, gt=0)
    init_std: Real = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; projections into the residual stream use init_std/√(2·num_layers)."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.dim % self.num_heads:
            raise KeyConflict("num_heads", f"must divide dim={self.dim}; {divisors_near(self.dim, self.num_heads)}")
        if self.num_heads % self.kv_heads:
            nearest = divisors_near(self.num_heads, self.kv_heads)
            raise KeyConflict("num_kv_heads", f"must divide num_heads={self.num_heads}; {nearest}")
        if self.arch == "llama" and self.head_dim % 2:
            raise KeyConflict("num_heads", f"rotary embeddings need an even dim/num_heads, and it is {self.head_dim}")
        if self.arch == "gpt2" and self.kv_heads != self.num_heads:
            raise KeyConflict("num_kv_heads", "arch=gpt2 has as many key/value heads as heads; remove this key")
        return self

    @model_validator(mode="after")
    def _moe_layers_exist(self) -> Self:
        try:
            _ = self.moe_layers
        except KeyConflict as conflict:
            raise KeyConflict(f"moe.{conflict.key}", conflict.message) from None
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> Self:
        if isinstance(self.attention, BlockSparseAttention):
            try:
                self.attention.layer_indices(self.num_layers)
                self.attention.pattern_places(self.num_heads)
            except KeyConflict as conflict:
                raise KeyConflict(f"attention.{conflict.key}", conflict.message) from None
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        return 4 * self.dim if self.arch == "gpt2" else -(-8 * self.dim // 3 // 64) * 64

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers whose feed-forward part is a mixture of experts, ascending."""
        return self.moe.layer_indices(self.num_layers) if self.moe else ()

    @property
    def sparse_attention_layers(self) -> tuple[int, ...]:
        """The layers whose attention is block-sparse, ascending."""
        if not isinstance(self.attention, BlockSparseAttention):
            return ()
        return self.attention.layer_indices(self.num_layers)

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output head is the embedding."""
        return self.tie_embeddings if self.tie_embeddings is not None else self.arch == "gpt2"
