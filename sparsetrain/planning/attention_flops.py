"""How many keys the queries of a model see, layer by layer: what attention costs."""

import torch
from sparsetrain_kernels import BlockLayout

from sparsetrain.config import BlockSparseAttention, ModelConfig
from sparsetrain.models.attention_layouts import attention_layout


def keys_per_query(config: ModelConfig, seq_len: int) -> tuple[float, ...]:
    """Keys that a query sees in each layer, mean over queries and heads; borders of documents are not known here.

    A query at position t sees t + 1 keys where attention is dense, so (T + 1)/2 on average.

    Args:
        config: Shape of the network.
        seq_len: Tokens of a sample, T.
    """
    dense = (seq_len + 1) / 2
    if not isinstance(config.attention, BlockSparseAttention):
        return (dense,) * config.num_layers
    layout = attention_layout(config.attention, config.num_heads, seq_len, allow_empty=True)
    sparse = visible_pairs(layout, seq_len) / (seq_len * layout.num_heads)
    return tuple(sparse if layer in config.sparse_attention_layers else dense for layer in range(config.num_layers))


def visible_pairs(layout: BlockLayout, num_tokens: int) -> int:
    """Pairs of a query and a key, not later, that sees it, over all heads of the layout: counted token by token.

    A block on the diagonal holds b(b + 1)/2 pairs, one below it b², b smaller in the last block.

    Args:
        layout: Of whole sequences.
        num_tokens: Their length.
    """
    layout.check_lengths(num_tokens, num_tokens)
    mask_HQK = layout.to_mask().cpu()
    sizes_Q = torch.full((layout.num_query_blocks,), layout.block, device="cpu")  # also where meta is the default
    sizes_Q[-1] = num_tokens - (layout.num_query_blocks - 1) * layout.block
    pairs_QK = torch.outer(sizes_Q, sizes_Q).tril_(-1) + torch.diag(sizes_Q * (sizes_Q + 1) // 2)
    return int((mask_HQK * pairs_QK).sum())
