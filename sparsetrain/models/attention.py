"""Causal self-attention with grouped key/value heads.

Shapes: B batch, T tokens, H query heads, K key/value heads, D head dim, M model dim = H·D.
"""

from torch import Tensor, nn

from sparsetrain.config.model import ModelConfig
from sparsetrain.models.causal_attention import causal_attention
from sparsetrain.models.rotary import rotate


class Attention(nn.Module):
    """Project to queries, keys and values, attend, project back; with biases in the GPT-2 shape."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        bias, kv_dim = config.arch == "gpt2", config.kv_heads * config.head_dim
        self.q = nn.Linear(config.dim, config.dim, bias=bias)
        self.k = nn.Linear(config.dim, kv_dim, bias=bias)
        self.v = nn.Linear(config.dim, kv_dim, bias=bias)
        self.o = nn.Linear(config.dim, config.dim, bias=bias)

    def forward(
        self, x_BTM: Tensor, rotation: tuple[Tensor, Tensor] | None = None, document_ids_BT: Tensor | None = None
    ) -> Tensor:
        """Mix information over tokens.

        Args:
            x_BTM: Normalised activations.
            rotation: Table for rotary embeddings (`rotation_table`); None for none.
            document_ids_BT: Keep queries inside their document; None for plain causal attention.

        Returns:
            [B, T, M], to be added to the residual stream.
        """
        q_BTHD, k_BTKD, v_BTKD = (
            project(x_BTM).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v)
        )
        if rotation is not None:
            q_BTHD, k_BTKD = rotate(q_BTHD, rotation), rotate(k_BTKD, rotation)
        y_BTM: Tensor = self.o(self._attend(q_BTHD, k_BTKD, v_BTKD, document_ids_BT).flatten(-2))
        return y_BTM

    def _attend(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        return causal_attention(q_BTHD, k_BTKD, v_BTKD, document_ids_BT)
