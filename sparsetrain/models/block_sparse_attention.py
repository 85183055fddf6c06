"""Self-attention of which each head sees some blocks of keys only; its parameters are those of dense attention.

Shapes: B batch, T tokens, H query heads, K key/value heads, D head dim.
"""

import torch
from sparsetrain_kernels import block_sparse_attention
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.config.attention import BlockSparseAttention as BlockSparseConfig
from sparsetrain.config.model import ModelConfig
from sparsetrain.models.attention import Attention
from sparsetrain.models.attention_layouts import shared_layouts


class BlockSparseAttention(Attention):
    """`Attention` under a block layout: a checkpoint of one loads into the other.

    Args:
        config: Shape of the network, with block-sparse attention.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert isinstance(config.attention, BlockSparseConfig)
        self.layouts = shared_layouts(config.attention, config.num_heads)

    def _attend(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        layout = self.layouts.at(q_BTHD.shape[1], q_BTHD.device)
        borders = None if document_ids_BT is None else document_borders(document_ids_BT)
        return block_sparse_attention(q_BTHD, k_BTKD, v_BTKD, layout, causal=True, cu_seqlens=borders)


def document_borders(document_ids_BT: Tensor) -> Tensor:
    """First tokens of all documents of all samples, one sample after the other, and the end of the last.

    Args:
        document_ids_BT: Integers; tokens next to each other are of one document where they are equal.

    Returns:
        int64 [B·T + 1], ascending. Its length does not depend on the number of documents, so that nothing waits for a
        GPU to count them: what is left is filled with documents of no tokens at the end.
    """
    changes = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    starts = F.pad(F.pad(changes, (1, 0), value=True).flatten(), (0, 1))
    num_tokens = document_ids_BT.numel()
    places = torch.arange(num_tokens + 1, device=document_ids_BT.device)
    return torch.where(starts, places, num_tokens).sort().values
