"""The decoder: Llama-shaped or GPT-2-shaped, by config.

Parameter names: embed, positions (gpt2), layers.{i}.attention_norm, layers.{i}.attention.{q,k,v,o},
layers.{i}.ffn_norm, layers.{i}.ffn.{gate,up,down} (gpt2: up, down), norm, head (absent where it is the embedding).
A mixture-of-experts layer has in place of ffn: layers.{i}.moe.router, layers.{i}.moe.experts.{e}.{gate,up,down} and
layers.{i}.moe.shared.{gate,up,down}.

Shapes: B batch, T tokens, M model dim, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.config.model import ModelConfig
from sparsetrain.models.attention import Attention
from sparsetrain.models.block_sparse_attention import BlockSparseAttention
from sparsetrain.models.loss import linear_cross_entropy
from sparsetrain.models.norms import LayerNorm, RMSNorm
from sparsetrain.models.rotary import rotation_table
from sparsetrain.moe.feed_forward import Activation, FeedForward
from sparsetrain.moe.layer import MoELayer, moe_layers

_VOCAB_MULTIPLE = 64


def padded_vocab(num_tokens: int) -> int:
    """Rows of an embedding for that many tokens: rounded up to a multiple of 64, so that products split evenly."""
    return -(-num_tokens // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward (or a mixture of experts), each added to the residual stream.

    Args:
        config: Shape of the network.
        index: Which of its layers this is, from 0.
    """

    ffn: FeedForward | None
    moe: MoELayer | None

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = (BlockSparseAttention if index in config.sparse_attention_layers else Attention)(config)
        self.ffn_norm = _norm(config)
        is_moe = index in config.moe_layers
        self.ffn = None if is_moe else FeedForward(config.dim, config.hidden_dim, *_form(config))
        self.moe = mixture_of(config, config.moe_layers.index(index)) if is_moe else None

    def forward(
        self,
        x_BTM: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        document_ids_BT: Tensor | None = None,
        tokens_BT: Tensor | None = None,
    ) -> Tensor:
        """Map [B, T, M] to [B, T, M].

        Args:
            x_BTM: The residual stream.
            rotation: As `Attention` takes it.
            document_ids_BT: As `Attention` takes it.
            tokens_BT: Token ids, for routers that go by them.
        """
        x_BTM = x_BTM + self.attention(self.attention_norm(x_BTM), rotation, document_ids_BT)
        normed_BTM = self.ffn_norm(x_BTM)
        y_BTM: Tensor = self.ffn(normed_BTM) if self.ffn is not None else self._mixture(normed_BTM, tokens_BT)
        return x_BTM + y_BTM

    def _mixture(self, x_BTM: Tensor, tokens_BT: Tensor | None) -> Tensor:
        assert self.moe is not None
        y_BTM: Tensor = self.moe(x_BTM, tokens_BT)
        return y_BTM


class Transformer(nn.Module):
    """A decoder-only language model.

    The constructor leaves torch's default initialisation (nothing on the meta device); call `initialize_`.

    Args:
        config: Shape of the network.
        vocab_size: Rows of the embedding, V.
        max_seq_len: Longest sample; bounds the learned positions of GPT-2, unused by rotary embeddings.

    Raises:
        PlacementError: The load trace that model.moe.router replays is missing, or of another model.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, max_seq_len: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(vocab_size, config.dim)
        self.positions = nn.Embedding(max_seq_len, config.dim) if config.arch == "gpt2" else None
        self.layers = nn.ModuleList(TransformerLayer(config, i) for i in range(config.num_layers))
        for _, moe in moe_layers(self):
            moe.router.check_model(len(config.moe_layers))
        self.norm = _norm(config)
        # Not a shared parameter where tied: sharing does not survive the way from the meta device.
        self.head = None if config.ties_embeddings else nn.Linear(config.dim, vocab_size, bias=False)

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, document_ids_BT: Tensor | None = None
    ) -> Tensor:
        """Predict the next token, or the loss of predicting it.

        Args:
            tokens_BT: int64 token ids.
            targets_BT: int64 ids of the next tokens, -100 where a token is not counted.
            document_ids_BT: Which packed document a token belongs to; read where attention.within_documents is set.
                None: each sample is one document. Learned positions count from the start of the sample either way.

        Returns:
            With targets, the sum of the counted tokens' cross entropies (0-d float32, in nats). Without, the logits
            [B, T, V] in the autocast dtype or the weights'.

        Raises:
            ValueError: T exceeds max_seq_len in a model with learned positions.
        """
        x_BTM = self.embed(tokens_BT)
        rotation = None
        if self.positions is not None:
            x_BTM = x_BTM + self.positions(self._position_ids(tokens_BT))
        else:
            rotation = rotation_table(
                tokens_BT.shape[1], self.config.head_dim, self.config.rope_theta, tokens_BT.device
            )
        visible = document_ids_BT if self.config.attention.within_documents else None
        for layer in self.layers:
            x_BTM = layer(x_BTM, rotation, visible, tokens_BT)
        x_BTM = self.norm(x_BTM)
        head_VM = self.embed.weight if self.head is None else self.head.weight
        if targets_BT is None:
            return F.linear(x_BTM, head_VM)
        return linear_cross_entropy(x_BTM, head_VM, targets_BT)

    def _position_ids(self, tokens_BT: Tensor) -> Tensor:
        assert self.positions is not None
        num_tokens = tokens_BT.shape[1]
        if num_tokens > self.positions.num_embeddings:
            raise ValueError(
                f"{num_tokens} tokens do not fit the model's {self.positions.num_embeddings} learned positions"
            )
        return torch.arange(num_tokens, device=tokens_BT.device)


def _norm(config: ModelConfig) -> nn.Module:
    if config.arch == "llama":
        return RMSNorm(config.dim, config.norm_eps)
    return LayerNorm(config.dim, config.norm_eps)


def _form(config: ModelConfig) -> tuple[Activation, bool]:
    """Activation of the feed-forward layers, and whether they have biases."""
    return ("swiglu", False) if config.arch == "llama" else ("gelu", True)


def mixture_of(config: ModelConfig, index: int) -> MoELayer:
    """The MoE layer that is the index-th of the model's."""
    moe = config.moe
    assert moe is not None
    activation, bias = _form(config)
    return MoELayer(
        config.dim,
        moe.ffn_dim or config.hidden_dim,
        moe.num_experts,
        moe.top_k,
        activation=activation,
        router=moe.router,
        shared_experts=moe.shared_experts,
        capacity_factor=moe.capacity_factor,
        overflow=moe.overflow,
        aux_loss=moe.balance_weight,
        z_loss=moe.z_loss,
        aux_scope=moe.aux_scope,
        bias=bias,
        layer=index,
    )
