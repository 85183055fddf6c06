"""Single-device model code: one decoder, Llama-shaped or GPT-2-shaped, and its initial weights."""

from sparsetrain.models.init import initialize_
from sparsetrain.models.sparse_linear import SparseLinear, only_elementwise_between, use_sparse_linears
from sparsetrain.models.transformer import Transformer, padded_vocab

__all__ = [
    "SparseLinear",
    "Transformer",
    "initialize_",
    "only_elementwise_between",
    "padded_vocab",
    "use_sparse_linears",
]
