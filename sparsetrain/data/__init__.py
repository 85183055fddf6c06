"""Text -> tokens -> batches, in an order that is a function of (seed, global sample index) alone."""

from sparsetrain.data.cache import Progress
from sparsetrain.data.dataset import NOT_COUNTED, Batch, Dataset
from sparsetrain.data.description import describe
from sparsetrain.data.preparation import prepare
from sparsetrain.data.tokenizer import Tokenizer, tokenizer_from_json

__all__ = [
    "NOT_COUNTED",
    "Batch",
    "Dataset",
    "Progress",
    "Tokenizer",
    "describe",
    "prepare",
    "tokenizer_from_json",
]
