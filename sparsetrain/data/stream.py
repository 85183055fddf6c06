"""Packing: the documents of one side of the split as one endless-looking row of tokens, cut into samples.

Nothing is copied. A stream is a list of extents, runs of neighbouring documents in memory-mapped shards, so the
documents held out of training are skipped even in a corpus that was tokenized elsewhere.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sparsetrain.data.shards import TokenShard, check_vocabulary


class TokenStream:
    """Chosen documents of some shards, one after the other, as samples of `seq_len` tokens.

    Sample i is made of tokens i·seq_len … (i + 1)·seq_len of the stream: inputs all but the last, targets all but the
    first.

    Args:
        shards: Where the documents are.
        chosen: For each shard, bool [num_documents]: which documents belong to the stream.
        seq_len: Tokens a sample.
        vocab_size: Tokens must lie below it.
    """

    def __init__(
        self, shards: Sequence[TokenShard], chosen: Sequence[NDArray[np.bool_]], seq_len: int, vocab_size: int
    ) -> None:
        self._shards = tuple(shards)
        self._seq_len = seq_len
        self._vocab_size = vocab_size
        runs = [_runs(shard, mask) for shard, mask in zip(shards, chosen, strict=True)]
        lengths = np.concatenate([stop - start for start, stop in runs])
        self._extent_shard = np.repeat(np.arange(len(runs)), [start.size for start, _ in runs])
        self._extent_start = np.concatenate([start for start, _ in runs])
        self._extent_ends = np.cumsum(lengths)
        self.num_tokens = int(lengths.sum())

    @property
    def num_samples(self) -> int:
        """Samples that have all their targets."""
        return max(0, self.num_tokens - 1) // self._seq_len

    def read(self, sample: int, tokens: NDArray[np.int64], document_starts: NDArray[np.int32]) -> int:
        """Fill in one sample.

        Args:
            sample: Which one, from 0; the one after the last whole sample may be read too.
            tokens: [seq_len + 1] is filled with the inputs and, last, the target of the last one.
            document_starts: [seq_len + 1] of zeros gets a one where a document begins, except at the first token.

        Returns:
            How many tokens were filled in: seq_len + 1, or fewer at the end of the stream.

        Raises:
            DataError: A token is not in the vocabulary.
        """
        position = sample * self._seq_len
        wanted = min(tokens.size, self.num_tokens - position)
        extent = int(self._extent_ends.searchsorted(position, side="right"))
        filled = 0
        while filled < wanted:
            shard = self._shards[self._extent_shard[extent]]
            left = int(self._extent_ends[extent]) - position
            count = min(wanted - filled, left)
            start = int(self._extent_start[extent]) + self._extent_length(extent) - left
            piece = shard.tokens[start : start + count]
            tokens[filled : filled + count] = piece
            check_vocabulary(shard, tokens[filled : filled + count], start, self._vocab_size)
            document_starts[filled + shard.document_starts(start, start + count)] = 1
            if filled:
                document_starts[filled] = 1  # an extent begins with a document
            filled, position, extent = filled + count, position + count, extent + 1
        return filled

    def _extent_length(self, extent: int) -> int:
        before = self._extent_ends[extent - 1] if extent else 0
        return int(self._extent_ends[extent] - before)


def _runs(shard: TokenShard, chosen: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First token of each run of chosen documents, and the token after it; runs without tokens are left out."""
    edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
    offsets = shard.document_offsets()
    starts, stops = offsets[edges[::2]], offsets[edges[1::2]]
    return starts[stops > starts], stops[stops > starts]
